"""What a job costs on this machine: a few of its steps really made, by all its nodes in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from zsfl.bench.local import body_costs, first_batch
from zsfl.bench.network import RoundTrips, measure
from zsfl.cluster.local import LocalCluster
from zsfl.errors import ConfigError
from zsfl.learning.batches import Batches
from zsfl.learning.job import Job
from zsfl.learning.modes import Exact
from zsfl.reports import RoundReport
from zsfl.roles import choose_device
from zsfl.settings import NodeSettings

CLIENTS = 4
"""That make steps: enough to keep a thread busy."""
FEW, MANY = 1, 8
"""Steps of each client a version: the one way and the other, what a version costs can be told from what a step does."""
WINDOWS = {FEW: 12, MANY: 3}
"""Versions in a round of them."""
MESSAGES = {True: (3, 3, 2), False: (2, 2, 2)}
"""By whether the job is U-shaped: what client, split server and aggregator send and take for one step."""
FOLLOWERS = 2
"""Beside the aggregator: a split server, and all clients in one process."""
ARITHMETIC = ("head_s", "tail_s", "back_s", "spill_s", "pack_s", "body_s")
LINK_SIZES = (1 << 10, 1 << 20, 1 << 24)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Mean seconds of one step, and bytes."""

    counted: Mapping[str, float]
    """Of all nodes, by the names of their counters."""
    rest_s: float
    """What is not arithmetic."""
    client_bytes: float
    server_bytes: float


def job_figures(job: Job, settings: NodeSettings, seconds: float) -> dict[str, Any]:
    """What `Figures` needs to know of a job, but for how many there are and how far apart."""
    device = choose_device(settings.device)
    sizes = _sizes(job)
    few, many = (asyncio.run(_trial(_tiny(job, steps), settings, seconds / 2)) for steps in (FEW, MANY))
    per_version = 1 / (CLIENTS * FEW) - 1 / (CLIENTS * MANY)
    version_s = max(0.0, few.rest_s - many.rest_s) / per_version
    # Of what many steps share, a version is the smaller part, whatever a moment's noise in the few makes of it.
    rest_s = max(many.rest_s / 2, many.rest_s - version_s / (CLIENTS * MANY))
    messages = MESSAGES[sizes["u_shaped"]]
    message_s = rest_s / sum(messages)
    seconds_of = Counter(many.counted)
    up = sizes["activation_bytes"] + sizes["output_bytes"] + sizes["client_spill_bytes"]
    down = sizes["output_bytes"] + sizes["input_grad_bytes"] + sizes["body_spill_bytes"]
    there, back = many.client_bytes / max(up, 1.0), many.server_bytes / max(down, 1.0)
    packed = {"activation_bytes": there, "output_bytes": (there + back) / 2, "client_spill_bytes": there}
    packed |= {"input_grad_bytes": back, "body_spill_bytes": back}
    forward_share = _forward_share(job, device) if sizes["u_shaped"] else 1.0
    return {
        **{name: size * min(1.0, packed.get(name, 1.0)) for name, size in sizes.items() if name != "u_shaped"},
        "u_shaped": sizes["u_shaped"],
        "head_s": seconds_of["head_s"] + seconds_of["pack_s"] / 2,
        "tail_s": seconds_of["tail_s"] + seconds_of["pack_s"] / 2,
        "back_s": seconds_of["back_s"] + seconds_of["spill_s"],
        "forward_s": seconds_of["body_s"] * forward_share,
        "backward_s": seconds_of["body_s"] * (1 - forward_share),
        "on_device": device.type != "cpu",
        "client_message_s": message_s,
        "server_message_s": message_s,
        "part_s": message_s,
        "version_s": version_s / (1 + FOLLOWERS),
        "follow_s": version_s / (1 + FOLLOWERS),
    }


def samples_of(job: Job) -> int:
    """How many training samples the first client has."""
    return len(Batches(job.data(0, job.shards)[0]))


def _sizes(job: Job) -> dict[str, Any]:
    """Bytes of what travels, as it is before any codec."""
    model = job.build_cuts().first
    x, _ = first_batch(job)
    with torch.no_grad():
        activations = model.head(x)
        output = model.body(activations)
    tail: Iterable[nn.Module] = () if model.tail is None else (model.tail,)
    ends = [model.head, *tail]
    head_trains = any(parameter.requires_grad for parameter in model.head.parameters())
    return {
        "u_shaped": model.tail is not None,
        "activation_bytes": float(activations.nbytes),
        "output_bytes": float(output.nbytes) if model.tail is not None else 0.0,
        "input_grad_bytes": float(activations.nbytes) if head_trains else 0.0,
        "client_spill_bytes": float(sum(map(_trained_bytes, ends))),
        "body_spill_bytes": float(_trained_bytes(model.body)),
        "client_weights_bytes": float(sum(map(_bytes, ends))),
        "body_weights_bytes": float(_bytes(model.body)),
    }


def _trained_bytes(part: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in part.parameters() if parameter.requires_grad)


def _bytes(part: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in part.state_dict().values())


def _forward_share(job: Job, device: torch.device) -> float:
    """Of what the body takes."""
    cost = next(body_costs(job, device, 0.05))
    return cost.forward_s / (cost.forward_s + cost.backward_s)


class _First(Dataset[Any]):
    """The first samples of a dataset, over and over, so many times."""

    def __init__(self, data: Dataset[Any], samples: int) -> None:
        self._data, self._samples = data, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, row: int) -> Any:
        return self._data[row % len(self._data)]  # type: ignore[arg-type]


def _tiny(job: Job, steps: int) -> Job:
    """The same steps, few of them: every client has the first data of the first shard, and nothing is tested."""
    data, shards = job.data, job.shards

    def first(_shard: int, _shards: int) -> tuple[Dataset[Any], None]:
        return _First(data(0, shards)[0], steps * WINDOWS[steps] * job.batch_size), None

    return dataclasses.replace(
        job,
        data=first,
        steps=steps,
        shards=CLIENTS,
        batches="equal",
        mode=Exact(),
        average="mean",
        norm_bound=None,
        local_lr=None,
        evaluate_every=None,
        stop_after=None,
        cut=None if job.cut is None else _cut_of_first(job),
    )


def _cut_of_first(job: Job) -> Any:
    cut = job.cut
    return lambda _shard: None if cut is None else cut(0)


async def _trial(job: Job, settings: NodeSettings, seconds: float) -> _Trial:
    """One round to warm up, then as many as take about so long."""
    with tempfile.TemporaryDirectory(prefix="zsfl-plan-") as runs:
        given = {"device": settings.device, "threads": settings.threads, "slots": settings.slots}
        async with LocalCluster(
            job, split_servers=1, client_processes=1, in_process=True, runs=Path(runs), **given
        ) as cluster:
            _ = [report async for report in cluster.train(1)]
            reports, until_s = list[RoundReport](), time.perf_counter() + seconds
            while not reports or time.perf_counter() < until_s:
                reports += [report async for report in cluster.train(1)]
    return _summed(reports)


def _summed(reports: list[RoundReport]) -> _Trial:
    clients, servers = Counter[str](), Counter[str]()
    for report in reports:
        for counters in report.peers.values():
            if "step_s" in counters:
                clients.update(counters)
            elif "body_s" in counters:
                servers.update(counters)
    # Heartbeats bring what nodes counted when they come: each is divided by the steps that it speaks of itself.
    means = [{name: amount / max(of["steps"], 1.0) for name, amount in of.items()} for of in (clients, servers)]
    counted = {name: mean.get(name, 0.0) for mean in means for name in mean if name.endswith("_s")}
    wall_s = statistics.median(report.seconds / report.steps for report in reports)
    rest_s = wall_s - sum(counted.get(name, 0.0) for name in ARITHMETIC)
    return _Trial(counted, max(0.0, rest_s), *(mean.get("bytes_sent", 0.0) for mean in means))


async def link_of(address: str, settings: NodeSettings, seconds: float) -> tuple[float, float]:
    """Bytes a second and seconds one way to where `zsfl bench --serve` runs."""
    given: list[RoundTrips] = []
    async for one in measure(
        address, seconds=seconds, request_s=settings.request_s, settings=settings, sizes=LINK_SIZES
    ):
        given.append(one)
    rates = [one.size_bytes * one.answers_per_s for one in given]
    if not rates:
        raise ConfigError(f"nothing was measured against {address}")
    return max(rates), given[0].median_s / 2
