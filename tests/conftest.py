"""What holds for every test."""

from __future__ import annotations

import signal
import sys

from hypothesis import HealthCheck, settings

# The same examples each time, and however slow the machine.
settings.register_profile("zsfl", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("zsfl")


def pytest_configure() -> None:
    """What is started here takes Ctrl-C: a script has whatever it starts in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """One thread for torch, as nodes have it: two that wait for each other in small products take ten times the
    processor time where others want the processor, too. Where no test has loaded torch it is not loaded for this.
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
