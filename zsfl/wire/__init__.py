"""Typed messages over ZeroMQ: framing, request and reply, publish and subscribe. Knows no torch."""
