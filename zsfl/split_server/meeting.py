"""Requests that are computed together wait here for one another: no sockets, no clock, no computing of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from zsfl.errors import Busy, RemoteProtocolError
from zsfl.ids import Cid, RunId, Version, parse_cid

MAX_MEETINGS = 64
"""Meetings that are not complete; more are refused."""
KEPT_RESULTS = 4
"""Meetings whose results are kept, for those whose answer was lost on its way and who ask again."""

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


@dataclass(slots=True)
class _Meeting(Generic[_Item, _Result]):
    size: int
    items: dict[Cid, _Item] = field(default_factory=dict[Cid, _Item])
    waiting: dict[Cid, list[asyncio.Future[_Result]]] = field(default_factory=dict)


class Meetings(Generic[_Item, _Result]):
    """Brings the items of a group together, has them worked on once, and gives everybody its own result."""

    def __init__(self, work: Callable[[Mapping[Cid, _Item]], Awaitable[Mapping[Cid, _Result]]]) -> None:
        """`work` is given the items of a whole group in cid order."""
        self._work = work
        self._meetings: dict[Group, _Meeting[_Item, _Result]] = {}
        self._results: OrderedDict[Group, Mapping[Cid, _Result]] = OrderedDict()
        self._working: set[asyncio.Task[None]] = set()

    async def attend(self, cid: Cid, size: int, item: _Item) -> _Result:
        """The result for this step, once `size` steps of its group are there; an error of the work is everybody's."""
        group = group_of(cid)
        if group in self._results and cid in self._results[group]:
            return self._results[group][cid]
        meeting = self._meetings.get(group)
        if meeting is None:
            if len(self._meetings) >= MAX_MEETINGS:
                self._drop_oldest()
            meeting = self._meetings[group] = _Meeting(size)
        if meeting.size != size:
            raise RemoteProtocolError(
                f"{cid} is to be merged with {size} steps, others of its version with {meeting.size}"
            )
        meeting.items[cid] = item
        result: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        meeting.waiting.setdefault(cid, []).append(result)
        if len(meeting.items) == size:
            del self._meetings[group]
            task = asyncio.create_task(self._hold(group, meeting), name=f"merge {group}")
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        try:
            return await result
        finally:
            self._leave(meeting, cid, result)

    def _leave(self, meeting: _Meeting[_Item, _Result], cid: Cid, result: asyncio.Future[_Result]) -> None:
        """Whoever gave up before the meeting was complete takes its item along."""
        meeting.waiting[cid].remove(result)
        if not meeting.waiting[cid] and len(meeting.items) < meeting.size:
            del meeting.items[cid], meeting.waiting[cid]

    def _drop_oldest(self) -> None:
        """Versions that nobody completes any more make room."""
        oldest = next(iter(self._meetings))
        for futures in self._meetings.pop(oldest).waiting.values():
            for future in futures:
                future.set_exception(Busy("too many merged batches are under way; ask again", retry_after_s=0.1))

    async def _hold(self, group: Group, meeting: _Meeting[_Item, _Result]) -> None:
        try:
            results = await self._work({cid: meeting.items[cid] for cid in sorted(meeting.items)})
        except Exception as error:
            for future in (future for futures in meeting.waiting.values() for future in futures):
                if not future.done():
                    future.set_exception(error)
            return
        self._results[group] = results
        while len(self._results) > KEPT_RESULTS:
            self._results.popitem(last=False)
        for cid, futures in meeting.waiting.items():
            for future in futures:
                if not future.done():
                    future.set_result(results[cid])
