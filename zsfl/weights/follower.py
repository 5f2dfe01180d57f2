"""Follows the versions that the aggregator publishes, and fetches those that were missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

from zsfl.errors import BadShape, NoPeer, ZsflError
from zsfl.ids import NodeCard, Portion, Version
from zsfl.latest import Latest
from zsfl.node import Node
from zsfl.weights.packing import Base, unpacked
from zsfl.wire.connection import Connection
from zsfl.wire.framing import Buffer
from zsfl.wire.messages import Broadcast, FetchWeights, Weights

KEPT_VERSIONS = 4
"""At least, of those that were asked for last: the one in use, the one before for steps in flight, one that is tested,
the next."""
KEPT_BYTES, MOST_VERSIONS = 256 << 20, 64
"""More of them while they take no more than this: where nobody waits for anybody, many clients make many versions while
a step waits its turn."""
GRACE_S = 0.1
"""How long a version that was announced may take to begin to arrive before it is asked for."""

_Loaded = TypeVar("_Loaded")


class WeightsFollower(Generic[_Loaded]):
    """The newest versions of one portion of the weights, loaded and ready to use.

    `load` turns tensors by name into what the role computes with, once a version.
    """

    def __init__(
        self,
        node: Node,
        portion: Portion,
        load: Callable[[dict[str, torch.Tensor]], _Loaded],
        *,
        differences: bool = False,
    ) -> None:
        """`differences`: from the first version on, the tensors of the newest are kept, as the next one may say what
        differs from them; else from when one is heard that does.
        """
        self._node = node
        self._portion = portion
        self._load = load
        self._source: NodeCard | None = None
        self._connection: Connection | None = None
        self._listening: asyncio.Task[None] | None = None
        self._arriving: Callable[[], list[Weights]] = list
        self._versions: Latest[dict[Version, asyncio.Future[_Loaded]]] = Latest({})
        self._fetching: dict[Version, asyncio.Task[asyncio.Future[_Loaded]]] = {}
        self._keeps_base = differences
        self._base: Base | None = None
        self._unusable: Version | None = None
        """The version that was broadcast last, if nothing could be made of that."""
        self._early: list[tuple[Weights, list[Buffer]]] = []
        """Differences from a version that is being fetched, or from one of these."""

    def follow(self, aggregator: NodeCard) -> None:
        """Take versions from this aggregator from now on; those of a former one are forgotten."""
        self.unfollow()
        self._source = aggregator
        self._connection = self._node.connect(aggregator, aggregator.data_port)
        ear = self._node.listen(aggregator, [self._portion.encode()], self._heard)
        self._arriving = lambda: [body for body in ear.arriving() if isinstance(body, Weights)]
        self._listening = self._node.start(ear.run(), f"weights of {aggregator.name}")

    def unfollow(self) -> None:
        """The aggregator is gone."""
        if self._connection is not None:
            self._connection.close(f"is gone: {self._source.name if self._source else ''}")
        if self._listening is not None:
            self._listening.cancel()
        self._source = self._connection = self._listening = None
        self._fetching = {}
        self._base, self._unusable, self._early = None, None, []
        self._versions.set({})

    def held(self, version: Version) -> _Loaded | None:
        """The weights of `version` if they are here already."""
        held = self._versions.value
        if (loaded := held.get(version)) is None:
            return None
        held[version] = held.pop(version)  # to the end: the one that was not asked for longest goes first
        return loaded.result()

    async def get(self, version: Version) -> _Loaded:
        """The weights of `version`, waiting for them to arrive, fetching them if they do not.

        StaleWeights when the aggregator does not hold it; NoPeer when there is no aggregator.
        """
        if version not in self._versions.value:
            await self._await_broadcast(version)
        held = self._versions.value
        loading = held.get(version) or await self._fetch_once(version)
        if version in held:
            held[version] = held.pop(version)  # to the end: the one that was not asked for longest goes first
        return loading.result()

    async def _await_broadcast(self, version: Version) -> None:
        """Give the broadcast its grace, and all the time it needs once it has begun to arrive, unless it is no use."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await self._versions.wait_for(lambda held: version in held or version == self._unusable)
                    return
            if not any(body.version == version and self._has_base_of(body) for body in self._arriving()):
                return

    async def _fetch_once(self, version: Version) -> asyncio.Future[_Loaded]:
        fetching = self._fetching
        if version not in fetching:
            task = asyncio.create_task(self._fetch(version))
            fetching[version] = task
            task.add_done_callback(_seen)
            task.add_done_callback(lambda _: self._fetched(fetching, version))
        return await asyncio.shield(fetching[version])

    def _fetched(self, fetching: dict[Version, asyncio.Task[asyncio.Future[_Loaded]]], version: Version) -> None:
        """What came meanwhile may be of use now; what is not will not be."""
        del fetching[version]
        if fetching is self._fetching:
            early, self._early = self._early, []
            for weights, parts in early:
                self._heard(weights, parts)

    async def _fetch(self, version: Version) -> asyncio.Future[_Loaded]:
        connection = self._connection
        if connection is None:
            raise NoPeer("there is no aggregator to fetch weights from")
        request = FetchWeights(portion=self._portion, version=version)
        answer = await connection.request(request, deadline_s=self._node.settings.request_s)
        if connection is not self._connection:
            raise NoPeer("the aggregator that was asked for weights is gone; ask the next one")
        weights = answer.expect(Weights)
        if (weights.version, weights.portion, weights.base) != (version, self._portion, None):
            what = "" if weights.base is None else f" as what differs from {weights.base}"
            raise BadShape(
                f"asked for {self._portion} of version {version}, got {weights.portion} of {weights.version}{what}"
            )
        return self._take(weights, answer.parts)

    def _heard(self, broadcast: Broadcast, parts: list[Buffer]) -> None:
        if not isinstance(broadcast, Weights) or broadcast.portion != self._portion:
            return
        try:
            self._take(broadcast, parts)
        except ZsflError:  # whoever needs this version asks for it
            self._keeps_base |= broadcast.base is not None
            coming = {*self._fetching, *(weights.version for weights, _ in self._early)}
            if broadcast.base in coming and len(self._early) < KEPT_VERSIONS:
                self._early.append((broadcast, parts))
            self._unusable = broadcast.version
            self._versions.touch()

    def _has_base_of(self, weights: Weights) -> bool:
        return weights.base is None or (self._base is not None and weights.base == self._base[0])

    def _take(self, weights: Weights, parts: Sequence[Buffer]) -> asyncio.Future[_Loaded]:
        held = self._versions.value
        if weights.version in held:
            return held[weights.version]
        state = unpacked(weights, parts, self._base)
        if self._keeps_base and (self._base is None or weights.version > self._base[0]):
            self._base = weights.version, state
        loaded: asyncio.Future[_Loaded] = asyncio.get_running_loop().create_future()
        try:
            loaded.set_result(self._load(state))
        except Exception as error:  # whoever asks for this version gets it
            loaded.set_exception(error)
            loaded.exception()
        held[weights.version] = loaded
        size = sum(tensor.nbytes for tensor in state.values())
        kept = min(max(KEPT_BYTES // max(size, 1), KEPT_VERSIONS), MOST_VERSIONS)
        while len(held) > kept:
            del held[next(iter(held))]
        self._versions.touch()
        return loaded


def _seen(task: asyncio.Task[Any]) -> None:
    """Mark a failure as seen: whoever waits gets it, and nobody waiting is no fault."""
    if not task.cancelled():
        task.exception()
