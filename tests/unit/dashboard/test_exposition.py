"""What Prometheus is told: names by its rules, one line for each node, and nothing without a bound."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import zsfl
from zsfl import reports
from zsfl.dashboard.exposition import COUNTERS, PHASES, exposition
from zsfl.dashboard.history import History
from zsfl.dashboard.watch import Participant, Presence, Snapshot
from zsfl.reports import RoundReport, WindowReport

PACKAGE = Path(zsfl.__file__).parent
GRAFANA = PACKAGE.parent / "tools/deploy/grafana-dashboard.json"


def read(seen: Snapshot, history: History | None = None, process: Any = None) -> dict[str, Metric]:
    text = exposition(seen, history or History(), process).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def node(
    name: str, role: str = "client", presence: Presence = "there", heard_s: float = 0.1, **more: Any
) -> Participant:
    usual: dict[str, Any] = {"id": f"{name}-{heard_s}", "address": "", "since_s": 1.0, "counters": {}, "rates": {}}
    return Participant(name=name, role=role, presence=presence, heard_s=heard_s, **(usual | more))


def seen(*nodes: Participant, run: dict[str, Any] | None = None) -> Snapshot:
    return Snapshot(run=run, nodes=nodes, events=())


def test_names_follow_the_rules_of_prometheus() -> None:
    for name, family in read(seen(node("a")), process=None).items():
        assert re.fullmatch(r"zsfl(_[a-z]+)+", name), name
        assert family.documentation.endswith("."), name
        assert family.type in ("counter", "gauge"), "the parser tells a counter by its _total"
        assert not re.search(r"_(total|count|sum|bucket|counter|gauge|ms|mb|kb|percent|s)$", name), name
        assert "bytes" not in name or name.endswith("_bytes"), "the unit comes last"
        assert "seconds" not in name or name.endswith("_seconds"), name
        for sample in family.samples:
            assert sample.labels.keys() <= {"node", "role", "phase", "client"}


def test_whatever_a_node_counts_is_exposed() -> None:
    counted = {"busy", "refused_without_key", "refused_wrong_key", "refused_handshakes"}  # of several, or by a table
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "bench":
            counted |= set(re.findall(r"(?:counters\.add|\sadd|timing)\(\"([a-z_]+)\"", path.read_text()))
    assert counted == COUNTERS.keys()


def test_what_nodes_count_and_hold() -> None:
    counters = {"steps": 4.0, "bytes_sent": 3e9, "not known": 7.0}
    server = node("server", "split-server", slots=4, busy=6, service_s=0.25, held=2, peers=3, counters=counters)
    gone = node("left", presence="gone", counters={"steps": 9.0})
    late, observer = node("late", presence="late"), node("dash-1", "observer")
    metrics = read(seen(server, gone, late, observer))
    of = ("server", "split-server")
    assert values(metrics["zsfl_node_up"]) == {("late", "client"): 0, ("left", "client"): 0, of: 1}
    assert values(metrics["zsfl_steps"]) == {of: 4, ("late", "client"): 0}
    assert values(metrics["zsfl_sent_bytes"])[of] == 3e9
    assert values(metrics["zsfl_retries"])[of] == 0, "or the first one would be no increase"
    held = {name: values(metrics[f"zsfl_node_{name}"])[of] for name in ("peers", "held_spills", "slots", "free_slots")}
    assert held == {"peers": 3, "held_spills": 2, "slots": 4, "free_slots": 0}
    assert values(metrics["zsfl_node_queued_requests"]) == {of: 6}
    assert values(metrics["zsfl_node_service_seconds"]) == {of: 0.25}


def test_a_node_that_was_started_again_has_one_line() -> None:
    before, now = node("a", heard_s=1.5, counters={"steps": 90.0}), node("a", heard_s=0.2, counters={"steps": 1.0})
    metrics = read(seen(now, before))
    assert [sample.value for sample in metrics["zsfl_steps"].samples] == [1]
    assert len(metrics["zsfl_node_up"].samples) == 1


def test_where_a_run_stands() -> None:
    run = {"phase": "training", "version": 7, "round": 2, "rounds": 9, "window": 1, "windows": 3, "epoch": 0}
    history = History()
    round_ = RoundReport(
        round=2, rounds=9, version=6, train_loss=1.5, loss=1.0, accuracy=None, steps=8, samples=1, seconds=2.5,
        steps_per_s=1.0, bytes_sent=10, late=3, dropped=1, staleness=0.5, without=("b",), serving={}, peers={},
        train_losses={"a": 1.25, "b": None},
    )  # fmt: skip
    tested = reports.Tested(
        round=2, version=6, loss=math.inf, accuracy=0.5, clients={"a": 0.75, 'b"\n': None}, seconds=1.0,
        losses={"a": 2.5, 'b"\n': None},
    )  # fmt: skip
    for report in (tested, round_):
        history.on(report)
    metrics = read(seen(run=run), history)
    assert values(metrics["zsfl_run_phase"]) == {(phase,): phase == "training" for phase in PHASES}
    shown = {name.removeprefix("zsfl_"): values(family)[()] for name, family in metrics.items() if () in values(family)}
    assert shown == {
        "run_version": 7, "run_round": 2, "run_rounds": 9, "run_window": 1, "run_windows": 3, "run_epoch": 0,
        "train_loss": 1.5, "test_loss": math.inf, "test_accuracy_ratio": 0.5, "test_version": 6, "round_seconds": 2.5,
        "round_steps": 8, "round_late_steps": 3, "round_dropped_steps": 1, "round_staleness_versions": 0.5,
        "round_sent_bytes": 10, "round_absent_clients": 1,
    }  # fmt: skip
    assert values(metrics["zsfl_client_test_accuracy_ratio"]) == {("a",): 0.75}
    assert values(metrics["zsfl_client_test_loss"]) == {("a",): 2.5}
    assert values(metrics["zsfl_client_train_loss"]) == {("a",): 1.25}
    history.on(WindowReport(round=3, rounds=9, window=1, windows=3, version=7, loss=1.25, steps_per_s=1.0, serving={}))
    assert values(read(seen(run=run), history)["zsfl_train_loss"]) == {(): 1.25}


def test_each_metric_of_the_dashboard_for_grafana_is_exposed() -> None:
    families = read(seen(node("a")), process=ProcessCollector(registry=None)).values()
    exposed = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    dashboard = json.loads(GRAFANA.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    named = {name for expr in asked for name in re.findall(r"\b(?:zsfl|process)_[a-z_]+", expr)}
    assert len(asked) > 40
    assert named <= exposed | {"process_resident_memory_bytes"}, named - exposed
    roles = {role for expr in asked for role in re.findall(r'role="([^"]+)"', expr)}
    assert roles == {"client", "split-server"}
