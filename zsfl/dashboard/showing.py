"""What `zsfl runs`, `zsfl status` and `zsfl report` make of the folders of runs."""

from __future__ import annotations

import html
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from zsfl.dashboard.drawing import curves, draw_runs, natural
from zsfl.dashboard.pages import console, in_bytes
from zsfl.dashboard.runs import LEDGER, Run, all_runs, find_run, read_run
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import Role
from zsfl.reports import Failed, RoundReport, Tested
from zsfl.words import FEWER, fewer, number_of, percent


def print_runs(named: Sequence[str], runs: Path, plot: Path | None, *, as_json: bool) -> int:
    """List runs, or compare those that are named; ConfigError when there are none."""
    found = [read_run(find_run(name, runs)) for name in named] if named else all_runs(runs)
    if not found:
        raise ConfigError(f"there is no run in {runs}: `zsfl demo` makes one")
    if plot is not None:
        draw_runs(found, plot)
    if as_json:
        _print_json([in_short(run) for run in found])
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "job"):
        table.add_column(title, overflow="fold")
    for title in ("mode", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("rounds", "accuracy", "best", "time", "sent"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in found:
        best = run.best
        table.add_row(
            run.name,
            str(run.job.get("name", "")),
            _mode(run),
            run.state,
            f"{len(run.rounds)}/{run.planned}",
            _accuracy(run.tested),
            _accuracy(best),
            in_time(run.seconds),
            in_bytes(run.bytes_sent),
        )
    console().print(table)
    for run in found:
        if run.without:
            print(f"{run.name}: {fewer(run.without)}")
    if plot is not None:
        print(f"the curves are in {plot}")
    return 0


def in_short(run: Run) -> dict[str, Any]:
    """A run in numbers, for programs."""
    last, best = run.rounds[-1] if run.rounds else None, run.best
    return {
        "run": run.name,
        "folder": str(run.folder),
        "job": run.job.get("name", ""),
        "mode": _mode(run),
        "state": run.state,
        "rounds": len(run.rounds),
        "planned": run.planned,
        "versions": run.versions,
        "accuracy": run.accuracy,
        "without": run.tested.without if run.tested else (),
        "loss": last.loss if last else None,
        "best_accuracy": best.accuracy if best else None,
        "best_version": best.version if best else None,
        "best_without": best.without if best else (),
        "seconds": run.seconds,
        "steps": run.steps,
        "bytes_sent": run.bytes_sent,
        "ended": msgspec.to_builtins(run.end) if run.end else None,
    }


def print_status(named: str | None, runs: Path, *, as_json: bool) -> int:
    """How one run stands; 1 when it failed."""
    run = read_run(find_run(named, runs))
    if as_json:
        _print_json(in_short(run))
        return int(run.state == "failed")
    last, best = run.rounds[-1] if run.rounds else None, run.best
    rounds, versions = number_of(run.planned, "round"), number_of(run.versions, "version")
    print(f"{run.folder}: {run.state}, {len(run.rounds)} of {rounds}, {versions}")
    print(
        f"job {run.job.get('name', '')}, {_mode(run)}, {run.job.get('shards', '?')} shards, {run.job.get('optimizer')}"
    )
    if last is not None:
        tested = f", held-out loss {last.loss:.4f}" if last.loss is not None else ""
        tested += f", accuracy {_accuracy(last)}" if last.accuracy is not None else ""
        print(f"round {last.round}: training loss {last.train_loss:.4f}{tested}")
        print(f"{number_of(run.steps, 'step')} in {in_time(run.seconds)}, {in_bytes(run.bytes_sent)} sent")
    if best is not None:
        print(f"best: {_accuracy(best)} at version {best.version} (best.safetensors)")
    if absent := run.without.union(last.without if last else ()):
        print(fewer(absent))
    if isinstance(run.end, Failed):
        print(f"it failed: {run.end.message}")
    match run.state:
        case "running":
            print("watch it: zsfl dash" + ("" if named is None else f" {named}"))
        case "stopped" | "failed" if run.rounds:
            print(f"go on with: --run {run.name} --resume")
        case _:
            pass
    return int(run.state == "failed")


def write_report(named: str | None, runs: Path, to: Path | None) -> int:
    """Write one HTML file about a run that needs no other; by default into its folder."""
    run = read_run(find_run(named, runs))
    path = to or run.folder / "report.html"
    try:
        path.write_text(report_page(run), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; name another place with --to") from error
    print(f"the report is in {path}")
    return 0


def report_page(run: Run) -> str:
    """The page: what came out, curves, who did what, what the ledger counts, and all settings."""
    best, end = run.best, run.end
    facts = {
        "state": run.state,
        "rounds": f"{len(run.rounds)} of {run.planned}",
        "held-out accuracy": _accuracy(run.tested) or "not measured",
        "best": f"{_accuracy(best)} at version {best.version}" if best else "not measured",
        "training time": in_time(run.seconds),
        "steps": f"{run.steps:,}",
        "sent": in_bytes(run.bytes_sent),
        "versions": f"{run.versions:,}",
    }
    if run.without:
        facts[FEWER] = fewer(run.without).removeprefix(FEWER).strip()
    if isinstance(end, Failed):
        facts["why it failed"] = end.message
    parts = [_facts_table(facts)]
    if run.rounds:
        parts += ["<h2>Curves</h2>", curves([run])]
        titles = ("client", "training loss", "held-out loss", "held-out accuracy", "best accuracy")
        parts += ["<h2>Each client, its newest figures</h2>", _table(titles, _clients(run))]
        parts += [
            "<h2>Who did what</h2>",
            _table(("node", "steps that counted", "sent", "received", "told busy", "retries"), _peers(run)),
        ]
    parts += ["<h2>Ledger</h2>", _ledger(run.folder / LEDGER, run.steps)]
    for name in ("job", "node", "versions"):
        if isinstance(settings := run.settings.get(name), dict):
            held = cast("dict[str, Any]", settings)
            parts += [f"<h2>Settings: {name}</h2>", _facts_table({key: str(value) for key, value in held.items()})]
    return _PAGE.format(title=html.escape(f"{run.name} ({run.job.get('name', '')})"), body="\n".join(parts))


def _clients(run: Run) -> list[tuple[str, ...]]:
    """Of each the newest figures that there are, and in which round that was where it is not in the last test."""
    trained: dict[str, float | None] = {}
    losses: dict[str, float | None] = {}
    accuracies: defaultdict[str, list[float]] = defaultdict(list)
    for one in run.rounds:
        trained |= one.train_losses
    tested: dict[str, int] = {}
    for test in run.tests:
        tested |= dict.fromkeys(test.clients, test.round)
        losses |= dict.fromkeys(test.clients) | test.losses
        for name, accuracy in test.clients.items():
            accuracies[name] += [] if accuracy is None else [accuracy]
    return [
        (name + _until(tested.get(name), run), _number(trained.get(name)), _number(losses.get(name)))
        + ((_percent(found[-1]), _percent(max(found))) if (found := accuracies[name]) else ("", ""))
        for name in sorted(trained.keys() | losses, key=natural)
    ]


def _until(round_: int | None, run: Run) -> str:
    last = run.tests[-1].round if run.tests else None
    return "" if round_ in (None, last) else f" {FEWER} until round {round_}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _peers(run: Run) -> list[tuple[str, ...]]:
    """Of all rounds; steps are those that counted, as nodes tell their own number of them now and then only."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    steps = Counter[str]()
    for one in run.rounds:
        for node, counters in one.peers.items():
            sums[node].update({name: int(value) for name, value in counters.items()})
        for client, servers in one.serving.items():
            steps.update({client: sum(servers.values())})
            steps.update(servers)
    return [
        (
            node,
            f"{steps[node]:,}" if steps[node] else "",
            in_bytes(of["bytes_sent"]),
            in_bytes(of["bytes_received"]),
            f"{of['busy']:,}",
            f"{of['retries']:,}",
        )
        for node, of in ((node, sums[node]) for node in sorted(sums.keys() | steps, key=natural))
        if steps[node] or not node.startswith(f"{Role.OBSERVER}-")  # whoever only looked
    ]


def _ledger(path: Path, in_rounds: int) -> str:
    """What it counts; `in_rounds` are the steps of rounds that ended."""
    counted, samples, reasons, late = 0, 0, Counter[str](), 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            record = json.loads(line)
            counted += len(record["counted"])
            samples += int(record["samples"])
            reasons.update(str(reason) for reason in record["dropped"].values())
            late += sum(int(cid.split("-v")[1].split("-")[0]) < record["version"] - 1 for cid in record["counted"])
        except (ValueError, LookupError, TypeError, AttributeError):
            return f"<p>It cannot be read: <code>zsfl audit {html.escape(str(path.parent))}</code> says where.</p>"
    facts = {"steps counted": f"{counted:,}", "of those late": f"{late:,}", "samples counted": f"{samples:,}"}
    if counted > in_rounds:
        facts["steps of a round that has not ended"] = f"{counted - in_rounds:,}"
    facts |= {f"dropped: {reason}": f"{times:,}" for reason, times in reasons.most_common(20)}
    proof = f"<p><code>zsfl audit {html.escape(str(path.parent))}</code> proves it.</p>"
    return _facts_table(facts) + proof


def _facts_table(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<div class=wide><table>{rows}</table></div>"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _mode(run: Run) -> str:
    return str(run.job.get("mode", "")).partition("(")[0].lower()


def _accuracy(tested: RoundReport | Tested | None) -> str:
    """Marked where it is that of fewer clients."""
    return percent(tested.accuracy, tested.without, "") if tested else ""


def _percent(share: float | None) -> str:
    return percent(share, nothing="")


def in_time(seconds: float) -> str:
    """`1 h 02 min`, for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _print_json(found: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(found).decode(), indent=2) + "\n")


_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }}
svg {{ width: 100%; height: auto; background: #fff; border-radius: .5rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
