"""Leases: whatever happens to voters and candidates, nobody leads beside another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from zsfl.ids import Version
from zsfl.lease import BEHIND_LEASES, MARGIN, MAX_LEASE_S, Candidate, Lease, Promise, most_of
from zsfl.wire.succession import Granted

LEASE_S = 2.0
SHARDS, CANDIDATES = 5, 3


def candidate(holder: str, epoch: int, version: int = 0, known: int = 0) -> Candidate:
    return Candidate(holder=holder, name=holder, epoch=epoch, known=known, version=version)


class Aggregating:
    """Somebody who leads or would: what it asks for, and the promises that it holds."""

    def __init__(self, holder: str, shards: int = SHARDS) -> None:
        self.holder, self.epoch, self.lease = holder, 1, Lease(shards)


class OneLeads(RuleBasedStateMachine):
    """Requests and answers are lost, come late, and voters and candidates are killed and start again, at any moment."""

    promise: Callable[[float], Promise] = staticmethod(lambda now_s: Promise(now_s, LEASE_S))

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.voters = [self.promise(0.0) for _ in range(SHARDS)]
        self.all = [Aggregating(f"holder-{number}") for number in range(CANDIDATES)]
        self.answers: list[tuple[Aggregating, int, float]] = []
        """On their way: to whom, of which shard, and when it was asked."""

    @rule(seconds=st.floats(0.05, 1.5))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(who=st.integers(0, CANDIDATES - 1), shards=st.sets(st.integers(0, SHARDS - 1)), late=st.booleans())
    def ask(self, who: int, shards: set[int], late: bool) -> None:
        one = self.all[who]
        for shard in shards:
            if not self.voters[shard].ask(candidate(one.holder, one.epoch), LEASE_S, self.now_s):
                if late:
                    self.answers.append((one, shard, self.now_s))
                else:
                    one.lease.promised([shard], self.now_s, LEASE_S)

    @rule()
    def answers_come(self) -> None:
        for one, shard, asked_s in self.answers:
            one.lease.promised([shard], asked_s, LEASE_S)
        self.answers.clear()

    @rule(who=st.integers(0, CANDIDATES - 1), by=st.integers(1, 2))
    def stand_in_a_later_epoch(self, who: int, by: int) -> None:
        one = self.all[who]
        one.epoch, one.lease = one.epoch + by, Lease(SHARDS)
        self.answers = [answer for answer in self.answers if answer[0] is not one]

    @rule(shard=st.integers(0, SHARDS - 1))
    def voter_starts_again(self, shard: int) -> None:
        self.voters[shard] = self.promise(self.now_s)

    @rule(who=st.integers(0, CANDIDATES - 1))
    def candidate_starts_again(self, who: int) -> None:
        self.all[who].lease = Lease(SHARDS)
        self.answers = [answer for answer in self.answers if answer[0] is not self.all[who]]

    @invariant()
    def at_most_one_leads(self) -> None:
        assert sum(one.lease.is_held(self.now_s) for one in self.all) <= 1


class OneLies(RuleBasedStateMachine):
    """All as above, through `answered`, but one client says what it likes: promises to everybody, and epochs that never
    were. Of an even number of shards two majorities have two in common, so that it alone cannot belong to both."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s, self.shards = 100.0, 6
        self.voters = [Promise(0.0, LEASE_S) for _ in range(self.shards - 1)]
        self.all = [Aggregating(f"holder-{number}", self.shards) for number in range(CANDIDATES)]

    @rule(seconds=st.floats(0.05, 1.5))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(
        who=st.integers(0, CANDIDATES - 1),
        shards=st.sets(st.integers(0, 4)),
        lie=st.tuples(st.booleans(), st.floats(0.0, 1000.0), st.integers(0, 1 << 53)),
    )
    def ask(self, who: int, shards: set[int], lie: tuple[bool, float, int]) -> None:
        one, answers = self.all[who], list[Granted]()
        for shard in shards:
            refused = self.voters[shard].ask(candidate(one.holder, one.epoch), LEASE_S, self.now_s)
            answers.append(said(shard, refused=refused, epoch=self.voters[shard].epoch))
        answers.append(said(5, refused="no" if lie[0] else "", lease_s=lie[1], epoch=lie[2]))
        one.lease.answered(answers, self.now_s)
        honest = max((voter.epoch for voter in self.voters), default=0)
        later = one.lease.next_epoch(one.epoch)
        assert later <= max(honest, one.epoch) + 1, "it alone names no epoch"
        assert not (one.lease.is_held(self.now_s) and one.lease.is_succeeded(one.epoch, 0.0, self.now_s))
        if later > one.epoch:
            one.epoch, one.lease = later, Lease(self.shards)

    @rule(shard=st.integers(0, 4))
    def voter_starts_again(self, shard: int) -> None:
        self.voters[shard] = Promise(self.now_s, LEASE_S)

    @rule(who=st.integers(0, CANDIDATES - 1))
    def candidate_starts_again(self, who: int) -> None:
        self.all[who].lease = Lease(self.shards)

    @invariant()
    def at_most_one_leads(self) -> None:
        assert sum(one.lease.is_held(self.now_s) for one in self.all) <= 1


class Forgetful(OneLeads):
    """Broken on purpose: who starts again believes that it promised nothing."""

    promise = staticmethod(lambda _: Promise(-LEASE_S, LEASE_S))


class _Unfenced(Promise):
    def ask(self, by: Candidate, lease_s: float, now_s: float) -> str:
        self._until_s = now_s
        return super().ask(by, lease_s, now_s)


class Unfenced(OneLeads):
    """Broken on purpose: a later epoch does not wait for the promise to run out."""

    promise = staticmethod(lambda now_s: _Unfenced(now_s, LEASE_S))


RUNS = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_nobody_leads_beside_another() -> None:
    run_state_machine_as_test(OneLeads, settings=RUNS)


def test_nobody_leads_beside_another_where_a_client_lies() -> None:
    run_state_machine_as_test(OneLies, settings=RUNS)


@given(
    honest=st.integers(1, 8),
    lies=st.lists(st.tuples(st.booleans(), st.floats(0.0, 1000.0), st.integers(0, 1 << 53)), max_size=7),
    epoch=st.integers(1, 5),
    is_late=st.booleans(),
)
def test_fewer_clients_that_lie_than_others_keep_nobody_from_leading(
    honest: int, lies: list[tuple[bool, float, int]], epoch: int, is_late: bool
) -> None:
    lies = lies[: honest - 1]
    shards = honest + len(lies)
    lease = Lease(shards)
    voters = [Promise(0.0, LEASE_S) for _ in range(honest)]
    answers = [said(shard, refused=one.ask(candidate("a", epoch), LEASE_S, 10.0)) for shard, one in enumerate(voters)]
    others = [
        said(honest + number, refused="no" if refuses else "", lease_s=lease_s, epoch=known)
        for number, (refuses, lease_s, known) in enumerate(lies)
    ]
    if is_late:
        lease.answered(others, 10.0)
        lease.answered(answers, 10.0)
    else:
        lease.answered([*answers, *others], 10.0)
    for alone in (False, True):
        assert not lease.is_succeeded(epoch, 0.0, 10.1, alone=alone)
    assert lease.is_held(10.1)
    assert lease.lasts_s(10.0) >= 0.99 * MARGIN * LEASE_S
    assert not lease.is_contested(10.0, 10.1)
    assert lease.next_epoch(epoch) <= epoch + 1


def test_that_another_leads_is_for_most_to_say() -> None:
    lease = Lease(5)
    lease.answered([said(0), said(1, 2, refused="epoch 9 has begun", epoch=9)], 0.0)
    assert not lease.is_succeeded(1, 0.0, 0.1), "two of five may lie, and who holds the others be late"
    assert lease.is_succeeded(1, 0.0, 0.1, alone=True), "with nobody's consent half of those who answer are enough"
    assert lease.next_epoch(1) == 2
    lease.answered([said(3, refused="epoch 3 has begun", epoch=3)], 0.1)
    assert lease.is_succeeded(1, 0.0, 0.2)
    assert not lease.is_succeeded(3, 0.0, 0.2)
    assert not lease.is_succeeded(1, 0.1, 0.2), "that was said before"
    assert not lease.is_succeeded(1, 0.2, 0.2, alone=True)
    lease.answered([said(3), said(4)], 0.2)
    assert not lease.is_succeeded(1, 0.0, 0.3), "most have promised all the same"
    refused = said(3, 4, refused="epoch 3 has begun", epoch=3)
    lease.answered([refused], 0.3)
    assert (lease.next_epoch(1), lease.next_epoch(9), lease.next_epoch(10)) == (4, 10, 10)


def test_a_refusal_counts_beside_a_promise_of_the_same_shard_that_comes_later() -> None:
    lease = Lease(1)
    lease.answered([said(0, refused="promised to another")], 0.0)
    lease.answered([said(0)], 0.0)
    assert not lease.is_held(0.0)
    lease.answered([said(0)], 0.1)
    assert lease.is_held(0.1)


@pytest.mark.parametrize("broken", [Forgetful, Unfenced])
def test_what_is_broken_is_found(broken: type[OneLeads]) -> None:
    found = settings(  # the first one that is found is enough, however long
        RUNS, max_examples=2_000, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(broken, settings=found)


def test_a_promise_runs_out_sooner_for_its_holder_than_for_who_gave_it() -> None:
    voter, lease = Promise(0.0, LEASE_S), Lease(1)
    assert voter.ask(candidate("a", 1), LEASE_S, 10.0) == ""
    lease.promised([0], 10.0, LEASE_S)
    assert lease.is_held(10.0 + MARGIN * LEASE_S - 0.01)
    assert not lease.is_held(10.0 + MARGIN * LEASE_S)
    assert "s are promised to a" in voter.ask(candidate("b", 2), LEASE_S, 10.0 + LEASE_S - 0.01)
    assert voter.ask(candidate("b", 2), LEASE_S, 10.0 + LEASE_S) == ""
    assert voter.ask(candidate("a", 1), LEASE_S, 20.0) == "epoch 2 has begun"
    assert "epoch 2 has begun" in voter.ask(candidate("c", 2), LEASE_S, 20.0)


def test_its_holder_may_go_on_after_a_restart_at_once_and_in_a_later_epoch() -> None:
    voter = Promise(0.0, LEASE_S)
    for epoch in (1, 1, 2):
        assert voter.ask(candidate("a", epoch), LEASE_S, 10.0) == ""


def test_a_voter_that_has_just_started_promises_nothing_yet() -> None:
    voter = Promise(10.0, LEASE_S)
    assert "before a restart" in voter.ask(candidate("a", 1), LEASE_S, 11.0)
    assert voter.ask(candidate("a", 1), LEASE_S, 12.0) == ""


def test_a_voter_that_has_just_started_lets_nobody_else_lead_in_an_epoch_that_it_has_heard_of() -> None:
    voter = Promise(10.0, LEASE_S)
    voter.heard_of(2, 7)
    for now_s in (20.0, 20.0 + BEHIND_LEASES * LEASE_S):
        assert voter.ask(candidate("b", 2, version=7, known=1), LEASE_S, now_s) == "epoch 2 has begun"
    assert voter.ask(candidate("a", 2, version=7, known=2), LEASE_S, 40.0) == ""


def test_nobody_relies_on_a_longer_promise_than_is_given() -> None:
    voter, lease = Promise(0.0, LEASE_S), Lease(1)
    assert voter.ask(candidate("a", 1), 10 * MAX_LEASE_S, 10.0) == ""
    lease.promised([0], 10.0, 10 * MAX_LEASE_S)
    assert voter.ask(candidate("b", 2), LEASE_S, 10.0 + MAX_LEASE_S) == ""
    assert not lease.is_held(10.0 + MAX_LEASE_S)


def test_who_lacks_versions_is_passed_over_for_a_while() -> None:
    voter = Promise(0.0, LEASE_S)
    voter.heard_of(1, 7)
    behind, up_to_date = candidate("a", 2, version=6, known=1), candidate("b", 2, version=7, known=1)
    assert voter.ask(behind, LEASE_S, 10.0) == "version 7 of epoch 1 is there, and a has 6 of 1"
    assert voter.ask(up_to_date, LEASE_S, 10.1) == ""
    other = Promise(0.0, LEASE_S)
    other.heard_of(1, 7)
    assert other.ask(behind, LEASE_S, 10.0)
    assert other.ask(behind, LEASE_S, 10.0 + BEHIND_LEASES * LEASE_S) == ""
    assert other.newest == (1, 6)


def test_after_all_have_started_again_the_later_history_goes_on() -> None:
    voter = Promise(10.0, LEASE_S)
    longer, later = candidate("a", 1, version=9, known=1), candidate("b", 2, version=8, known=2)
    assert "before a restart" in voter.ask(longer, LEASE_S, 10.1)
    assert "before a restart" in voter.ask(later, LEASE_S, 10.2)
    assert "version 8 of epoch 2 is there" in voter.ask(longer, LEASE_S, 10.0 + LEASE_S)
    assert voter.ask(later, LEASE_S, 10.1 + LEASE_S) == ""


def test_what_was_said_in_an_earlier_epoch_is_not_taken_in() -> None:
    voter = Promise(0.0, LEASE_S)
    voter.heard_of(2, 5)
    voter.heard_of(1, 9)
    assert (voter.epoch, voter.newest) == (2, (2, 5))


def said(*shards: int, refused: str = "", lease_s: float = LEASE_S, epoch: int = 1) -> Granted:
    return Granted(shards=shards, refused=refused, lease_s=lease_s, epoch=epoch, newest=(0, Version(0)))


def test_a_shard_that_two_processes_hold_has_one_voice() -> None:
    lease = Lease(3)
    lease.answered([said(0), said(1), said(1)], 0.0)
    assert lease.held_of(0.0) == 2
    lease.answered([said(0), said(1), said(1, refused="promised to another")], 0.1)
    assert lease.held_of(0.1) == 1, "what the one promises, the other may have promised to somebody else"
    lease.answered([said(1)], 0.2)
    assert lease.held_of(0.2) == 2


class Twins(OneLeads):
    """Every shard is held by two processes; whoever asks hears both."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [self.promise(0.0) for _ in range(SHARDS)]

    @rule(who=st.integers(0, CANDIDATES - 1), shards=st.sets(st.integers(0, SHARDS - 1)), late=st.booleans())
    def ask(self, who: int, shards: set[int], late: bool) -> None:
        one = self.all[who]
        answers = [
            said(shard, refused=voter.ask(candidate(one.holder, one.epoch), LEASE_S, self.now_s))
            for shard in shards
            for voter in (self.voters[shard], self.others[shard])
        ]
        one.lease.answered(answers, self.now_s)

    @rule(shard=st.integers(0, SHARDS - 1))
    def other_voter_starts_again(self, shard: int) -> None:
        self.others[shard] = self.promise(self.now_s)


def test_nobody_leads_beside_another_where_shards_are_held_twice() -> None:
    run_state_machine_as_test(Twins, settings=settings(RUNS, max_examples=100))


@pytest.mark.parametrize(("shards", "most"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_most_is_more_than_half(shards: int, most: int) -> None:
    assert most_of(shards) == most
    lease = Lease(shards)
    lease.promised(range(most - 1), 0.0, LEASE_S)
    lease.promised([shards, -1], 0.0, LEASE_S)  # no shard of this job
    assert not lease.is_held(0.0)
    lease.promised(range(most), 0.0, LEASE_S)
    assert lease.is_held(0.0)


def test_nobody_who_knows_where_a_run_stands_promises_an_epoch_after_which_there_is_none() -> None:
    promise = Promise(0.0, LEASE_S)
    assert not promise.ask(candidate("leader", 3), LEASE_S, 10.0)
    for holder in ("leader", "standby"):
        assert "is too far from 3" in promise.ask(candidate(holder, 1 << 53), LEASE_S, 20.0)
    assert not promise.ask(candidate("leader", 3), LEASE_S, 20.0)
    promise.heard_of(100, 7)  # by whoever leads: this client was away for long
    assert not promise.ask(candidate("leader", 100, 7, 100), LEASE_S, 30.0)
