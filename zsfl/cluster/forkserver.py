"""Starts node processes quickly: imports torch and the job once, then forks.

Run as `python -m zsfl.cluster.forkserver JOB`. Reads one JSON order a line on standard input, passes on what nodes
report on standard output, and adds an Exited report for every node that ends. When its input ends, for whatever
reason, it ends all nodes; when it is killed itself, they notice and leave: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import selectors
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from zsfl.errors import ZsflError
from zsfl.ids import Role
from zsfl.reports import AnyReport, Exited, to_line

GRACE_S = 4.0
"""What nodes may take to leave once they are asked to, before they are killed."""


class Spawn(msgspec.Struct, frozen=True, tag_field="do", tag="spawn"):
    """Fork a node."""

    name: str
    role: Role
    flags: dict[str, Any]
    """Settings by field name."""
    log: str
    """File that takes its standard error."""


class Kill(msgspec.Struct, frozen=True, tag_field="do", tag="kill"):
    """Send a signal to a node."""

    name: str
    signal: int


_orders = msgspec.json.Decoder(Spawn | Kill)


class ForkServer:
    """The parent of all nodes of one local cluster."""

    def __init__(self, job: Path) -> None:
        self._job = job
        self._pids: dict[int, str] = {}
        self._lifeline = os.pipe()
        self._wakeup = os.pipe()
        self._out = Output(os.dup(1))
        self._ending = False
        self._had_aggregator = False
        os.set_blocking(self._wakeup[1], False)

    def run(self) -> None:
        """Serve until standard input ends, then end all nodes."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup[1])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_end)
        waiting = selectors.DefaultSelector()
        waiting.register(0, selectors.EVENT_READ)
        waiting.register(self._wakeup[0], selectors.EVENT_READ)
        rest = b""
        while not self._ending:
            ready = {key.fd for key, _ in waiting.select()}
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 4096)
                self._reap()
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._obey(_orders.decode(line))
        self._end_all()

    def _asked_to_end(self, *_: object) -> None:
        self._ending = True

    def _obey(self, order: Spawn | Kill) -> None:
        match order:
            case Spawn():
                self._spawn(order)
            case Kill():
                for pid, name in self._pids.items():
                    if name == order.name:
                        os.kill(pid, order.signal)

    def _spawn(self, order: Spawn) -> None:
        if order.role is Role.AGGREGATOR:
            if (
                self._had_aggregator
            ):  # what its optimizer imports, 1.4 s each time, the first has imported beside others
                importlib.import_module("torch._dynamo")
            self._had_aggregator = True
        pid = os.fork()
        if pid:
            self._pids[pid] = order.name
            return
        code = 1
        try:
            self._become_node(order)
            from zsfl.roles import run_node

            code = run_node(order.role, self._job, order.flags, self._out.report)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become_node(self, order: Spawn) -> None:
        """Leave everything of the fork server behind, except what it imported and where its output goes."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for end in (self._lifeline[1], *self._wakeup):
            os.close(end)
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # What the job prints must not get between the reports.
        os.dup2(log, 1)
        os.dup2(log, 2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        threading.Thread(target=_leave_with, args=(self._lifeline[0],), daemon=True).start()

    def _reap(self) -> None:
        for pid in list(self._pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                name = self._pids.pop(pid)
                self._out.report(Exited(node=name, code=os.waitstatus_to_exitcode(status)))

    def _end_all(self) -> None:
        for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            for pid in self._pids:
                os.kill(pid, number)
            deadline = time.monotonic() + patience_s
            while self._pids and time.monotonic() < deadline:
                self._reap()
                time.sleep(0.01)


def _leave_with(lifeline: int) -> None:
    """End this node when the fork server is gone: the pipe's other end closes with it, however it dies."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


class Output:
    """Where all processes of the cluster report: one pipe, and a lock, since a long line is not written at once."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._lock = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process

    def report(self, report: AnyReport) -> None:
        """Write one line. It begins with a line end too, in case a process was killed while it wrote."""
        line = b"\n" + to_line(report)
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        # Nobody may be listening any more, and the nodes must be ended all the same.
        with contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._pipe, line) :]
        fcntl.lockf(self._lock, fcntl.LOCK_UN)


def preload(job: Path) -> None:
    """Import what every node needs, once."""
    import zsfl.roles
    from zsfl.learning.job import load_job

    del zsfl
    # Torch imports this, and with it all of sympy, in the first backward of every process: 0.3 s each.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    # A job that cannot be loaded is reported by the node that needs it, in its own words.
    with contextlib.suppress(ZsflError):
        load_job(job)
    # Objects that are there before the fork are never collected, so that their pages stay shared.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve the job named on the command line."""
    job = Path(sys.argv[1])
    preload(job)
    ForkServer(job).run()


if __name__ == "__main__":
    main()
