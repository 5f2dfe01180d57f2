"""What is trained, and the arithmetic of training it. No sockets, no spills; nothing is imported eagerly."""
