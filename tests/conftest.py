"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples each time, and however slow the machine.
settings.register_profile("zsfl", deadline=None, derandomize=True)
settings.load_profile("zsfl")
