"""How the processes of a cluster share one pipe."""

from __future__ import annotations

import subprocess
import sys

from zsfl.reports import Note, from_line

WRITERS, LINES, LENGTH = 4, 25, 100_000
"""Far longer than what a pipe takes in one piece."""

PROGRAM = f"""
import os
from zsfl.cluster.forkserver import Output
from zsfl.reports import Note

output = Output(1)
for writer in "{"abcd"[:WRITERS]}":
    if os.fork() == 0:
        for _ in range({LINES}):
            output.report(Note(node=writer, message=writer * {LENGTH}))
        os._exit(0)
for _ in range({WRITERS}):
    os.wait()
"""


def test_long_lines_of_many_writers_stay_whole() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE)
    notes = [from_line(line) for line in done.stdout.splitlines() if line]
    assert len(notes) == WRITERS * LINES
    assert all(isinstance(note, Note) and note.message == note.node * LENGTH for note in notes)
