"""Requests that are computed together wait here for one another: no sockets, no clock, no computing of its own.

Whoever waits takes no slot of the server, or with more clients than slots a merged batch would never be whole. What
waits is bounded all the same: so many meetings, of so many steps each, and each only for as long as its asker does.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from zsfl.errors import Busy, Rejected, Unavailable
from zsfl.ids import Cid, RunId, Version, parse_cid

MAX_MEETINGS = 64
"""Meetings that are not over; more are refused."""
MAX_SIZE = 192
"""Steps of one meeting: some less than the requests that a connection carries and a server serves at once."""
MAX_COPIES = 8
"""Requests that wait for one step: more of them than a client that was started again and again would leave."""
KEPT_VERSIONS = 2
"""Results are kept of the versions that were worked on last: for those whose answer was lost on its way, and for a
client that starts again and makes all its steps of a version once more."""
RETRY_AFTER_S = 0.1

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Group(NamedTuple):
    """Steps that are merged: those of one version with the same k."""

    run: RunId
    version: Version
    k: int


def group_of(cid: Cid) -> Group:
    """The group that a step belongs to."""
    step = parse_cid(cid)
    return Group(step.run, step.version, step.k)


class Places:
    """What waits to be merged, in all and of each shard: those that come to nothing leave places to others.

    Half of the room is kept for shards in equal parts, and of the other half none has more than a half.
    """

    def __init__(self, most_bytes: int, steps: int, shards: int) -> None:
        """`steps`: those of one shard that are merged at one version."""
        self._most_bytes, self._most, self._shards = most_bytes, MAX_COPIES * steps, shards
        self._share = most_bytes // 2 // shards
        self._waiting, self._bytes = Counter[int](), Counter[int]()
        """By shard."""

    @contextmanager
    def taken(self, shard: int, size_bytes: int) -> Generator[None, None, None]:
        """For as long as it waits; Busy where there is no room for it."""
        mine = self._bytes[shard] + size_bytes
        if self._bytes.total() and mine > self._share and mine > self._room(shard):
            raise Busy(
                f"{self._bytes.total()} bytes of merged batches wait here, {self._bytes[shard]} of them of shard "
                f"{shard}, no room for more",
                RETRY_AFTER_S,
            )
        if self._waiting[shard] >= self._most:
            raise Busy(f"{self._most} requests of shard {shard} wait here already", RETRY_AFTER_S)
        self._bytes[shard] += size_bytes
        self._waiting[shard] += 1
        try:
            yield
        finally:
            self._bytes[shard] -= size_bytes
            self._waiting[shard] -= 1
            if not self._waiting[shard]:
                del self._bytes[shard], self._waiting[shard]

    def _room(self, shard: int) -> int:
        """What a shard may have here at most: of what others use and have kept for them it gets nothing."""
        others = [max(held, self._share) for other, held in self._bytes.items() if other != shard]
        kept = sum(others) + (self._shards - 1 - len(others)) * self._share
        return min(self._most_bytes - kept, self._share + self._most_bytes // 4)


class Misfit(Exception):
    """Some items do not go together with the others: it is for them to mend."""

    def __init__(self, cids: Collection[Cid], said: str) -> None:
        super().__init__(said)
        self.cids = frozenset(cids)


@dataclass(slots=True)
class _Meeting(Generic[_Item, _Result]):
    size: int
    results: asyncio.Future[Mapping[Cid, _Result]]
    items: dict[Cid, _Item] = field(default_factory=dict[Cid, _Item])
    waiting: Counter[Cid] = field(default_factory=Counter[Cid])
    """How many requests wait for each step: a copy of a request joins it."""

    @property
    def is_whole(self) -> bool:
        return len(self.items) == self.size


class Meetings(Generic[_Item, _Result]):
    """Brings the items of a group together, has them worked on once, and gives everybody its own result."""

    def __init__(self, work: Callable[[Mapping[Cid, _Item]], Awaitable[Mapping[Cid, _Result]]]) -> None:
        """`work` is given the items of a whole group in cid order."""
        self._work = work
        self._meetings: dict[Group, _Meeting[_Item, _Result]] = {}
        self._results: OrderedDict[tuple[RunId, Version], dict[Cid, _Result]] = OrderedDict()
        self._working: set[asyncio.Task[None]] = set()
        self._draining = False

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing is worked on."""
        return not self._meetings

    def drain(self) -> None:
        """Begin no version from now on; what was begun may be finished."""
        self._draining = True

    def here(self, run: RunId, version: Version) -> tuple[Cid, ...]:
        """The steps of a version that wait for the others of their group: of that where most do, so that nobody hides
        in one of its own. May be called from any thread.
        """
        waiting = [one for group, one in list(self._meetings.items()) if group[:2] == (run, version)]
        return max((tuple(one.items) for one in waiting if not one.is_whole), key=len, default=())

    async def attend(self, cid: Cid, size: int, item: _Item) -> _Result:
        """The result for this step, once `size` steps of its group are there; an error of the work is everybody's.

        That it is a `Misfit` only those hear whose step does not fit: the others wait on, for a better one. Cancelled
        before the group is whole, it takes its item along; the others go on waiting.
        """
        group = group_of(cid)
        if cid in (known := self._results.get(group[:2], {})):
            return known[cid]
        meeting = self._meetings.get(group) or self._open(group, size)
        if meeting.size != size or (meeting.is_whole and cid not in meeting.items):
            # One that is wrong ends no other: it may be gone, or have heard of the next window, at the next try.
            raise Unavailable(
                f"{cid} is to be merged with {size} steps, but {len(meeting.items)} of {meeting.size} are there "
                "and it is none of them: do all clients follow the same aggregator?"
            )
        if meeting.waiting[cid] >= MAX_COPIES:
            raise Busy(f"{MAX_COPIES} requests wait for {cid} already", RETRY_AFTER_S)
        if not meeting.is_whole:
            meeting.items[cid] = item
            if meeting.is_whole:
                self._start(group, meeting)
        meeting.waiting[cid] += 1
        try:
            while True:
                await asyncio.wait([results := meeting.results])
                try:
                    return results.result()[cid]
                except Misfit as misfit:
                    if cid in misfit.cids:
                        raise Rejected(str(misfit)) from None
        finally:
            self._leave(group, meeting, cid)

    def _open(self, group: Group, size: int) -> _Meeting[_Item, _Result]:
        if size > MAX_SIZE:
            raise Rejected(
                f"a batch of {size} steps is to be merged, {MAX_SIZE} is the most: "
                "use fewer shards or another batch_norm"
            )
        if self._draining and group[:2] not in self._results:
            raise Busy("this split server is leaving; the next one will be asked to merge", RETRY_AFTER_S)
        if len(self._meetings) >= MAX_MEETINGS:
            raise Busy(f"{MAX_MEETINGS} merged batches are under way, no room for another", RETRY_AFTER_S)
        meeting = _Meeting[_Item, _Result](size, asyncio.get_running_loop().create_future())
        self._meetings[group] = meeting
        return meeting

    def _leave(self, group: Group, meeting: _Meeting[_Item, _Result], cid: Cid) -> None:
        meeting.waiting[cid] -= 1
        if meeting.is_whole or meeting.waiting[cid]:
            return
        meeting.items.pop(cid, None)
        self._end_if_empty(group, meeting)

    def _end_if_empty(self, group: Group, meeting: _Meeting[_Item, _Result]) -> None:
        if not meeting.items and self._meetings.get(group) is meeting:
            del self._meetings[group]

    def _start(self, group: Group, meeting: _Meeting[_Item, _Result]) -> None:
        """In a task of its own, as any of those who wait may give up."""
        task = asyncio.create_task(self._hold(group, meeting), name=f"merge {group}")
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _hold(self, group: Group, meeting: _Meeting[_Item, _Result]) -> None:
        try:
            results = await self._work({cid: meeting.items[cid] for cid in sorted(meeting.items)})
        except Misfit as misfit:
            was, meeting.results = meeting.results, asyncio.get_running_loop().create_future()
            fit = meeting.items.keys() - misfit.cids
            meeting.items = {cid: item for cid, item in meeting.items.items() if cid in fit and meeting.waiting[cid]}
            was.set_exception(misfit)
            was.exception()
            return self._end_if_empty(group, meeting)
        except Exception as error:
            meeting.results.set_exception(error)
            meeting.results.exception()  # whoever waits gets it; nobody waiting is no fault
        else:
            self._results.setdefault(group[:2], {}).update(results)
            self._results.move_to_end(group[:2])
            while len(self._results) > KEPT_VERSIONS:
                self._results.popitem(last=False)
            meeting.results.set_result(results)
        del self._meetings[group]
