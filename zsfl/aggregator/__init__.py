"""The aggregator: collects spills by gossip, averages, steps, commits, publishes."""
