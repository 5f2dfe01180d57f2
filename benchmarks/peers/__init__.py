"""Ways to ask a server and be answered, each as its own community would write it, behind one small interface.

Each module of a contestant is a server program that sends back what it is sent (`python -m peers.NAME` from
benchmarks/, see `program.serve_until_eof`), and has `connect(port)`, which gives an `Asker`.
"""
