"""What the folders of runs say, and what the commands make of it."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zsfl import reports
from zsfl.cli import main
from zsfl.dashboard.runs import find_run, read_run
from zsfl.errors import ConfigError, StorageError
from zsfl.locks import LOCK, is_locked, lock_folder
from zsfl.reports import AnyReport, Failed, Finished, RoundReport, to_line


def round_report(number: int, accuracy: float | None = 0.5, **more: Any) -> RoundReport:
    counters = {"steps": 4.0, "bytes_sent": 600.0, "bytes_received": 400.0}
    usual: dict[str, Any] = {
        "rounds": 3, "version": 2 * number, "train_loss": 1 / number, "loss": 2 / number, "accuracy": accuracy,
        "steps": 1, "samples": 80, "seconds": 40.0, "steps_per_s": 0.2, "bytes_sent": 1200,
        "serving": {"client-0": {"server <b>": 1}}, "peers": {"client-0": counters, "server <b>": counters},
    }  # fmt: skip
    return RoundReport(round=number, **(usual | more))


def a_test(version: int, accuracy: float) -> reports.Tested:
    return reports.Tested(round=version // 2, version=version, loss=1.0, accuracy=accuracy, clients={}, seconds=1.0)


def finished() -> Finished:
    return Finished(rounds=3, version=6, accuracy=0.7, loss=0.6, seconds=120.0, folder="")


def write(runs: Path, name: str, *reports: AnyReport, mode: str = "Exact(return_s=30.0)") -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    job = {"name": "digits", "mode": mode, "shards": 2, "optimizer": "SGD(lr=0.1)", "rounds": 3}
    (folder / "settings.json").write_text(json.dumps({"job": job, "node": {"host": "127.0.0.1"}, "versions": {}}))
    (folder / "metrics.jsonl").write_bytes(b"".join(map(to_line, reports)))
    cids = [f"abc123-v{version:08d}-s00000-k000" for version in (0, 0, 2)]
    records = [
        {"version": version, "counted": [cid], "dropped": {}, "samples": 10} for version, cid in enumerate(cids, 1)
    ]
    records[-1]["dropped"] = {"abc123-v00000000-s00001-k000": "2 versions late; at most 1 count"}
    (folder / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


ROUNDS = [round_report(1, 0.2), a_test(2, 0.2), round_report(2, 0.8), a_test(4, 0.8), round_report(3, 0.7)]


def test_a_run_is_what_its_reports_add_up_to(tmp_path: Path) -> None:
    again = round_report(1, 0.3)  # redone after a resume
    folder = write(tmp_path, "one", round_report(1), again, *ROUNDS[1:], finished())
    run = read_run(folder)
    assert [one.round for one in run.rounds] == [1, 2, 3]
    assert run.rounds[0] == again
    assert (run.state, run.planned, run.versions, run.accuracy) == ("finished", 3, 3, 0.7)
    assert run.best is not None
    assert (run.best.version, run.seconds, run.bytes_sent, run.steps) == (4, 120.0, 3600, 3)


@pytest.mark.parametrize(
    ("reports", "state"),
    [
        ((), "begun"),
        (ROUNDS[:2], "stopped"),
        ((*ROUNDS, finished()), "finished"),
        ((*ROUNDS[:2], Failed(kind="RunFailed", message="the loss became nan")), "failed"),
        ((*ROUNDS[:2], Failed(kind="RunFailed", message="no client"), *ROUNDS[2:]), "stopped"),
    ],
)
def test_how_a_run_ended_counts_until_it_is_taken_up_again(
    tmp_path: Path, reports: tuple[AnyReport, ...], state: str
) -> None:
    assert read_run(write(tmp_path, "one", *reports)).state == state


def test_a_run_is_running_while_its_folder_is_locked_and_looking_keeps_nobody_from_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "one", *ROUNDS)
    assert not is_locked(folder)
    assert not (folder / LOCK).exists(), "a look leaves nothing"
    lock = lock_folder(folder, "")
    assert read_run(folder).state == "running"
    with pytest.raises(ConfigError, match="another process uses"):
        lock_folder(folder, "stop it first")
    os.close(lock)
    assert read_run(folder).state == "stopped"
    os.close(lock_folder(folder, ""))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of a run"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no run in .*: name the folder of one"):
        find_run(None, tmp_path)
    folder = write(tmp_path, "one", *ROUNDS)
    with pytest.raises(ConfigError, match=r"there is no run two: .* has one"):
        find_run("two", tmp_path)
    (folder / "metrics.jsonl").write_bytes(
        b'{"event":"round","loss":NaN}\nnonsense\n\xff\n' + to_line(ROUNDS[0]) + b"{"
    )
    assert [one.round for one in read_run(folder).rounds] == [1]
    for text in ("", "[]", '{"job": 3}'):
        (folder / "settings.json").write_text(text)
        with pytest.raises(StorageError):
            read_run(folder)


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = main(list(args))
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_status_says_how_it_stands_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(tmp_path))
    write(tmp_path, "one", *ROUNDS[:4], Failed(kind="RunFailed", message="the loss became nan"))
    code, text = said(capsys, "status", *runs)
    assert code == 1
    for part in (
        "failed, 2 of 3 rounds, 3 versions", "it failed: the loss became nan", "go on with: --run one --resume",
        "best: 80.00% at version 4", "round 2: training loss 0.5000, held-out loss 1.0000, accuracy 80.00%",
        "1 min 20 s",
    ):  # fmt: skip
        assert part in text
    write(tmp_path, "two", *ROUNDS, finished())
    code, text = said(capsys, "status", "two", *runs)
    assert (code, "--resume" in text) == (0, False)
    code, text = said(capsys, "status", str(tmp_path / "two"), "--json", *runs)
    found = json.loads(text)
    assert (found["state"], found["rounds"], found["best_version"], found["ended"]["event"]) == (
        "finished", 3, 4, "finished"
    )  # fmt: skip
    code, text = said(capsys, "status", "three", *runs)
    assert (code, "there is no run three" in text) == (2, True)


def test_runs_lists_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, plot = ("--runs", str(tmp_path / "runs")), tmp_path / "both.png"
    code, text = said(capsys, "runs", *runs)
    assert (code, "there is no run" in text) == (2, True)
    write(tmp_path / "runs", "one", *ROUNDS, finished())
    write(tmp_path / "runs", "two", *ROUNDS[:1], mode="Async(max_staleness=4)")
    (write(tmp_path / "runs", "broken") / "settings.json").write_text("{")
    code, text = said(capsys, "runs", "--plot", str(plot), *runs)
    lines = text.splitlines()
    assert code == 0
    assert lines[1].split() == [
        "one",
        "digits",
        "exact",
        "finished",
        "3/3",
        "70.00%",
        "80.00%",
        "2",
        "min",
        "00",
        "s",
        "3.6",
        "kB",
    ]
    assert lines[2].split()[:5] == ["two", "digits", "async", "stopped", "1/3"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, text = said(capsys, "runs", "two", "--json", *runs)
    assert [one["run"] for one in json.loads(text)] == ["two"]
    code, text = said(capsys, "runs", "--plot", str(tmp_path / "both.exe"), *runs)
    assert (code, "cannot draw into" in text) == (2, True)
    nowhere = tmp_path / "no" / "both.png"
    code, text = said(capsys, "runs", "--plot", str(nowhere), *runs)
    assert text == f"zsfl: cannot draw into {nowhere}: No such file or directory; name another with --plot\n"


def test_figures_of_fewer_clients_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(tmp_path))
    best = msgspec.structs.replace(a_test(4, 0.8), without=("client-1",))
    last = round_report(3, 0.7, without=("client-0", "client-1"))
    folder = write(tmp_path, "one", *ROUNDS[:2], best, last, finished())
    for command in (("runs",), ("runs", "one"), ("status",), ("report",)):
        _, text = said(capsys, *command, *runs)
        if command == ("report",):
            text = _Page((folder / "report.html").read_text(encoding="utf-8")).text
            assert "† without client-[0-1]" in " ".join(text.split())
        else:
            assert text.count("† without client-[0-1]") == 1
        assert ("70.00%†" in text, "80.00%†" in text) == (True, True)
    found = json.loads(said(capsys, "status", "--json", *runs)[1])
    assert (found["without"], found["best_without"]) == (["client-0", "client-1"], ["client-1"])


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_a_report_is_one_page_that_needs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, "one", *ROUNDS, finished())
    code, _ = said(capsys, "report", "--runs", str(tmp_path))
    page = _Page((folder / "report.html").read_text(encoding="utf-8"))
    assert code == 0
    assert "svg" in page.tags
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links), "nothing is loaded from anywhere"
    for part in ("server <b>", "80.00% at version 4", "steps counted", "dropped: 2 versions late", "SGD(lr=0.1)"):
        assert part in page.text
    cells = " ".join(page.text.split())
    assert "client-0 3 1.8 kB 1.2 kB 0 0 server <b> 3 1.8 kB" in cells, "steps are those that the ledger counts"
    assert "steps counted 3 of those late 1 samples counted 30 dropped" in cells
    said(capsys, "report", "--runs", str(write(tmp_path / "more", "two", *ROUNDS[:2]).parent))
    cells = " ".join(_Page((tmp_path / "more" / "two" / "report.html").read_text(encoding="utf-8")).text.split())
    assert "steps counted 3 of those late 1 samples counted 30 steps of a round that has not ended 2 dropped" in cells
    (folder / "ledger.jsonl").write_text("nonsense\n")
    code, _ = said(capsys, "report", "one", "--to", str(tmp_path / "there.html"), "--runs", str(tmp_path))
    assert "It cannot be read:" in (tmp_path / "there.html").read_text(encoding="utf-8")
    code, text = said(capsys, "report", "one", "--to", str(tmp_path / "no" / "there.html"), "--runs", str(tmp_path))
    assert (code, "name another place with --to" in text) == (1, True)


def test_a_report_has_the_loss_and_the_accuracy_of_each_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tested(version: int, **of: tuple[float | None, float]) -> reports.Tested:
        of_each = {"clients": {name: right for name, (right, _) in of.items()}}
        losses: dict[str, float | None] = {name: loss for name, (_, loss) in of.items()}
        said = {"round": version // 2, "loss": 1.0, "accuracy": 0.5, "seconds": 1.0}
        return reports.Tested(version=version, losses=losses, **of_each, **said)  # type: ignore[arg-type]

    folder = write(
        tmp_path,
        "one",
        tested(2, c2=(0.75, 0.5), c10=(0.5, 1.0), c1=(None, 4.0)),
        round_report(1, train_losses={"c2": 1.0, "c10": 2.0}),
        tested(4, c2=(0.25, 0.125)),
        round_report(2, train_losses={"c2": 0.5, "c10": None}),
    )
    said(capsys, "report", "--runs", str(tmp_path))
    cells = " ".join(_Page((folder / "report.html").read_text(encoding="utf-8")).text.split())
    left = "† until round 1"
    assert f"best accuracy c1 {left} 4.0000 c2 0.5000 0.1250 25.00% 75.00% c10 {left} 1.0000 50.00% 50.00% " in cells


def test_odd_folders_hide_no_good_run_and_hang_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "good", *ROUNDS)
    os.unlink(write(tmp_path, "pipe") / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe" / "metrics.jsonl")
    (tmp_path / "odd" / "settings.json").mkdir(parents=True)
    (write(tmp_path, "words") / "settings.json").write_text('{"job": {"rounds": "abc"}}')
    code, text = said(capsys, "runs", "--runs", str(tmp_path))
    assert code == 0
    assert {line.split()[0] for line in text.splitlines()[1:]} == {"good", "pipe", "words"}
