"""How the processes of a cluster report."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys

from helpers.waiting import HANG_S

from zsfl.cluster.forkserver import Input, Output
from zsfl.reports import Note, from_line

LINES, LENGTH = 25, 100_000
"""Far longer than what a pipe takes in one piece."""

PROGRAM = f"""
from zsfl.cluster.forkserver import Output
from zsfl.reports import Note

output = Output(1)
for _ in range({LINES}):
    output.report(Note(node="a", message="a" * {LENGTH}))
"""


def test_long_lines_are_passed_on_whole() -> None:
    read, write = os.pipe()
    source, lines = Input(read), b""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=write), selectors.DefaultSelector() as ready:
        os.close(write)
        ready.register(read, selectors.EVENT_READ)
        while lines.count(b"\n") < LINES and ready.select(HANG_S):
            passed = source.read()
            assert not passed or passed.endswith(b"\n")
            lines += passed
    source.close()
    notes = [from_line(line) for line in lines.splitlines()]
    assert [note.message for note in notes if isinstance(note, Note)] == ["a" * LENGTH] * LINES


def test_of_one_that_is_killed_in_the_middle_of_a_line_nothing_is_passed_on() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            Output(write).report(Note(node="a", message="whole"))
            Output(write).report(Note(node="a", message="a" * (1 << 24)))
        finally:
            os._exit(0)
    os.close(write)
    source = Input(read)
    passed = b""
    while not passed:
        passed = source.read()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert source.read() == b""
    source.close()
    assert [from_line(line) for line in passed.splitlines()] == [Note(node="a", message="whole")]
