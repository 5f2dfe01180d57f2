"""Clusters whose nodes are actors of Ray, which places them and starts them again; their data goes over ZeroMQ."""
