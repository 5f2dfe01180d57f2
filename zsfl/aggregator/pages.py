"""What `zsfl audit` prints."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from zsfl.aggregator.audit import Audit, audit, replay_versions
from zsfl.aggregator.audit_store import look_in_store
from zsfl.errors import ConfigError
from zsfl.learning.job import Job, load_job
from zsfl.ranges import shards_named
from zsfl.words import number_of

MOST_FAULTS = 20
"""Printed; the rest is counted."""


def print_audit(folder: Path, versions: str | None, job: Path | None) -> int:
    """Audit a run's folder, and make versions such as `12..15` again; 0 when all is well, else 1."""
    there = look_in_store(folder)  # before the ledger, as `audit` says
    found = audit(folder, _Progress(), () if there is None else there.cids)
    print(f"{folder}: {_summary(found)}")
    print(f"contributions kept whole for {number_of(found.verified, 'version')}")
    if there is not None:
        print(there.said)
        found.faults += [there.fault] if there.fault else []
    for absence in _absences(found):
        print(absence)
    for fault in found.faults[:MOST_FAULTS]:
        print(f"WRONG: {fault}")
    if len(found.faults) > MOST_FAULTS:
        print(f"WRONG: and {len(found.faults) - MOST_FAULTS} more")
    if versions is not None:
        first, last = _range(versions)
        if job is None:
            raise ConfigError("--replay needs the job that the run was started with: add --job JOB")
        again = _as_started(load_job(job), folder)
        for version in replay_versions(folder, again, first, last):
            if sys.stdout.isatty():
                print(f"made again: version {version} of {first} to {last}", end="\r", flush=True)
        print(f"versions {first} to {last} made again: the same weights, bit for bit")
    print("all is well" if not found.faults else f"{number_of(len(found.faults), 'thing')} wrong")
    return 1 if found.faults else 0


class _Progress:
    """How far it is, on a terminal, where that takes more than a moment."""

    def __init__(self) -> None:
        self._begun_s = self._said_s = time.monotonic()

    def __call__(self, done: int, all_: int) -> None:
        now_s = time.monotonic()
        if not sys.stdout.isatty() or now_s < self._begun_s + 1 or (now_s < self._said_s + 0.2 and done < all_):
            return
        self._said_s = now_s
        left_s = (now_s - self._begun_s) * (all_ - done) / done
        said = f"looked at {done:,} of {number_of(all_, 'version')}, about {left_s:.0f} s to go" if done < all_ else ""
        print(f"\r\x1b[K{said}", end="", flush=True)


def _summary(found: Audit) -> str:
    void = f", {found.void:,} void since the run failed" if found.void else ""
    return (
        f"{number_of(found.versions, 'version')} in one unbroken chain, {number_of(found.counted, 'step')} of "
        f"{number_of(found.samples, 'sample')} counted, {found.dropped:,} dropped, {found.pending:,} pending{void}"
        if not found.faults
        else f"{number_of(found.versions, 'version')}, {number_of(found.counted, 'step')} counted, "
        f"{found.dropped:,} dropped"
    )


def _absences(found: Audit) -> Iterator[str]:
    for times in sorted(set(found.without.values())):
        shards = sorted(shard for shard, missed in found.without.items() if missed == times)
        away = f"without {shards_named(shards)} in {times:,} of {number_of(found.versions, 'version')}"
        yield f"{away}, as nobody was there who holds {'it' if len(shards) == 1 else 'them'}"


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,15})(?:\.\.([0-9]{1,15}))?", text)
    if not found:
        raise ConfigError(f"--replay is {text!r}: expected one version or two, such as 12 or 12..15")
    return int(found[1]), int(found[2] or found[1])


def _as_started(job: Job, folder: Path) -> Job:
    """The job with as many shards as the run was started with."""
    try:
        shards = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["job"]["shards"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{folder / 'settings.json'} does not say how the run was started: {error}") from error
    return dataclasses.replace(job, shards=int(shards))
