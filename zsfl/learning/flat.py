"""Tensors of one dtype in one piece of memory: what many contributions of the same tensors are summed as at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class FlatLayout:
    """Which tensors there are and where; contributions with the same ones share it, so it is compared by identity."""

    def __init__(self, dtype: torch.dtype, places: Sequence[tuple[str, tuple[int, ...], int, int]]) -> None:
        """`places` are name, shape, first number and how many, one after another without gaps."""
        self.dtype = dtype
        self.places = {name: (shape, start, count) for name, shape, start, count in places}


class FlatTensors(Mapping[str, Tensor]):
    """Tensors by name, each a view of one long tensor that is made when it is asked for."""

    __slots__ = ("_numbers", "layout", "size_bytes")

    def __init__(self, layout: FlatLayout, numbers: Tensor) -> None:
        """`numbers` are of one dimension, those of all tensors of the layout."""
        self.layout = layout
        self.size_bytes = numbers.nbytes
        self._numbers = numbers

    def numbers(self) -> Tensor:
        """All numbers, of one dimension; to be used before those of another one are asked for."""
        return self._numbers

    def __getitem__(self, name: str) -> Tensor:
        shape, start, count = self.layout.places[name]
        return self.numbers()[start : start + count].view(shape)

    def piece(self, name: str, start: int, count: int) -> Tensor:
        """So many numbers of one tensor from number `start` on; to be used before others are asked for."""
        first = self.layout.places[name][1] + start
        return self.numbers()[first : first + count]

    def __contains__(self, name: object) -> bool:
        return name in self.layout.places  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)
