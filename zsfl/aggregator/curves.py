"""A run's curves as TensorBoard's event files, in RUN/tensorboard: by version as they come, and by round."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from zsfl.aggregator.run_folder import RunFolder
from zsfl.errors import ConfigError
from zsfl.reports import AnyReport, RoundReport, Tested, WindowReport

TENSORBOARD = "tensorboard"
FLUSH_S = 5
"""What is written is to be seen no later."""
QUEUE = 10_000
"""Values that may wait for the disk before the run does."""
Curved = RoundReport | WindowReport | Tested


def check_tensorboard() -> None:
    """ConfigError where it is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard needs TensorBoard, which is not installed here: pip install 'tensorboard>=2.16'"
        )


class Curves:
    """Writes what metrics.jsonl gets, from its beginning: what a resume makes again replaces what was there."""

    def __init__(self, folder: RunFolder) -> None:
        # Here, as it loads TensorBoard, and where there is one TensorFlow.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._make: Callable[[], SummaryWriter] = lambda: SummaryWriter(
            str(folder.path / TENSORBOARD), purge_step=0, max_queue=QUEUE, flush_secs=FLUSH_S
        )
        self._last: dict[type[Curved], int] = {}
        self._writer = self._make()
        self._write_all(folder.reports())

    def _write_all(self, reports: Iterable[AnyReport]) -> None:
        """With `purge_step` 0 readers take nothing of earlier files."""
        for report in standing(reports):
            self._write(report)
        self._writer.flush()

    def on(self, report: AnyReport) -> None:
        """One more line."""
        if not isinstance(report, Curved):
            self._writer.flush()
        elif _step(report) > self._last.get(type(report), -1):
            self._write(report)
        else:  # of a version or round that was there before
            self._writer.close()
            self._writer = self._make()
            self._write_all(self._folder.reports())

    def close(self) -> None:
        """All is on the disk."""
        self._writer.close()

    def _write(self, report: Curved) -> None:
        self._last[type(report)] = _step(report)
        match report:
            case WindowReport(version=step):
                values = {"version/train_loss": report.loss, "version/steps_per_s": report.steps_per_s}
            case Tested(version=step):
                values = {"version/test_loss": report.loss, "version/test_accuracy": report.accuracy}
                values |= {f"clients/{name}": accuracy for name, accuracy in report.clients.items()}
                values |= {f"clients_test_loss/{name}": loss for name, loss in report.losses.items()}
            case RoundReport(round=step):
                values = {
                    "round/train_loss": report.train_loss,
                    "round/test_loss": report.loss,
                    "round/test_accuracy": report.accuracy,
                    "round/steps_per_s": report.steps_per_s,
                    "round/seconds": report.seconds,
                    "round/bytes_sent": report.bytes_sent,
                }
                values |= {f"clients_train_loss/{name}": loss for name, loss in report.train_losses.items()}
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)


def _step(report: Curved) -> int:
    return report.round if isinstance(report, RoundReport) else report.version


def standing(reports: Iterable[AnyReport]) -> list[Curved]:
    """Those that have curves, without what a resume went back on."""
    kept: dict[type[Curved], list[Curved]] = {RoundReport: [], WindowReport: [], Tested: []}
    for report in reports:
        if isinstance(report, Curved):
            mine = kept[type(report)]
            while mine and _step(mine[-1]) >= _step(report):
                mine.pop()
            mine.append(report)
    return [report for mine in kept.values() for report in mine]


@contextmanager
def drawing(folder: RunFolder, note: Callable[[str, str], None]) -> Generator[None, None, None]:
    """Meanwhile, what metrics.jsonl gets is drawn, too. A disk that refuses that ends it, and not the run."""
    try:
        curves = Curves(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder.path / TENSORBOARD}: {error.strerror}") from error

    def on(report: AnyReport) -> None:
        try:
            curves.on(report)
        except OSError as error:
            note(f"no more curves for TensorBoard, as they cannot be written: {error}", "warning")
            folder.on_report = _ignored

    folder.on_report = on
    try:
        yield
    finally:
        folder.on_report = _ignored
        with suppress(OSError):
            curves.close()


def _ignored(_: AnyReport) -> None:
    """Nobody listens."""
