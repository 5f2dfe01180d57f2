"""What a run leaves in runs/NAME. Everything here blocks: call it in a thread.

runs/NAME/
├── settings.json       the job, the aggregator's settings and the versions the run was started with
├── metrics.jsonl       one report a line, as in zsfl.reports: a round, windows between them, how it ended
├── ledger.jsonl        one commit record a line
├── journal/            the contributions that were counted, as far back as the settings keep them
├── plot.png            loss and accuracy by round
├── tensorboard/        the same and more as TensorBoard's event files, where the settings ask for them
├── model.safetensors   the merged weights
├── best.safetensors    those of the version that was best in its held-out test
├── load_model.py       the lines that load them into ordinary PyTorch
├── checkpoint/         what --resume goes on from
├── address             where its aggregator is, or was last
└── succession.json     who aggregates, where others stand by
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from zsfl.bounds import BESIDE_RUNS
from zsfl.errors import ConfigError, StorageError
from zsfl.locks import LOCK, lock_folder
from zsfl.reports import (
    ADDRESS,
    METRICS,
    AnyReport,
    Failed,
    Finished,
    RoundReport,
    Tested,
    WindowReport,
    reports_in,
    to_line,
)
from zsfl.words import fewer, number_of, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEDGER, JOURNAL, CHECKPOINT = "ledger.jsonl", "journal", "checkpoint"
STANDING = "succession.json"
_TRAIN, _TEST = "#7f7f7f", "#1f6fb4"
"""Colours of the plot: what was trained on stays behind what counts."""


class RunFolder:
    """One run's folder, locked against every other process until it is closed."""

    def __init__(self, path: Path, lock: int, *, is_new: bool) -> None:
        """`is_new`: this process made it, and takes it away again should nothing come of it."""
        self.path = path
        self._lock = lock
        self.is_new = is_new
        self._ends: dict[str, int] = {}
        """By file, where the last line ends that was appended whole."""
        self.on_report: Callable[[AnyReport], None] = lambda _: None
        """Called with each report that metrics.jsonl has one line more of."""

    @classmethod
    def create(cls, runs: Path, name: str, resume: bool, *, or_begin: bool = False) -> Self:
        """Take `runs`/`name`, or the first free of NAME-2, NAME-3, ...; with `resume` exactly `name`, and so with
        `or_begin`, which begins it where nothing was begun yet.

        `ConfigError` when there is nothing to resume or another process writes the folder, `StorageError`
        when the disk refuses.
        """
        if name.lower() in BESIDE_RUNS:  # as a job may be called
            raise ConfigError(f"a run cannot be called {name}, which is a folder beside the runs; name it with --run")
        path = runs / name
        if resume and not or_begin and not path.is_dir():
            raise ConfigError(f"there is no run {path} to resume; {_known_runs(runs)}")
        with _storing(runs):
            runs.mkdir(parents=True, exist_ok=True)
            if or_begin:
                path.mkdir(exist_ok=True)
            elif not resume:
                path = _new_folder(runs, name)
            lock = lock_folder(path, "stop it first, or give this run another name with --run")
            for file in (METRICS, LEDGER):
                _drop_torn_line(path / file)
        return cls(path, lock, is_new=not (_is_begun(path) if or_begin else resume))

    @classmethod
    def of_copy(cls, runs: Path, name: str) -> Self:
        """The copy of a run that whoever stands by keeps in `runs`/`name`, a new one or the one that is there."""
        path = runs / name
        is_new = not path.exists()
        with _storing(runs):
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(path, "does it stand by already? Give this node another --name")
        if any(entry.name != LOCK for entry in path.iterdir()) and not (path / STANDING).exists():
            os.close(lock)
            raise ConfigError(f"{path} is no copy of a run; give this node another --name, or move that folder away")
        return cls(path, lock, is_new=is_new)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Who was cancelled may be started again, as one that was killed.
        if self.is_new and not (kind and issubclass(kind, asyncio.CancelledError)):
            self._remove_if_idle()
        self.close()

    def _remove_if_idle(self) -> None:
        """Away with a run that never trained, unless it says why, or whoever stands by may go on with it."""
        if self.commits() or (self.path / METRICS).exists():
            return
        with suppress(OSError, ValueError):
            if json.loads((self.path / STANDING).read_bytes()).get("shared"):
                return
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.gone")  # at once, should somebody want the name
        with suppress(OSError):
            self.path.rename(aside)
            shutil.rmtree(aside)

    @property
    def checkpoint_path(self) -> Path:
        """Where the aggregator keeps what `--resume` continues from."""
        return self.path / CHECKPOINT

    @property
    def journal_path(self) -> Path:
        """Where the aggregator keeps what came, see `zsfl.aggregator.journal`."""
        return self.path / JOURNAL

    @property
    def ledger_path(self) -> Path:
        """The commit records, one JSON object a line."""
        return self.path / LEDGER

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Settings as JSON; paths and other objects as text."""
        text = json.dumps(settings, indent=2, default=str) + "\n"
        with _replacing(self.path / "settings.json") as file:
            file.write_text(text, encoding="utf-8")

    def write_address(self, address: str) -> None:
        """Where to ask how the run goes."""
        with _replacing(self.path / ADDRESS) as file:
            file.write_text(address + "\n", encoding="utf-8")

    def append_metrics(self, report: RoundReport | WindowReport | Tested | Finished | Failed) -> None:
        """One more line of metrics.jsonl."""
        self._append(METRICS, to_line(report))
        self.on_report(report)

    def append_commit(self, record: Mapping[str, Any], *, sync: bool = False) -> None:
        """One more line of ledger.jsonl, handed to the operating system when this returns; with `sync` to the disk."""
        self._append(LEDGER, msgspec.json.encode(record) + b"\n", sync=sync)

    def _append(self, name: str, line: bytes, *, sync: bool = False) -> None:
        """A line more, or none: after a refusal of the disk it may be appended again."""
        path = self.path / name
        with _storing(path), path.open("ab", buffering=0) as file:
            end = self._ends[name] = min(file.tell(), self._ends.get(name, file.tell()))
            file.truncate(end)  # of what the disk took of a line before it refused the rest
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fdatasync(file.fileno())
                if not end:  # the file may be new
                    to_disk(self.path)
            self._ends[name] = end + len(line)

    def commits(self) -> list[bytes]:
        """The lines of ledger.jsonl."""
        return whole_lines(self.ledger_path)

    def cut_commits(self, is_last: Callable[[bytes], bool], *, whole: bool = False) -> None:
        """Remove all lines of ledger.jsonl after the one that `is_last` finds, or with `whole` all of them."""
        lines = whole_lines(self.ledger_path)
        self._ends.pop(LEDGER, None)
        kept = 0 if whole else next(number for number, line in enumerate(lines, 1) if is_last(line))
        if kept < len(lines):
            with _storing(self.ledger_path):
                os.truncate(self.ledger_path, sum(len(line) + 1 for line in lines[:kept]))

    def finished(self) -> Finished | None:
        """How the run ended, where nothing was done in it since it ended well."""
        last = next(reversed(self.reports()), None)
        return last if isinstance(last, Finished) else None

    def rounds(self) -> list[RoundReport]:
        """The rounds in metrics.jsonl, in order; of a round that was redone after a resume, the last."""
        found = {report.round: report for report in self.reports() if isinstance(report, RoundReport)}
        return [found[number] for number in sorted(found)]

    def reports(self) -> list[AnyReport]:
        """All that metrics.jsonl has."""
        with _storing(self.path / METRICS):
            return reports_in(self.path)

    def write_model(self, state: Mapping[str, Tensor], load_lines: str) -> None:
        """The merged weights as safetensors, and the code that loads them without zsfl.

        Tied weights are stored once for each of their names: safetensors takes no shared memory.
        """
        _write_tensors(self.path / "model.safetensors", state)
        self.write_loader(load_lines)

    def write_loader(self, load_lines: str) -> None:
        """The code that loads them, made of the job here: none that somebody would run comes from another machine."""
        with _replacing(self.path / "load_model.py") as file:
            file.write_text(load_lines.rstrip() + "\n", encoding="utf-8")

    def write_best(self, state: Mapping[str, Tensor]) -> None:
        """The merged weights of the best version; load_model.py loads them too, once it is told this file."""
        _write_tensors(self.path / "best.safetensors", state)

    def write_plot(self) -> None:
        """Loss (training, held-out) and held-out accuracy by round, as plot.png; nothing without a round."""
        rounds = self.rounds()
        if not rounds:
            return
        # The object interface, since pyplot keeps global state and this runs in a thread.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Margins that are known beforehand: to have them worked out takes as long as to draw.
        figure = Figure(figsize=(10, 4.2), dpi=120)
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.12, top=0.84, wspace=0.15)
        figure.suptitle(f"{self.path.name}: {_summary(rounds[-1])}", fontweight="bold")
        losses, accuracies = figure.subplots(1, 2)
        _plot_losses(losses, rounds)
        _plot_accuracy(accuracies, rounds)
        with _replacing(self.path / "plot.png") as file:
            FigureCanvasAgg(figure).print_figure(file, format="png")


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    with _replacing(path) as file:
        file.touch()
        usual = stat.S_IMODE(file.stat().st_mode)
        safetensors.torch.save_file(own, file)
        file.chmod(usual)  # save_file makes a file that nobody else may read, whatever the umask says


def _summary(last: RoundReport) -> str:
    if last.accuracy is None:
        return f"{last.round} of {number_of(last.rounds, 'round')}"
    absent = f" ({fewer(last.without)})" if last.without else ""
    accuracy = percent(last.accuracy, last.without)
    return f"{accuracy} test accuracy after {last.round} of {number_of(last.rounds, 'round')}{absent}"


def _plot_losses(axes: Axes, rounds: list[RoundReport]) -> None:
    _curve(axes, [(r.round, r.train_loss) for r in rounds], "training", _TRAIN)
    _curve(axes, [(r.round, r.loss) for r in rounds if r.loss is not None], "test (held out)", _TEST)
    losses = [loss for r in rounds for loss in (r.train_loss, r.loss) if loss is not None and math.isfinite(loss)]
    axes.set_ylim(0, 1.06 * max(losses, default=0.0) or None)
    axes.legend(frameon=False)
    _finish(axes, "Loss, mean over samples", rounds)


def _plot_accuracy(axes: Axes, rounds: list[RoundReport]) -> None:
    points = [(r.round, 100 * r.accuracy) for r in rounds if r.accuracy is not None]
    if points:
        _curve(axes, points, "test (held out)", _TEST)
        axes.set_ylim(bottom=10 * math.floor(min(value for _, value in points) / 10), top=101)
        axes.legend(frameon=False, loc="lower right")
    else:
        axes.text(0.5, 0.5, "not measured by this job", ha="center", transform=axes.transAxes)
    _finish(axes, "Accuracy, % of test samples", rounds)


def _curve(axes: Axes, points: list[tuple[int, float]], label: str, color: str) -> None:
    """One line by round, with a dot for each round while they can be told apart."""
    if not points:
        return
    marker = "o" if len(points) <= 40 else ""
    axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.8, color=color, label=label)


def _finish(axes: Axes, title: str, rounds: list[RoundReport]) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel("round")
    axes.set_xlim(rounds[0].round - 0.5, rounds[-1].round + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _known_runs(runs: Path) -> str:
    names = sorted({path.parent.name for name in ("settings.json", LEDGER) for path in runs.glob(f"*/{name}")})
    return f"{runs} has {', '.join(names)}" if names else f"{runs} has no run yet: start without --resume"


def _is_begun(path: Path) -> bool:
    """Whether there is something to resume: whoever was killed while it waited for the others left a folder without."""
    return bool(whole_lines(path / LEDGER)) or any((path / CHECKPOINT).glob("round-*"))


def _new_folder(runs: Path, name: str) -> Path:
    """The first free name, taken by making its lock file, so that two processes never take the same one.

    The folder alone does not take the name: nodes that started earlier may have put their spills there.
    """
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        path.mkdir(exist_ok=True)
        try:
            (path / LOCK).touch(exist_ok=False)
        except FileExistsError:
            number += 1
        except FileNotFoundError:  # somebody has just removed it
            continue
        else:
            return path


def to_disk(path: Path) -> None:
    """A file, or the names in a folder, would outlast a loss of power when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_lines(path: Path) -> list[bytes]:
    """Lines that were written to their end; one that a crash cut short has no newline."""
    if not path.exists():
        return []
    with _storing(path):
        return path.read_bytes().split(b"\n")[:-1]


def _drop_torn_line(path: Path) -> None:
    """Cut off what a crash left half-written, or the next line would be appended to it."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    with _storing(path):
        yield aside
        os.replace(aside, path)


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a `StorageError`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as err:
        raise StorageError(
            f"cannot write {path} ({getattr(err, 'strerror', None) or err}); "
            "check that the disk has room and that this user may write there, or name another with --runs"
        ) from err
