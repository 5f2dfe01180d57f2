"""Plans and starts clusters: local processes, or the same nodes in one process."""
