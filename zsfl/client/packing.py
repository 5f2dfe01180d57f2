"""How tensors are packed for one split server, and what is learned from it where the job leaves that open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from zsfl.errors import BadShape
from zsfl.ids import NodeId
from zsfl.tensors.choice import CodecChooser, Role
from zsfl.tensors.codec import Codec, unpack
from zsfl.tensors.plan import CodecPlan
from zsfl.tensors.spec import TensorSpec
from zsfl.wire.connection import Answer
from zsfl.wire.framing import Buffer

Packed = tuple[TensorSpec, Buffer]
AtCut = Literal["activation", "output", "gradient"]


class Packing:
    """Packs for, and unpacks from, one server."""

    def __init__(self, server: NodeId, plan: CodecPlan, chooser: CodecChooser) -> None:
        """`plan` is what was agreed on with it; what its link is like, the chooser learns."""
        self._server = server
        self._plan = plan
        self._chooser = chooser
        self._learns = plan.chooses

    def codec(self, role: AtCut, *, test: bool = False) -> Codec:
        """How a tensor is to be packed now."""
        choice = self._plan.test if test else getattr(self._plan, role)
        return self._chooser.choose(self._server, role, choice)

    def unpack(self, role: AtCut, asked: Codec, spec: TensorSpec, answer: Answer) -> torch.Tensor:
        """The one tensor of an answer, which was to be packed like this."""
        if len(answer.parts) != 1:
            raise BadShape(f"one tensor belongs to this reply, {len(answer.parts)} came with it")
        begun_s = time.perf_counter()
        tensor = unpack(spec, answer.parts[0])
        if self._learns:
            # Of what was asked for, also where the server found that lz4 does not pay.
            self._chooser.packed(role, asked, tensor.nbytes, spec.nbytes)
            self._chooser.moved(self._server, tensor.nbytes)
            self._chooser.spent(self._server, time.perf_counter() - begun_s)
        return tensor

    def packed(self, role: Role, codec: Codec, tensor: torch.Tensor, spec: TensorSpec) -> None:
        """A tensor was packed for this server or another."""
        if self._learns:
            self._chooser.packed(role, codec, tensor.nbytes, spec.nbytes)

    def sent(self, tensor: torch.Tensor) -> None:
        """A tensor is part of a request to this server."""
        if self._learns:
            self._chooser.moved(self._server, tensor.nbytes)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While a request is packed, sent and answered, or raises."""
        if not self._learns:
            yield
            return
        self._chooser.asked(self._server, time.perf_counter())
        try:
            yield
        except BaseException:
            self._chooser.failed(self._server, time.perf_counter())
            raise
        self._chooser.answered(self._server, time.perf_counter())


class Outgoing:
    """A tensor that is packed at most once a codec, and how the tensor that is to come back is wanted."""

    def __init__(self, name: str, tensor: torch.Tensor, role: AtCut = "activation", *, test: bool = False) -> None:
        self._name = name
        self._tensor = tensor
        self._role: AtCut = role
        self._test = test
        self._packed: dict[Codec, Packed] = {}
        self.asked = Codec()
        """What the reply was last asked to be packed with."""

    def reply_codec(self, packing: Packing, role: AtCut) -> str:
        """What to ask for."""
        self.asked = packing.codec(role, test=self._test)
        return str(self.asked)

    def packed(self, packing: Packing) -> Packed:
        """What to send to the server of this packing."""
        codec = packing.codec(self._role, test=self._test)
        if codec not in self._packed:
            self._packed[codec] = codec.pack(self._name, self._tensor)
            packing.packed(self._role, codec, self._tensor, self._packed[codec][0])
        packing.sent(self._tensor)
        return self._packed[codec]
