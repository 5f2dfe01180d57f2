from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from zsfl import reports
from zsfl.dashboard.printer import NodePrinter, ProgressPrinter, how_to_go_on
from zsfl.dashboard.progress import (
    FINAL_ROUNDS,
    LEFT,
    REPEAT_S,
    RunView,
    plain_line,
    ready_line,
    render,
    server_shares,
)
from zsfl.reports import (
    AnyReport,
    Assembled,
    Before,
    Exited,
    Failed,
    Finished,
    Following,
    Met,
    Note,
    Ready,
    RoundReport,
    Starting,
    Waiting,
    WindowReport,
)
from zsfl.words import short_names

CLIENTS = [f"client-{number}" for number in range(20)]


def window(number: int, *, round: int = 1, server: str = "server-0") -> WindowReport:
    return WindowReport(
        round=round,
        rounds=4,
        window=number,
        windows=10,
        version=number,
        loss=1.5,
        steps_per_s=1234.0,
        serving=dict.fromkeys(CLIENTS, server),
    )


def whole_round(number: int, accuracy: float | None = 0.9625) -> RoundReport:
    return RoundReport(
        round=number,
        rounds=4,
        version=number * 10,
        train_loss=0.5,
        loss=None if accuracy is None else 0.6,
        accuracy=accuracy,
        steps=200,
        samples=2000,
        seconds=1.0,
        steps_per_s=1234.0,
        bytes_sent=12_300_000,
        serving={client: {"server-0": 3, "server-1": 1} for client in CLIENTS},
        peers={},
    )


FINISHED = Finished(rounds=4, version=40, accuracy=0.9625, loss=0.6, seconds=6.2, folder="runs/digits-2")


def folded(*reports: AnyReport, step_s: float = 1.0) -> RunView:
    view = RunView()
    for number, report in enumerate(reports):
        view.on(report, number * step_s)
    return view


def drawn(view: RunView, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(render(view))
    return captured.get()


def test_time_left_follows_the_pace_since_the_first_window() -> None:
    assert folded(window(1)).left_s is None
    view = folded(window(1), window(3), window(5))
    assert view.done == pytest.approx(0.5)
    assert view.left_s == pytest.approx(3.5 / (0.4 / 2))


def test_a_resumed_run_is_timed_from_where_it_goes_on() -> None:
    view = folded(window(1, round=3), window(2, round=3), window(7, round=3))
    assert view.left_s == pytest.approx((4 - 2.7) / 0.5)
    view.on(window(1), 9.0)  # another run
    assert view.left_s is None


def test_whoever_comes_late_does_not_take_the_rest_of_a_round_for_a_whole_one() -> None:
    view = RunView()
    for round_, at_s in ((2, 0.0), (3, 1.0), (3, 50.0)):  # as in async mode, where whole rounds are all that is told
        view.on(following(round_, 70), at_s)
        assert view.left_s is None
    view.on(following(4, 70), 101.0)
    assert view.left_s == pytest.approx(100.0)


def test_waiting_is_forgotten_once_the_run_moves() -> None:
    waiting = Waiting(node="aggregator", what="a split server", seconds=12, hints=("is one started?",))
    view = folded(Ready(node="client-0", role="client", address="x:1", pid=1), waiting)
    text = drawn(view)
    assert "aggregator waits for a split server (12 s)" in text
    assert "check: is one started?" in text
    assert "ready: client-0" in text
    view.on(Assembled(node="aggregator", clients=1, split_servers=1), 3.0)
    assert "waits" not in drawn(view)


def test_it_is_said_whether_keys_are_used_and_whose_machine_a_peer_is_on() -> None:
    ready = Ready(node="a", role="aggregator", address="x:1", pid=1)
    assert ready_line(ready) == "a is ready at x:1, without keys: nothing is encrypted"
    assert ready_line(msgspec.structs.replace(ready, machine="ID")) == "a is ready at x:1, encrypted, as machine ID"
    met = Met(node="a", peer="c", role="client", address="x:2", machine="ID", known_as="laptop")
    assert plain_line(met) == "a: c joined from x:2, on laptop, machine ID"
    assert plain_line(msgspec.structs.replace(met, known_as="")) == "a: c joined from x:2, on machine ID"
    for silent in (msgspec.structs.replace(met, here=True), msgspec.structs.replace(met, role="observer")):
        assert plain_line(silent) is None


def test_live_serving_is_of_the_last_windows_and_final_serving_of_the_whole_run() -> None:
    earlier = msgspec.structs.replace(whole_round(1), serving={client: {"server-2": 4} for client in CLIENTS})
    view = folded(Before(reports=(earlier, held_out(ends_round=True))), whole_round(2), window(1, round=3))
    view.on(window(2, round=3, server="server-1"), 4.0)
    assert view.serving["client-0"] == {"server-0": 1, "server-1": 1}
    assert "share, lately" in drawn(view)
    for report in (whole_round(3), whole_round(3), FINISHED):  # after a kill one may be told twice
        view.on(report, 6.0)
    assert server_shares(view.serving) == [
        ("server-0", 0.5, "50% of client-[0-19]"),
        ("server-1", pytest.approx(1 / 6), "20% of client-[0-19]"),
        ("server-2", pytest.approx(1 / 3), "30% of client-[0-19]"),
    ]
    assert "share, rounds 1-3" in drawn(view)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], ""),
        (["b", "a", "a"], "a, b"),
        (["c-1"], "c-1"),
        (["c-10", "c-2", "c-1", "c-0", "d"], "c-[0-2,10], d"),
        (["c-01", "c-0"], "c-0, c-01"),
        (["7", "8"], "[7-8]"),
    ],
)
def test_short_names(names: list[str], short: str) -> None:
    assert short_names(names) == short


def test_plain_lines() -> None:
    assert plain_line(window(1)) is None
    assert plain_line(Exited(node="x", code=0)) is None
    assert plain_line(Exited(node="x", code=-9)) == "x was ended by signal 9"
    assert plain_line(Note(node="x", message="hello")) == "x: hello"
    assert plain_line(Failed(node="x", kind="RunFailed", message="no")) == "x failed: no (RunFailed)"
    assert plain_line(whole_round(2)) == (
        "round 2/4: train loss 0.5000, test loss 0.6000, test accuracy 96.25%, 1,234 steps/s, 12.3 MB sent, "
        "served by server-0 75%, server-1 25%"
    )
    assert "test loss -, test accuracy -" in (plain_line(whole_round(2, accuracy=None)) or "")


def test_figures_of_fewer_clients_are_marked_and_the_mark_is_explained() -> None:
    absent = msgspec.structs.replace(whole_round(4), without=("client-3", "client-4"))
    assert "test accuracy 96.25%†, " in (plain_line(absent) or "")
    assert (plain_line(absent) or "").endswith("; † without client-[3-4]")
    inside = msgspec.structs.replace(held_out(ends_round=False), without=("client-3",))
    assert (plain_line(inside) or "").endswith("test accuracy 87.50%†; † without client-3")
    of_best = {"best_accuracy": 0.97, "best_version": 20, "best_without": ("client-5",)}
    finished = msgspec.structs.replace(FINISHED, without=("client-3",), **of_best)
    text = drawn(folded(whole_round(3), absent, finished), width=100)
    assert text.splitlines()[0].endswith("† without")
    assert [line.split()[0] for line in text.splitlines() if "96.25%" in line and "†" not in line] == ["3/4"]
    assert "97.00%† at version 20" in text
    assert "† without client-[3,5]" in text
    assert "96.25%† (best 97.00%† at version 20), test loss 0.6000; † without client-[3,5]; see" in (
        plain_line(finished) or ""
    )


def held_out(*, ends_round: bool) -> reports.Tested:
    return reports.Tested(
        round=1, version=14, loss=0.25, accuracy=0.875, clients={}, seconds=2.0, ends_round=ends_round
    )


def test_a_test_inside_a_round_is_a_line_and_that_of_the_round_is_in_its_report() -> None:
    line = "version 14, in round 2: test loss 0.2500, test accuracy 87.50%"
    assert plain_line(held_out(ends_round=False)) == line
    assert plain_line(held_out(ends_round=True)) is None
    view = folded(window(1), held_out(ends_round=False), held_out(ends_round=True))
    assert list(view.notes) == [(line, False)]


def test_a_round_whose_test_took_long_does_not_hide_the_next_one() -> None:
    view = folded(window(9), window(3, round=2), whole_round(1))
    assert view.window == window(3, round=2)
    assert view.done == pytest.approx(1.3)
    view.on(whole_round(2), 9.0)
    assert (view.window, view.done) == (None, 2.0)


@pytest.mark.parametrize(
    ("best", "early", "said"),
    [
        (0.9625, False, "finished: 4 rounds in 6.2 s, test accuracy 96.25%, test loss"),
        (0.97, False, "in 6.2 s, test accuracy 96.25% (best 97.00% at version 20), test loss"),
        (0.97, True, "in 6.2 s, ended early since its tests got no better, test accuracy 96.25% (best"),
        (None, False, "in 6.2 s, test accuracy 96.25%, test loss"),
    ],
)
def test_the_end_says_which_version_was_best_and_why_it_came_early(best: float, early: bool, said: str) -> None:
    finished = msgspec.structs.replace(FINISHED, best_accuracy=best, best_version=20, early=early)
    assert said in (plain_line(finished) or "")
    text = drawn(folded(whole_round(4), finished))
    assert ("97.00% at version 20: best.safetensors" in text) == (best == 0.97)
    assert ("ended early" in text) == early
    assert max(map(len, text.splitlines())) <= 80


def test_the_live_view_fits_into_80_columns_and_24_lines() -> None:
    notes = [Note(node="aggregator", message=f"note [{number}]") for number in range(9)]
    rounds = [report for number in (1, 2, 3, 4) * 3 for report in (window(9, round=number), whole_round(number))]
    lines = drawn(folded(*rounds, *notes, window(5, round=4))).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "note [8]" in text
    assert "note [4]" not in text
    assert "round 4/4  loss 1.5000  1,234 steps/s" in text


def test_the_result_names_the_folder_and_what_is_in_it() -> None:
    text = drawn(folded(window(1), whole_round(4), FINISHED))
    assert "96.25%" in text
    assert "runs/digits-2/" in text
    assert all(name in text for name, _ in LEFT)
    assert max(map(len, text.splitlines())) <= 80


def test_only_warnings_are_left_at_the_end() -> None:
    notes = [Note(node="aggregator", message="hello"), Note(node="aggregator", message="help", level="warning")]
    text = drawn(folded(window(1), *notes, Exited(node="split-server-0", code=-9), whole_round(4), FINISHED))
    assert "hello" not in text
    assert "aggregator: help" in text
    assert "split-server-0 was ended by signal 9" in text


class ClosedPipe(io.StringIO):
    def write(self, _: str, /) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_reader_that_leaves_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.dup2", lambda *_: None)  # rich would turn pytest's own output off
    with ProgressPrinter(Console(file=ClosedPipe(), width=80)) as printer:
        printer.on(whole_round(1))
        printer.on(whole_round(2))
    assert len(printer.view.rounds) == 2


def ticking(step_s: float) -> Callable[[], float]:
    times = iter(number * step_s for number in range(1000))
    return lambda: next(times)


def test_without_a_terminal_each_round_is_a_line_and_waiting_is_not_repeated_at_once() -> None:
    console = Console(file=io.StringIO(), width=40)
    waiting = Waiting(node="aggregator", what="a split server", seconds=1)
    hinted = Waiting(node="aggregator", what="a split server", seconds=9, hints=("is one started?",))
    with console.capture() as captured, ProgressPrinter(console, ticking(REPEAT_S / 4)) as printer:
        for report in (waiting, waiting, hinted, hinted, window(1), whole_round(1), FINISHED):
            printer.on(report)
    lines = captured.get().splitlines()
    assert [line.split(":")[0].strip() for line in lines[:5]] == [
        "aggregator waits for a split server (1 s)",
        "aggregator waits for a split server (9 s)",
        "check",
        "round 1/4",
        "finished",
    ]
    assert any(line.startswith("split server") for line in lines[5:])  # the tables, once


def test_on_a_terminal_the_last_frame_stays() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    with ProgressPrinter(console, ticking(1.0)) as printer:
        for report in (window(1), whole_round(1), FINISHED):
            printer.on(report)
    assert "runs/digits-2" in file.getvalue()


def test_nothing_is_drawn_when_no_report_came() -> None:
    file = io.StringIO()
    with ProgressPrinter(Console(file=file, width=80)):
        pass
    assert file.getvalue() == ""


def test_a_mistake_that_every_node_finds_is_told_once() -> None:
    names = ["aggregator", "server-0", "client-0"]
    wrong = [Failed(node=name, kind="ConfigError", message="no such job") for name in names]
    gone = [Exited(node=name, code=2) for name in names]

    def told(*given: AnyReport, error: Exception | None = None) -> str:
        console = Console(width=80)
        with console.capture() as captured:
            try:
                with ProgressPrinter(console) as printer:
                    for report in given:
                        printer.on(report)
                    if error is not None:
                        raise error
            except ValueError:
                pass
        return captured.get()

    assert told(*wrong, *gone, error=ValueError("aggregator: no such job")) == "", "by whoever catches the error"
    assert told(*wrong, *gone, error=ValueError("something else")) == "aggregator failed: no such job (ConfigError)\n"
    assert told(wrong[1], gone[1]).count("no such job") == 1
    text = told(wrong[1], gone[1], window(1), Exited(node="client-3", code=-9), error=ValueError("client-3"))
    assert text == "server-0 failed: no such job (ConfigError)\nclient-3 was ended by signal 9\n"
    view = folded(*wrong, *gone)
    assert view.failed == wrong[0]
    assert not view.notes


def test_what_a_run_does_before_its_first_version_is_shown_with_how_long_it_has_taken() -> None:
    view = RunView("loading PyTorch and job.py")
    assert drawn(view) == "loading PyTorch and job.py\n"
    view.tick(10.0)
    view.tick(14.4)
    assert drawn(view) == "loading PyTorch and job.py (4 s)\n"
    view.on(Starting(nodes=8), 15.0)
    for name in ("client-0", "client-1"):
        view.on(Ready(node=name, role="client", address="a:1", pid=1), 15.0)
    assert drawn(view) == "ready, 2 of 8 nodes: client-[0-1] (5 s)\n"
    view.on(Assembled(clients=2, split_servers=1, folder="runs/mine"), 16.0)
    assert drawn(view).splitlines()[0] == "the first steps are made (6 s)"


def test_after_the_last_window_it_says_what_is_still_to_do() -> None:
    view = RunView()
    view.on(window(1, round=4), 0.0)
    view.on(window(3, round=4), 2.0)
    view.on(window(5, round=4), 4.0)
    assert "round 4/4" in drawn(view)
    assert "0:05 left" in drawn(view)
    view.on(window(10, round=4), 9.0)
    assert "last test and plot" in drawn(view)


def following(round: int, window: int, windows: int = 10) -> Following:
    return Following(node="client-0", round=round, rounds=4, window=window, windows=windows, version=7)


def test_at_a_terminal_a_node_says_a_line_for_each_thing_and_how_far_its_run_is() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    reports = (
        Ready(node="client-0", role="client", address="a:1", pid=1),
        following(1, 0),
        following(2, 0),
        following(3, 0),
        Note(node="client-0", message="the run is finished, at version 40"),
        Failed(node="client-0", kind="RunFailed", message="told elsewhere"),
    )
    with NodePrinter(console, ticking(10.0)) as printer:
        for report in reports:
            printer.on(report)
    text = file.getvalue()
    assert text.startswith("client-0 is ready at a:1")
    assert "round 1/4" in text
    assert "0:20 left" in text
    assert "client-0: the run is finished, at version 40" in text
    assert "told elsewhere" not in text
    assert text.endswith("\x1b[2K")  # the last line is gone


def test_in_a_log_a_node_says_a_line_for_each_thing_and_does_not_go_on_about_what_it_waits_for() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=False)

    def waits(seconds: float, *hints: str) -> Waiting:
        return Waiting(node="client-0", what="an aggregator", seconds=seconds, hints=hints)

    alone = [waits(10.0 * turn, "is one there?") for turn in range(1, 122)]
    with NodePrinter(console, ticking(10.0)) as printer:
        for report in (waits(3), *alone, following(1, 0), window(1), waits(3)):
            printer.on(report)
    assert file.getvalue().splitlines() == [
        "client-0 waits for an aggregator (3 s)",
        *("client-0 waits for an aggregator (10 s)", "    check: is one there?"),
        *("client-0 waits for an aggregator (610 s)", "    check: is one there?"),
        *("client-0 waits for an aggregator (1210 s)", "    check: is one there?"),
        "client-0 waits for an aggregator (3 s)",
    ]


def test_in_async_mode_where_windows_count_on_only_rounds_tell_how_far_a_run_is() -> None:
    view = RunView()
    view.on(following(2, 70), 0.0)
    assert (view.done, view.total) == (1.0, 4)


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (["up", "job.py"], "up job.py --run mine --resume"),
        (["up", "job.py", "--run", "mine", "--rounds", "9"], "up job.py --rounds 9 --run mine --resume"),
        (["up", "--run=mine", "--resume", "a b.py"], "up 'a b.py' --run mine --resume"),
        (["demo", "--no-resume"], "demo --run mine --resume"),
    ],
)
def test_whoever_interrupts_a_run_is_told_how_to_go_on(given: list[str], again: str, tmp_path: Path) -> None:
    view, folder = RunView(), tmp_path / "mine"
    assert how_to_go_on(view, given) == ", before anything was trained"
    view.on(Assembled(clients=2, split_servers=1, folder=str(folder)), 0.0)
    assert how_to_go_on(view, given) == ", before anything was trained"
    folder.mkdir()
    (folder / "ledger.jsonl").write_text("{}\n")
    assert how_to_go_on(view, given) == f", and {folder} is kept; go on with: zsfl {again}"
    view.on(FINISHED, 1.0)
    assert how_to_go_on(view, given) == ""


def test_a_long_run_takes_no_more_memory_and_who_served_whom_is_added_up_over_all_of_it() -> None:
    view, rounds = RunView(), 3 * FINAL_ROUNDS
    for number in (*range(1, rounds), 1, *range(rounds - 5, rounds + 1)):  # some are told twice
        view.on(whole_round(number), float(number))
    assert len(view.rounds) <= FINAL_ROUNDS
    assert len(view._served.all) <= FINAL_ROUNDS + 1
    assert view.served == f"rounds 1-{rounds}"
    once = whole_round(1).serving
    assert view.serving == {who: {by: rounds * n for by, n in servers.items()} for who, servers in once.items()}
