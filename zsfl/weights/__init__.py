"""Versions of the weights: publication by the aggregator, following by everybody else."""
