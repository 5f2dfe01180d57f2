"""What is seen of nodes and of their run, in the text format of Prometheus. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from zsfl.dashboard.history import History
from zsfl.dashboard.watch import Participant, Snapshot
from zsfl.ids import Role

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
COUNTERS = {
    "steps": ("steps", "Steps that a client made, or of which a split server put the body's gradient in place."),
    "forwards": ("forwards", "Forward passes of the body that a split server answered."),
    "merged": ("merged_requests", "Requests that a split server ran through the body together with others."),
    "recomputed": ("recomputed_steps", "Steps whose forward a client had a split server compute again."),
    "retries": (
        "retries",
        "Requests of a step that a client made again, as a split server was silent, lost or failed.",
    ),
    "busy": (
        "busy",
        "Requests that found no room: turned away by a split server, or a client's turned away elsewhere.",
    ),
    "bytes_sent": ("sent_bytes", "Bytes of messages sent."),
    "bytes_received": ("received_bytes", "Bytes of messages received."),
    "spills": ("spills", "Contributions put in place on the disk and offered."),
    "spilled_bytes": ("spilled_bytes", "Bytes of contributions put in place on the disk."),
    "spills_lost": ("lost_spills", "Spills set aside by their holder, as they came out damaged or not at all."),
    "spills_adopted": ("adopted_spills", "Spills that the aggregator took from the store, of nodes that are gone."),
    "store_refusals": ("store_refusals", "What was not put in the store, as it did not take it: spills, or versions."),
    "spills_corrupt": ("corrupt_spills", "Spills that arrived damaged at the aggregator."),
    "spills_refused": ("refused_spills", "Spills that the aggregator refused for what is in them."),
    "refused": ("refused_requests", "Requests answered with an error."),
    "unauthorised": ("unauthorised", "Messages whose sender may not say that."),
    "refused_roles": ("refused_roles", "Connections refused, as their key is trusted for other roles."),
    "refused_keys": ("refused_keys", "Connections refused, as this machine does not trust their key."),
    "refused_without_key": ("refused_without_key", "Handshakes refused, as one side uses keys and the other does not."),
    "refused_wrong_key": ("refused_wrong_key", "Handshakes refused, as the other side has another key than expected."),
    "refused_handshakes": ("refused_handshakes", "Handshakes refused for other reasons."),
    "authenticator_failures": ("authenticator_failures", "Failures to say whether a key may come in."),
    "protocol_errors": ("protocol_errors", "Messages that make no sense."),
    "connections_cut": ("connections_cut", "Connections cut by this node."),
    "replies_dropped": ("dropped_replies", "Replies dropped, as nobody took them."),
    "replies_unroutable": ("unroutable_replies", "Replies whose asker was gone."),
    "step_s": ("step_seconds", "What steps took a client, from the forward of the head to its spill in place."),
    "head_s": ("head_seconds", "Of that, the forward of the head."),
    "pack_s": ("pack_seconds", "Of that, packing what goes to a split server."),
    "asked_s": ("asked_seconds", "Of that, from asking a split server to its answer."),
    "tail_s": ("tail_seconds", "Of that, the tail, the loss, and their backward."),
    "back_s": ("back_seconds", "Of that, the backward of the head."),
    "spill_s": ("spill_seconds", "Of that, putting the client's gradients in place."),
    "queue_s": ("queue_seconds", "What requests waited at a split server until it came to them."),
    "body_s": ("body_seconds", "What they took it then: forward, backward, codecs and spill."),
    "broadcasts_dropped": ("dropped_broadcasts", "Broadcasts dropped, as they could not leave."),
}
"""What nodes count: the name of the metric, and its help."""
PHASES = ("waiting", "training", "idle", "finished", "failed")
NODE = ("node", "role")


class _Families(NamedTuple):
    """A collector, as the library wants one."""

    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def exposition(seen: Snapshot, history: History, process: Collector | None = None) -> bytes:
    """All of it, those metrics included that have no value yet; `process` adds what it collects."""
    shown = list(_one_of_each(seen.nodes))
    families = [*_of_nodes(shown), *_counters(shown), *_of_run(seen), *_of_rounds(history)]
    return generate_latest(_Families([*families, *(process.collect() if process else ())]))  # pyright: ignore[reportArgumentType]


def _one_of_each(nodes: Iterable[Participant]) -> Iterator[Participant]:
    """No two of one name and role, as one that was started again may be there before the other is seen to be gone."""
    newest: dict[tuple[str, str], Participant] = {}
    for node in sorted(nodes, key=lambda node: -node.heard_s):
        if node.role != Role.OBSERVER:
            newest[node.name, node.role] = node
    yield from sorted(newest.values(), key=lambda node: (node.role, node.name))


def _gauge(name: str, said: str, values: Iterable[tuple[Sequence[str], float | None]], labels: Sequence[str]) -> Metric:
    family = GaugeMetricFamily(f"zsfl_{name}", said, labels=labels)
    for label_values, value in values:
        if value is not None:
            family.add_metric(label_values, value)
    return family


def _single(name: str, said: str, value: float | None) -> Metric:
    return _gauge(name, said, [((), value)], ())


def _of_nodes(nodes: Sequence[Participant]) -> Iterator[Metric]:
    there = [node for node in nodes if node.presence != "gone"]
    slots = [(node, node.slots, node.busy or 0) for node in there if node.slots is not None]

    def of(node: Participant) -> tuple[str, str]:
        return node.name, node.role

    up = [(of(node), float(node.presence == "there")) for node in nodes]
    yield _gauge("node_up", "Whether the node's heartbeats come.", up, NODE)
    peers = [(of(node), float(node.peers)) for node in there]
    yield _gauge("node_peers", "Live peers that the node knows, up to the 256 that a heartbeat names.", peers, NODE)
    held = [(of(node), float(node.held)) for node in there]
    said = "Spills that the node holds and no version has counted, up to the 256 that a heartbeat names."
    yield _gauge("node_held_spills", said, held, NODE)
    said = "Requests that a split server admits at once."
    yield _gauge("node_slots", said, [(of(node), float(most)) for node, most, _ in slots], NODE)
    said = "Requests that a split server would admit now."
    yield _gauge("node_free_slots", said, [(of(node), max(0.0, most - busy)) for node, most, busy in slots], NODE)
    said = "Requests that a split server holds, those that wait included."
    yield _gauge("node_queued_requests", said, [(of(node), float(busy)) for node, _, busy in slots], NODE)
    said = "What one request takes a split server to compute, a moving average."
    yield _gauge("node_service_seconds", said, [(of(node), node.service_s) for node, _, _ in slots], NODE)


def _counters(nodes: Sequence[Participant]) -> Iterator[Metric]:
    """Zeros, too, or the first of something would be no increase."""
    for key, (name, said) in COUNTERS.items():
        family = CounterMetricFamily(f"zsfl_{name}", said, labels=NODE)
        for node in nodes:
            if node.presence != "gone":
                family.add_metric((node.name, node.role), node.counters.get(key, 0.0))
        yield family


def _of_run(seen: Snapshot) -> Iterator[Metric]:
    run = seen.run or {}
    phases = [((phase,), float(run["phase"] == phase)) for phase in PHASES if run]
    yield _gauge("run_phase", "What the aggregator asks of its peers: 1 for the phase that it is.", phases, ("phase",))
    for key, name, said in (
        ("version", "run_version", "The newest version of the weights."),
        ("round", "run_round", "Rounds that are done."),
        ("rounds", "run_rounds", "Rounds that are to be done."),
        ("window", "run_window", "Windows of the present round that are done."),
        ("windows", "run_windows", "Windows of the present round."),
        ("epoch", "run_epoch", "How often another aggregator has taken over."),
    ):
        yield _single(name, said, run.get(key))


def _of_rounds(history: History) -> Iterator[Metric]:
    now, last = history.window, history.rounds[-1] if history.rounds else None
    tested = history.tests[-1] if history.tests else None
    loss = last and last.train_loss
    if now is not None and (last is None or now.version > last.version):
        loss = now.loss
    yield _single("train_loss", "Training loss so far in the present round, mean over samples.", loss)
    yield _single("test_loss", "Held-out loss of the newest tested version.", tested and tested.loss)
    yield _single(
        "test_accuracy_ratio", "Held-out accuracy of that version, over all clients.", tested and tested.accuracy
    )
    yield _single("test_version", "The newest tested version.", tested and tested.version)
    for values, name, said in (
        (tested and tested.clients, "client_test_accuracy_ratio", "Held-out accuracy of that version, of each client."),
        (tested and tested.losses, "client_test_loss", "Held-out loss of that version, of each client."),
        (last and last.train_losses, "client_train_loss", "Training loss of the last round, of each client."),
    ):
        yield _gauge(name, said, [((client,), value) for client, value in (values or {}).items()], ("client",))
    for value, name, said in (
        (last and last.seconds, "round_seconds", "How long the last round took."),
        (last and last.steps, "round_steps", "Steps that counted in the last round."),
        (last and last.late, "round_late_steps", "Of those, the ones that were made at an earlier version."),
        (last and last.dropped, "round_dropped_steps", "Steps that came too late to count in the last round."),
        (last and last.staleness, "round_staleness_versions", "Versions that its steps were behind, on average."),
        (last and last.bytes_sent, "round_sent_bytes", "Bytes that all nodes sent in the last round."),
        (last and len(last.without), "round_absent_clients", "Clients that were not there when it ended."),
    ):
        yield _single(name, said, value)
