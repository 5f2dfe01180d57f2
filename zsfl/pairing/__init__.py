"""Two machines come to trust each other: what `zsfl invite`, `zsfl join` and `zsfl keys` do."""
