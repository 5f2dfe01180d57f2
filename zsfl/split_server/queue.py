"""The requests that wait for the body, and the server's one turn after another at them.

First those that end what was begun here: clients have their gradients soonest so, few graphs wait, and none for so long
that it is forgotten and has to be made again. The others go in the order in which they came; test batches wait for
themselves, for a part of the time that is theirs (`trying.py`).

The socket is emptied between two turns, so that what waits is here and not there: it is known how much it is, what is
too much is refused at once, and steps that wait together can go through the body together.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from zsfl.errors import BadShape, Unavailable, ZsflError
from zsfl.ids import Cid, Version, parse_cid
from zsfl.learning.cuts import Cuts
from zsfl.learning.part import PartWeights
from zsfl.split_server.admission import Admission
from zsfl.split_server.merging import MOST_MERGED, MOST_MERGED_BYTES
from zsfl.tensors.codec import unpacked_bytes
from zsfl.weights.follower import WeightsFollower
from zsfl.wire.framing import Buffer, nbytes
from zsfl.wire.messages import Backward, Forward, Infer, Reply, Step

Weights = Mapping[str, PartWeights]
"""Of one version, by cut."""
Asked = Forward | Backward | Step | Infer
Answer = tuple[Reply, Sequence[Buffer]]


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request, and the future that its answer is put in."""

    request: Asked
    parts: Sequence[Buffer]
    cut: str
    answer: asyncio.Future[Answer]
    size_bytes: int
    """Of its tensors, once they are unpacked."""
    alike: tuple[object, ...] | None
    """What it has in common with those that it may be merged with; None where it goes alone."""
    came_s: float
    """By `time.perf_counter`."""
    peer: str = ""
    """Of a test batch: by whom it is asked for."""

    @property
    def version(self) -> Version:
        """Of the weights that it is made with."""
        return self.request.version

    @property
    def is_test(self) -> bool:
        """Whether nothing is to be learnt from it."""
        return isinstance(self.request, Infer)

    @property
    def needs_weights(self) -> bool:
        """Whether what is remembered of a forward is not enough."""
        return not isinstance(self.request, Backward) or self.request.input is not None


Work = Callable[[Sequence[Waiting], PartWeights | None], list[Answer | ZsflError]]


class WorkQueue:
    """Takes requests, as many as are admitted, and has them worked on."""

    def __init__(
        self,
        cuts: Cuts,
        weights: WeightsFollower[Weights],
        admission: Admission,
        work: Work,
        *,
        may_merge: Callable[[str], bool],
        pays: Callable[[str, int], bool],
        went_with: Callable[[str, Cid], Collection[Cid]] = lambda *_: (),
        left: Callable[[], None],
        placing: Callable[[], asyncio.Future[None] | None] = lambda: None,
        is_behind: Callable[[], asyncio.Future[None] | None] = lambda: None,
        same_k: bool,
    ) -> None:
        """`work` does one turn. `placing` gives what its answers wait for, and `is_behind` what the next one does.

        `may_merge` says of a cut whether its requests may be taken together, `pays` of a kind of request whether so
        many of them had better be, `went_with` of a cut and a step which steps went forward with it and wait here for
        their backwards, which a server that leaves still takes. `left` is called whenever a request has come to its
        end. With `same_k` only steps of one k are merged.
        """
        self._cuts = cuts
        self._weights = weights
        self._admission = admission
        self._work = work
        self._may_merge = may_merge
        self._pays = pays
        self._went_with = went_with
        self._ended = left
        self._placing = placing
        self._is_behind = is_behind
        self._same_k = same_k
        self._waiting: dict[Waiting, None] = {}
        """In the order in which they came."""
        self._ending: dict[Cid, Waiting] = {}
        """Backwards that lack some of those that went forward with them."""
        self._whole: deque[list[Waiting]] = deque()
        """Backwards of passes all of whose steps are here."""
        self._alone: dict[Waiting, None] = {}
        """Those that failed in company, and go first: whose fault it was is seen when each goes by itself."""
        self._late: set[asyncio.Task[None]] = set()
        self._turn_is_due = False
        self._trying: dict[Waiting, None] = {}
        """Test batches."""
        self._test_is_due: asyncio.TimerHandle | None = None

    def put(self, request: Asked, parts: Sequence[Buffer], peer: str = "") -> asyncio.Future[Answer]:
        """What comes of the request; raises what it is refused with. Cancelling it takes it back.

        `peer`: who has something tested.
        """
        shard = request.shard if isinstance(request, Infer) else parse_cid(request.cid).shard
        size_bytes = unpacked_size(request, parts)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        cut = self._cuts.of(shard)
        waiting = Waiting(
            request, parts, cut, answer, size_bytes, _alike(request, cut, self._same_k), time.perf_counter(), peer
        )
        is_ready = not waiting.needs_weights or self._weights.held(waiting.version) is not None
        # Last of all that may be refused: from here on the answer gives it back.
        if isinstance(request, Infer):
            self._admission.enter_test(peer, size_bytes)
        else:
            self._admission.enter(size_bytes, is_begun=bool(self._pass_of(waiting)))
        answer.add_done_callback(lambda _: self._left(waiting))
        if is_ready:
            self._enqueue(waiting)
        else:
            late = asyncio.ensure_future(self._await_weights(waiting))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        return answer

    def _left(self, waiting: Waiting) -> None:
        self._take_out(waiting)
        if waiting.is_test:
            self._admission.tests.leave(waiting.peer, waiting.size_bytes)
        else:
            self._admission.leave(waiting.size_bytes)
        self._ended()

    async def _await_weights(self, waiting: Waiting) -> None:
        try:
            await self._weights.get(waiting.version)
        except Exception as error:
            if not waiting.answer.done():
                waiting.answer.set_exception(error)
                waiting.answer.exception()  # whoever waits gets it; nobody waiting is no fault
        else:
            self._enqueue(waiting)

    def _enqueue(self, waiting: Waiting) -> None:
        if waiting.is_test:
            self._trying[waiting] = None
            return self._call_for_turn()
        self._admission.tests.stepped()
        self._waiting[waiting] = None
        steps = self._pass_of(waiting)
        if steps and (cid := _cid(waiting)) not in self._ending:
            self._ending[cid] = waiting
            if self._ending.keys() >= set(steps):
                self._whole.append([self._ending.pop(step) for step in steps])
        self._call_for_turn()

    def _take_out(self, waiting: Waiting) -> None:
        """It waits no more."""
        self._alone.pop(waiting, None)
        self._trying.pop(waiting, None)
        if waiting in self._waiting:
            del self._waiting[waiting]
            if isinstance(waiting.request, Backward) and self._ending.get(_cid(waiting)) is waiting:
                del self._ending[_cid(waiting)]

    def _call_for_turn(self) -> None:
        if self._turn_is_due or not (self._waiting or self._alone or self._trying):
            return
        loop, due_s = asyncio.get_running_loop(), self._admission.tests.due_s
        if self._test_is_due is not None:
            self._test_is_due.cancel()
            self._test_is_due = None
        if self._waiting or self._alone or due_s <= loop.time():
            self._turn_is_due = True
            # Not in the next round of the loop: answers of the turn before leave first, and what has arrived is read.
            loop.call_soon(loop.call_soon, self._turn)
        else:
            self._test_is_due = loop.call_at(due_s, self._call_for_turn)

    def _turn(self) -> None:
        """Work on what was begun here, else on what waits longest, and on what can go along with it."""
        self._turn_is_due = False
        if (behind := self._is_behind()) is not None:
            behind.add_done_callback(lambda _: self._call_for_turn())
            return
        chosen, start_s = self._chosen(), asyncio.get_running_loop().time()
        if not chosen:
            return self._call_for_turn()
        try:
            weights = self._weights.held(chosen[0].version) if chosen[0].needs_weights else None
            if weights is None and chosen[0].needs_weights:  # they went while it waited
                raise Unavailable(f"version {chosen[0].version} is not held any more; ask once more")
            answers = self._work(chosen, None if weights is None else weights[chosen[0].cut])
        except Exception as error:
            if len(chosen) > 1:
                self._alone.update(dict.fromkeys(chosen))
            elif not chosen[0].answer.done():
                _let_go(error)
                chosen[0].answer.set_exception(error)
        else:
            if (placing := self._placing()) is None:
                _give(chosen, answers)
            else:
                placing.add_done_callback(lambda placed: _give(chosen, answers, placed))
        if chosen[0].is_test:
            now_s = asyncio.get_running_loop().time()
            self._admission.tests.ended(chosen[0].peer, now_s - start_s, now_s)
        self._call_for_turn()

    def _chosen(self) -> list[Waiting]:
        """What is worked on next; it waits no more."""
        for alone in list(self._alone):
            self._take_out(alone)
            if not alone.answer.done():
                return [alone]
        tests = self._admission.tests
        if tests.due_s <= asyncio.get_running_loop().time() and (
            trying := [one for one in self._trying if not one.answer.done()]
        ):
            self._take_out(chosen := tests.begun(trying))
            return [chosen]
        while self._whole and not any(map(self._is_waiting, self._whole[0])):
            self._whole.popleft()
        among = itertools.chain.from_iterable(self._whole) if self._whole else self._waiting
        chosen = self._together(filter(self._is_waiting, among))
        for one in chosen:
            self._take_out(one)
        return chosen

    def _is_waiting(self, one: Waiting) -> bool:
        return one in self._waiting and not one.answer.done()

    def _pass_of(self, waiting: Waiting) -> Collection[Cid]:
        """The steps that went forward together with the one that this backward ends, while their graph is here."""
        request = waiting.request
        return self._went_with(waiting.cut, request.cid) if isinstance(request, Backward) else ()

    def _together(self, among: Iterator[Waiting]) -> list[Waiting]:
        """The first, and what goes through the body with it: all that can where that pays, else what it came with."""
        if (first := next(among, None)) is None:
            return []
        if first.alike is None or not self._may_merge(first.cut):
            return [first]
        room, found, cids = MOST_MERGED_BYTES, list[Waiting](), set[str]()
        for one in itertools.chain([first], among):
            if one.alike == first.alike and (cid := _cid(one)) not in cids:  # a second copy goes by itself
                room -= one.size_bytes
                if found and (room < 0 or len(found) == MOST_MERGED):
                    break
                cids.add(cid)
                found.append(one)
        if self._pays(type(first.request).__name__, len(found)):
            return found
        mates = {_cid(first), *self._pass_of(first)}
        return [one for one in found if _cid(one) in mates]


def _give(
    chosen: Sequence[Waiting], answers: Sequence[Answer | ZsflError], placed: asyncio.Future[None] | None = None
) -> None:
    """Answer a turn; where what it spilled could not be `placed`, with that instead."""
    if placed is not None and placed.cancelled():  # the node ends: nobody knows whether it is in place
        return
    failed = None if placed is None else placed.exception()
    for one, answer in zip(chosen, answers, strict=True):
        if one.answer.done():
            continue
        if failed is not None or isinstance(answer, ZsflError):
            one.answer.set_exception(failed or cast(ZsflError, answer))
        else:
            one.answer.set_result(answer)


def _let_go(error: BaseException) -> None:
    """Forget where it was raised: those frames hold the request's tensors, and the answer with the error holds them."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__


def unpacked_size(request: Asked, parts: Sequence[Buffer]) -> int:
    """Bytes that the tensors of a request take once they are unpacked; BadShape unless its parts are what it says."""
    specs = [request.grad] if isinstance(request, Backward) else [request.input]
    if isinstance(request, Step):
        specs.append(request.target)
    elif isinstance(request, Backward) and request.input is not None:
        specs.append(request.input)
    if len(parts) != len(specs):
        raise BadShape(f"{len(specs)} tensors belong to this request, {len(parts)} came with it")
    return sum(unpacked_bytes(spec, nbytes(part)) for spec, part in zip(specs, parts, strict=True))


def _cid(waiting: Waiting) -> Cid:
    assert not isinstance(waiting.request, Infer)  # noqa: S101  # for the type alone
    return waiting.request.cid


def _alike(request: Asked, cut: str, same_k: bool) -> tuple[object, ...] | None:
    match request:
        case Forward():
            spec, again = request.input, False
        case Step():
            spec, again = request.input, request.again
        case Backward() if request.input is None:
            spec, again = request.grad, request.again
        case _:
            return None
    if again:
        return None
    k = parse_cid(request.cid).k if same_k else 0
    return type(request), request.version, cut, spec.dtype, spec.shape[1:], k
