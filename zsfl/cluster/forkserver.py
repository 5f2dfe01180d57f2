"""Starts node processes quickly: imports torch and the job once, then forks.

Run as `python -m zsfl.cluster.forkserver JOB`, with `--files` where the job's files are to come first. Reads one JSON
order a line on standard input (`zsfl.cluster.talk`), passes on what nodes report on standard output, and adds an Exited
report for every node that ends. When its input ends, for whatever reason, it ends all nodes; when it is killed itself,
they notice and leave: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import msgspec

from zsfl.cluster.outbox import Outbox
from zsfl.cluster.talk import (
    Describe,
    Described,
    Files,
    Introduce,
    Introduced,
    Kill,
    Order,
    Printed,
    Spawn,
    Trust,
    read_order,
)
from zsfl.cluster.titles import call_itself
from zsfl.errors import ZsflError
from zsfl.ids import AGGREGATING, PROTOCOL
from zsfl.reports import Exited, Failed, Report
from zsfl.settings import load_settings

GRACE_S = 10.0
"""What nodes may take to leave once they are asked to, before they are killed: more than they give themselves."""
MAX_PRINTED = 1 << 16
"""Characters of a printed line that are told at once."""


class ForkServer:
    """The parent of all nodes of one local cluster."""

    def __init__(self, job: Path, reports: Outbox, orders: bytes = b"") -> None:
        """`orders` came already."""
        self._job = job
        self._nodes: dict[int, Spawn] = {}
        self._inputs: dict[int, Input] = {}
        """By process."""
        self._prints: dict[int, Input] = {}
        """By process, what it prints, where that is told."""
        self._lifeline = os.pipe()
        self._wakeup = os.pipe()
        self._waiting = selectors.DefaultSelector()
        self._out = reports
        self._ending = False
        self._rest = orders
        os.set_blocking(self._wakeup[1], False)

    def run(self) -> None:
        """Serve until standard input ends, then end all nodes."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup[1])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_end)
        self._waiting.register(0, selectors.EVENT_READ)
        self._waiting.register(self._wakeup[0], selectors.EVENT_READ)
        self._take(b"")
        while not self._ending:
            self._mind_output()
            ready = {key.fd for key, _ in self._waiting.select()}
            if self._out.pipe in ready:
                self._out.flush()
            self._relay(ready)
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 4096)
                self._reap()
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    break
                self._take(data)
        self._end_all()

    def _mind_output(self) -> None:
        """Wait for its pipe to take more, too, where that matters."""
        if self._out.waits and self._out.pipe not in self._waiting.get_map():
            self._waiting.register(self._out.pipe, selectors.EVENT_WRITE)
        elif not self._out.waits and self._out.pipe in self._waiting.get_map():
            self._waiting.unregister(self._out.pipe)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._obey(read_order(line))

    def _asked_to_end(self, *_: object) -> None:
        self._ending = True

    def _obey(self, order: Order) -> None:
        match order:
            case Introduce() | Trust():
                try:
                    obey_about_keys(order, self._out)
                except ZsflError as error:
                    self._out.report(Failed(kind=type(error).__name__, message=str(error)))
            case Describe():
                self._out.report(described(self._job))
            case Spawn():
                self._spawn(order)
            case Kill():
                for pid, node in self._nodes.items():
                    if node.name == order.name:
                        os.kill(pid, order.signal)
            case _:
                raise AssertionError(f"{order} comes too late")

    def _spawn(self, order: Spawn) -> None:
        read, write = os.pipe()
        printed = () if order.log else os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            self._nodes[pid], self._inputs[pid] = order, Input(read)
            self._waiting.register(read, selectors.EVENT_READ)
            if printed:
                os.close(printed[1])
                self._prints[pid] = Prints(printed[0])
                self._waiting.register(printed[0], selectors.EVENT_READ)
            return
        code = 1
        try:
            os.close(read)
            self._become_node(order, printed[1] if printed else None)
            from zsfl.roles import run_node

            code = run_node(order.role, self._job, order.flags, Output(write).report)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become_node(self, order: Spawn, log: int | None) -> None:
        """Leave everything of the fork server behind, except what it imported and where its output goes."""
        call_itself(order.name, f"zsfl node {order.role} --name {order.name} {self._job}")
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self._waiting.close()
        others = (*self._inputs.values(), *self._prints.values())
        for end in (self._lifeline[1], *self._wakeup, *(one.pipe for one in others)):
            os.close(end)
        if log is None:
            log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            begun = f"--- {order.name} of {self._job}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            os.write(log, begun.encode())  # runs of one folder share the file
        # What the job prints must not get between the reports.
        os.dup2(log, 1)
        os.dup2(log, 2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        threading.Thread(target=_leave_with, args=(self._lifeline[0],), daemon=True).start()

    def _relay(self, ready: Collection[int]) -> None:
        """Pass on what nodes report."""
        for one in self._inputs.values():
            if one.pipe in ready:
                self._out.write(one.read())
        for pid, one in self._prints.items():
            if one.pipe in ready:
                self._tell_printed(self._nodes[pid].name, one.read())

    def _tell_printed(self, node: str, lines: bytes) -> None:
        for line in lines.decode(errors="replace").splitlines():
            for start in range(0, max(len(line), 1), MAX_PRINTED):
                self._out.report(Printed(node=node, line=line[start : start + MAX_PRINTED]))

    def _reap(self) -> None:
        for pid in list(self._nodes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                node, last = self._nodes.pop(pid), self._inputs.pop(pid)
                self._waiting.unregister(last.pipe)
                self._out.write(last.read())
                last.close()
                if (printed := self._prints.pop(pid, None)) is not None:
                    self._waiting.unregister(printed.pipe)
                    self._tell_printed(node.name, printed.read() + printed.rest)
                    printed.close()
                self._out.report(Exited(node=node.name, code=os.waitstatus_to_exitcode(status)))

    def _end_all(self) -> None:
        aggregating = {pid for pid, node in self._nodes.items() if node.role in AGGREGATING}
        self._end(aggregating, signal.SIGTERM)
        self._end(self._nodes.keys() - aggregating, signal.SIGTERM)
        self._end(self._nodes.keys(), signal.SIGKILL)
        deadline = time.monotonic() + GRACE_S
        while self._out.waits and time.monotonic() < deadline:
            time.sleep(0.01)
            self._out.flush()

    def _end(self, nodes: Collection[int], number: int) -> None:
        for pid in nodes:
            os.kill(pid, number)
        deadline = time.monotonic() + GRACE_S
        while not self._nodes.keys().isdisjoint(nodes) and time.monotonic() < deadline:
            self._relay([one.pipe for one in (*self._inputs.values(), *self._prints.values())])
            self._reap()
            self._out.flush()
            time.sleep(0.01)


def _leave_with(lifeline: int) -> None:
    """End this node when the fork server is gone: the pipe's other end closes with it, however it dies."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


class Output:
    """Where one process reports: a pipe of its own, so that one that is stopped in the middle holds up no other."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def report(self, report: Report) -> None:
        """Write one line; returns when it is written."""
        self.write(msgspec.json.encode(report) + b"\n")

    def write(self, lines: bytes) -> None:
        """Write whole lines."""
        # Nobody may be listening any more, and the nodes must be ended all the same.
        with contextlib.suppress(OSError):
            while lines:
                lines = lines[os.write(self._pipe, lines) :]


class Input:
    """The other end of a node's pipe: whole lines only, whatever becomes of the one that writes them."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        os.set_blocking(pipe, False)
        self.rest = b""
        """What has come of a line."""

    def read(self) -> bytes:
        """The lines that have come to their end."""
        pieces = [self.rest]
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.pipe, 1 << 20):
                pieces.append(piece)
        lines, end, self.rest = b"".join(pieces).rpartition(b"\n")
        return lines + end

    def close(self) -> None:
        """Nothing more comes."""
        os.close(self.pipe)


class Prints(Input):
    """The same of what people print: also lines that are drawn over one another, and the beginnings of long ones."""

    def read(self) -> bytes:
        """The lines that have come to their end."""
        lines = super().read()
        ended, end, rest = self.rest.rpartition(b"\r")
        if len(rest) > MAX_PRINTED:
            ended, end, rest = ended + end + rest, b"\n", b""
        self.rest = rest
        return lines + ended + end


def obey_about_keys(order: Introduce | Trust, told: Outbox) -> None:
    """What concerns the keys of this machine, those that its nodes will use; ConfigError when they cannot be read or
    changed.
    """
    from zsfl.keys.secret import own_keys
    from zsfl.keys.trusted import trust_as

    match order:
        case Introduce():
            key = "" if order.keys is None else own_keys(_keys_of_nodes(order.keys)).public
            told.report(Introduced(protocol=PROTOCOL, version=version("zsfl"), key=key))
        case Trust():
            folder = _keys_of_nodes(order.keys)
            for key, name, roles in order.machines:
                trust_as(folder, key, name, frozenset(roles))


def _keys_of_nodes(named: str) -> Path:
    """The folder that is named, else the one that variables and settings of this machine name."""
    from zsfl.keys.secret import keys_folder

    return keys_folder(load_settings({"keys": named or None}, os.environ).keys)


def described(job: Path) -> Described:
    """What it is told of the job."""
    from zsfl.learning.job import load_job

    try:
        return Described(shards=load_job(job).shards)
    except ZsflError as error:
        return Described(error=str(error))


def take_files(job: Path) -> bytes:
    """Write the files that the first line on standard input has beside the job; what came after that line."""
    come = b""
    while b"\n" not in come:
        if not (piece := os.read(0, 1 << 20)):
            sys.exit("no files came")
        come += piece
    line, _, rest = come.partition(b"\n")
    order = read_order(line)
    if not isinstance(order, Files):
        sys.exit(f"the first order is {type(order).__name__}, not Files")
    for name, data in order.files.items():
        place = job.parent / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return rest


def preload(job: Path) -> None:
    """Import what every node needs, once."""
    from zsfl.lifetime import staying

    with staying():  # which also keeps its pages shared after a fork
        import zsfl.roles
        from zsfl.learning.job import load_job

        del zsfl
        # Torch imports this, and with it all of sympy, in the first backward of every process: 0.3 s each.
        with contextlib.suppress(ImportError):
            importlib.import_module("torch.fx.experimental.symbolic_shapes")
        # A job that cannot be loaded is reported by the node that needs it, in its own words.
        with contextlib.suppress(ZsflError):
            load_job(job)
        gc.collect()


def main() -> None:
    """Serve the job named on the command line."""
    job = Path(sys.argv[1])
    reports = Outbox(os.dup(1))
    reports.write(b"\n")  # a shell on the way may have printed something, and no end of a line
    # What the job prints while it is imported must not get between the reports.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    orders = take_files(job) if sys.argv[2:] == ["--files"] else b""
    preload(job)
    ForkServer(job, reports, orders).run()


if __name__ == "__main__":
    main()
