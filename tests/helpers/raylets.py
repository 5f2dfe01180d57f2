"""Machines of a Ray cluster, all of them raylets on loopback of this machine, until standard input ends.

python raylets.py CPUS...     the first is the head; its address is printed once all are there
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

STORE_BYTES = 80 << 20
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of it on 127.0.0.1
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_timeout_ms": "60000",
}
"""How Ray is to behave on a busy machine without a network."""


def serve(cpus: list[int]) -> None:
    """Start them, tell where, and end them with the input."""
    os.environ.update(QUIET)
    made: Any = import_module("ray.cluster_utils").Cluster()
    try:
        for number, count in enumerate(cpus):
            head = {} if number else {"include_dashboard": False}
            made.add_node(num_cpus=count, num_gpus=0, object_store_memory=STORE_BYTES, **head)
        print(made.address, flush=True)
        sys.stdin.read()
    finally:
        made.shutdown()


if __name__ == "__main__":
    serve([int(word) for word in sys.argv[1:]])
