"""Ray itself, as far as it is needed here; loaded only where it is."""

from __future__ import annotations

import importlib
import os
import socket
from dataclasses import dataclass
from typing import Any

from zsfl.bounds import is_address
from zsfl.cluster.on_ray.actors import NAMESPACE
from zsfl.errors import ConfigError, Unavailable
from zsfl.wire.door import is_loopback

STORE_BYTES = 100 << 20
"""What a Ray of our own may keep of objects: nothing of any size goes through it."""
REACH_S = 5.0
"""What it may take to find out whether a Ray cluster is there."""


def load() -> Any:
    """Ray; ConfigError where it is not installed."""
    # Asked for nothing by zsfl, it would tell its makers how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("--on ray needs Ray, which is not installed here: pip install 'zsfl[ray]'") from None


@dataclass(frozen=True, slots=True)
class Engine:
    """A Ray cluster that this process has joined."""

    ray: Any
    is_ours: bool
    """Whether it, or the connection to it, is to be ended."""
    here: str
    """The node of Ray on this machine."""
    host: str
    """The address of this machine there."""
    is_local: bool
    """Nothing leaves this machine."""

    @classmethod
    def join(cls, address: str, cpus: int) -> Engine:
        """The one at this address, or where none is said a new one on this machine, with so many CPUs to give away."""
        if "://" in address:
            raise ConfigError(
                f"--address is {address}: expected HOST:PORT of the Ray cluster that this machine is part of, or auto. "
                "Where it is no part of it, have Ray run zsfl there: ray job submit -- zsfl up JOB --on ray"
            )
        if address and address != "auto":
            _check_there(address)
        if not address:
            # Read when Ray is imported: one of several machines, or all of it on loopback.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray = load()
        is_ours = not ray.is_initialized()
        if is_ours:
            ours = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
            given: dict[str, Any] = {"address": address} if address else {"address": "local", **ours}
            try:
                ray.init(**given, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # whatever it is: Ray has no error of its own for it
                said = " ".join(str(error).split())[:300]
                if address:
                    raise Unavailable(
                        f"no Ray cluster can be joined at {address}: {said}. Is `ray status` well here?"
                    ) from None
                raise Unavailable(f"no Ray could be started on this machine: {said}") from None
        here, host = ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address())
        return cls(ray, is_ours, here, host, is_loopback(host))

    def leave(self) -> None:
        """End it, or the connection."""
        if self.is_ours:
            self.ray.shutdown()

    def has(self, resource: str) -> float:
        """How much of this all machines have together, used or not."""
        return float(self.ray.cluster_resources().get(resource, 0.0))

    def pinned(self) -> Any:
        """Where to place what belongs on this machine."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(node_id=self.here, soft=False)


def _check_there(address: str) -> None:
    """Unavailable when nobody listens there: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not is_address(address):
        raise ConfigError(f"--address is {address}: expected HOST:PORT, such as 192.168.1.10:6379, or auto")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise Unavailable(f"nobody is reached at {address} ({error}): is it what `ray start --head` said?") from None
