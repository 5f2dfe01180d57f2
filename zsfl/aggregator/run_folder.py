"""What a run leaves in runs/NAME. Everything here blocks: call it in a thread.

runs/NAME/
├── settings.json       what the run was started with
├── metrics.jsonl       one report a line, as in zsfl.reports
├── ledger.jsonl        one commit record a line
├── plot.png            loss and accuracy by round
├── model.safetensors   the merged weights
├── load_model.py       the lines that load them into ordinary PyTorch
├── checkpoint.safetensors
└── logs/NODE.log
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from zsfl.errors import ConfigError, StorageError
from zsfl.reports import RoundReport, WindowReport, from_line, to_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOCK = ".lock"
_METRICS = "metrics.jsonl"
_LEDGER = "ledger.jsonl"


class RunFolder:
    """One run's folder, locked against every other process until it is closed."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, runs: Path, name: str, resume: bool) -> Self:
        """Take `runs`/`name`, or the first free of NAME-2, NAME-3, ...; with `resume` exactly `name`.

        `ConfigError` when there is nothing to resume or another process writes the folder, `StorageError`
        when the disk refuses.
        """
        path = runs / name
        if resume and not path.is_dir():
            raise ConfigError(f"there is no run {path} to resume; {_known_runs(runs)}")
        with _storing(runs):
            runs.mkdir(parents=True, exist_ok=True)
            if not resume:
                path = _new_folder(runs, name)
            (path / "logs").mkdir(exist_ok=True)
            lock = _lock(path)
            for file in (_METRICS, _LEDGER):
                _drop_torn_line(path / file)
        return cls(path, lock)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def checkpoint_path(self) -> Path:
        """Where the aggregator keeps what `--resume` continues from."""
        return self.path / "checkpoint.safetensors"

    @property
    def ledger_path(self) -> Path:
        """The commit records, one JSON object a line."""
        return self.path / _LEDGER

    def log_path(self, node_name: str) -> Path:
        """Where the output of one node goes."""
        return self.path / "logs" / f"{node_name}.log"

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Settings as JSON; paths and other objects as text."""
        text = json.dumps(settings, indent=2, default=str) + "\n"
        with _replacing(self.path / "settings.json") as file:
            file.write_text(text, encoding="utf-8")

    def append_metrics(self, report: RoundReport | WindowReport) -> None:
        """One more line of metrics.jsonl."""
        _append_line(self.path / _METRICS, to_line(report))

    def append_commit(self, record: Mapping[str, Any]) -> None:
        """One more line of ledger.jsonl, handed to the operating system when this returns."""
        _append_line(self.ledger_path, msgspec.json.encode(record) + b"\n")

    def rounds(self) -> list[RoundReport]:
        """The rounds in metrics.jsonl, in order; of a round that was redone after a resume, the last."""
        found: dict[int, RoundReport] = {}
        for line in _whole_lines(self.path / _METRICS):
            report = from_line(line)
            if isinstance(report, RoundReport):
                found[report.round] = report
        return [found[number] for number in sorted(found)]

    def write_model(self, state: Mapping[str, Tensor], load_lines: str) -> None:
        """The merged weights as safetensors, and the code that loads them without zsfl.

        Tied weights are stored once for each of their names: safetensors takes no shared memory.
        """
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
        }
        with _replacing(self.path / "model.safetensors") as file:
            safetensors.torch.save_file(own, file)
        with _replacing(self.path / "load_model.py") as file:
            file.write_text(load_lines.rstrip() + "\n", encoding="utf-8")

    def write_plot(self) -> None:
        """Loss (training, held-out) and held-out accuracy by round, as plot.png; nothing without a round."""
        rounds = self.rounds()
        if not rounds:
            return
        # The object interface, since pyplot keeps global state and this runs in a thread.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
        figure.suptitle(f"{self.path.name}: {_summary(rounds[-1])}")
        losses, accuracies = figure.subplots(1, 2)
        _plot_losses(losses, rounds)
        _plot_accuracy(accuracies, rounds)
        with _replacing(self.path / "plot.png") as file:
            FigureCanvasAgg(figure).print_figure(file, format="png")


def _summary(last: RoundReport) -> str:
    if last.accuracy is None:
        return f"{last.round} of {last.rounds} rounds"
    return f"{last.accuracy:.2%} held-out accuracy after {last.round} of {last.rounds} rounds"


def _plot_losses(axes: Axes, rounds: list[RoundReport]) -> None:
    held_out = [(r.round, r.loss) for r in rounds if r.loss is not None]
    axes.plot([r.round for r in rounds], [r.train_loss for r in rounds], "o-", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "s--", label="held-out")
    axes.set_title("Loss")
    axes.set_ylabel("loss, mean over samples")
    axes.legend()
    _finish(axes)


def _plot_accuracy(axes: Axes, rounds: list[RoundReport]) -> None:
    accuracies = [(r.round, 100 * r.accuracy) for r in rounds if r.accuracy is not None]
    axes.set_title("Accuracy")
    axes.set_ylabel("samples classified correctly, %")
    if accuracies:
        axes.plot(*zip(*accuracies, strict=True), "s--", color="C1", label="held-out")
        axes.legend(loc="lower right")
    else:
        axes.text(0.5, 0.5, "not measured by this job", ha="center", transform=axes.transAxes)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _known_runs(runs: Path) -> str:
    names = sorted(entry.name for entry in runs.iterdir() if entry.is_dir()) if runs.is_dir() else []
    return f"{runs} has {', '.join(names)}" if names else f"{runs} has no run yet: start without --resume"


def _new_folder(runs: Path, name: str) -> Path:
    """The first free name, taken by making it, so that two processes never take the same one."""
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _lock(folder: Path) -> int:
    """The descriptor that holds the lock; the kernel lets go of it when the process ends, however it ends."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"another process is writing the run {folder} (it holds {folder / _LOCK}); "
            "stop it first, or give this run another name with --run"
        ) from None
    return descriptor


def _append_line(path: Path, line: bytes) -> None:
    with _storing(path), path.open("ab") as file:
        file.write(line)


def _whole_lines(path: Path) -> list[bytes]:
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
