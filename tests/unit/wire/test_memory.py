"""Memory is used again when nobody looks at it any more, and never before."""

from __future__ import annotations

import mmap
import platform

import pytest
import torch

from zsfl.wire import memory as module
from zsfl.wire.memory import KEPT_BYTES, RECYCLED_BYTES, keep_freed, memory

SIZE = 3 * RECYCLED_BYTES


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pieces", [])


def place(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_what_nobody_looks_at_is_used_again() -> None:
    first = memory(SIZE)
    first[:4] = b"mine"
    at = place(first)
    del first
    again = memory(SIZE)
    assert place(again) == at
    again[:] = bytes(SIZE)


def test_any_view_keeps_it() -> None:
    whole = memory(SIZE)
    at = place(whole)
    kept = [whole[10:20], torch.frombuffer(whole[4096:8192], dtype=torch.float32).view(32, 32)[3]]
    del whole
    while kept:
        assert place(memory(SIZE)) != at
        kept.pop()
    found = {place(memory(SIZE)) for _ in range(3)}
    assert len(found) == 1  # the one that was used last
    assert place(memory(SIZE + 1)) not in {at, *found}


def test_what_is_kept_is_bounded() -> None:
    held = [memory(size) for size in range(SIZE, SIZE + 200)]
    del held
    memory(SIZE + 1000)
    assert sum(piece.nbytes for piece in module._pieces) <= KEPT_BYTES + 2 * (SIZE + 1000)


def test_short_pieces_are_left_to_the_system() -> None:
    assert len(memory(100)) == 100
    assert len(memory(0)) == 0
    assert module._pieces == []


def test_more_is_given_only_where_it_is_at_hand() -> None:
    assert len(memory(SIZE, rather=2 * SIZE)) == SIZE
    whole = memory(2 * SIZE)
    at = place(whole)
    assert len(memory(10, rather=2 * SIZE)) == 10
    del whole
    more = memory(10, rather=2 * SIZE)
    assert (len(more), place(more)) == (2 * SIZE, at)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone it is known how")
def test_what_was_freed_is_not_cleared_again() -> None:
    import resource

    def faults() -> int:
        """How often the system had to give this thread a page."""
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        held = [bytes(b"x" * size) for size in (5 << 20, 16 << 20, 1 << 20)]
        del held
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    keep_freed()
    faults()
    assert faults() < (22 << 20) // mmap.PAGESIZE // 10
