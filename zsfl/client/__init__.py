"""The client: head and tail, next to the data, which never leaves its process."""
