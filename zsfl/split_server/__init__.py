"""The split server: runs the body for whoever asks, spills what it computes, remembers nothing that matters."""
