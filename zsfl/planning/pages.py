"""What `zsfl plan` prints."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import sys
import textwrap
from typing import Any

import msgspec

from zsfl.bounds import is_address
from zsfl.discovery.table import MAX_PEERS
from zsfl.errors import ConfigError
from zsfl.learning.modes import Async, Exact, Mode, mode_name, mode_named
from zsfl.planning.comparing import SAID, Comparison, compare, shown
from zsfl.planning.figures import Figures
from zsfl.planning.simulation import Outcome
from zsfl.settings import NodeSettings
from zsfl.words import number_of

ASSUMED = {"part_s": 0.2e-3, "version_s": 3e-3, "follow_s": 1e-3}
"""Of the aggregator and of those who follow it, where no job is measured: about what a small network costs."""
FORWARD_SHARE = 1 / 3
"""Of a step's time, where it is not measured."""
JITTER = 0.1
WIDTH = 100
BYTES_IN_MBIT = 1e6 / 8


def print_plan(args: argparse.Namespace, settings: NodeSettings) -> int:
    """Measure what is not given, simulate, print; the exit code."""
    told = (lambda _: None) if args.json else _waiting
    name, figures, known = _figures(args, settings)
    comparison = compare(figures, told)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(_data(name, figures, comparison))).decode())
        return 0
    _clear()
    print("\n".join([*_head(name, figures, known), "", *_rows(figures, comparison), "", *_words(figures, comparison)]))
    return 0


# --- what it is made from ---------------------------------------------------------------------------------------


def _figures(args: argparse.Namespace, settings: NodeSettings) -> tuple[str, Figures, dict[str, str]]:
    """The name of the job, the figures, and where each kind of them is from."""
    name, given, known = "", dict[str, Any](), dict[str, str]()
    mode: Mode = Exact()
    clients, samples = settings.clients, args.samples or 0
    if args.job is not None:
        name, mode, shards, samples, given = _of_job(args, settings)
        clients = clients or shards
        known |= dict.fromkeys(("client", "split server", "aggregator"), "measured here")
    else:
        given = dict[str, Any](ASSUMED)
        known["aggregator"] = "assumed"
    if settings.mode and settings.mode != mode_name(mode):
        mode = mode_named(settings.mode)
        given["steps"] = 1 if isinstance(mode, Async) else given.get("steps", 1)
    _take_given(args, given, known)
    given.update(_links(args, settings, known))
    try:
        figures = Figures(
            clients=clients,
            split_servers=args.split_servers,
            client_nodes=args.client_processes or 0,
            mode=mode,
            samples=samples,
            slots=settings.slots,
            cores=args.cores or 0.0,
            jitter=JITTER,
            seed=args.seed,
            **given,
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace("the plan's ", "")) from None
    return name, figures, known


def _of_job(args: argparse.Namespace, settings: NodeSettings) -> tuple[str, Mode, int, int, dict[str, Any]]:
    import torch

    from zsfl.learning.job import load_job
    from zsfl.planning.measuring import job_figures, samples_of

    torch.set_num_threads(settings.threads)
    job = load_job(args.job)
    if settings.clients:
        job = dataclasses.replace(job, shards=settings.clients)
    given = job_figures(job, settings, args.seconds)
    given |= {"steps": job.steps, "batch": job.batch_size}
    return job.name, job.how, job.shards, args.samples or samples_of(job), given


def _take_given(args: argparse.Namespace, given: dict[str, Any], known: dict[str, str]) -> None:
    """What the command line says is so, whatever was measured."""
    if args.client_ms is not None:
        names = ("head_s", "tail_s", "back_s")
        _scale(given, names, args.client_ms / 1e3, (1 / 3, 1 / 3, 1 / 3))
        given["client_message_s"], known["client"] = 0.0, "given"
    if args.server_ms is not None:
        _scale(given, ("forward_s", "backward_s"), args.server_ms / 1e3, (FORWARD_SHARE, 1 - FORWARD_SHARE))
        given |= {"server_message_s": 0.0, "on_device": True}
        known["split server"] = "given"
    if args.aggregator_ms is not None:
        given["part_s"], known["aggregator"] = args.aggregator_ms / 2e3, "given"
    if args.activations_kib is not None:
        each = args.activations_kib * 1024.0
        given |= {"activation_bytes": each, "output_bytes": each if given.get("u_shaped", True) else 0.0}
        if given.get("input_grad_bytes", 1.0):
            given["input_grad_bytes"] = each
    if args.body_kib is not None:
        given |= dict.fromkeys(("body_weights_bytes", "body_spill_bytes"), args.body_kib * 1024.0)
    if args.ends_kib is not None:
        given |= dict.fromkeys(("client_weights_bytes", "client_spill_bytes"), args.ends_kib * 1024.0)


def _scale(given: dict[str, Any], names: tuple[str, ...], total_s: float, shares: tuple[float, ...]) -> None:
    """Make these add up to so much, in the proportions that were measured."""
    measured = sum(given.get(name, 0.0) for name in names)
    for name, share in zip(names, shares, strict=True):
        given[name] = total_s * (given[name] / measured if measured else share)


def _links(args: argparse.Namespace, settings: NodeSettings, known: dict[str, str]) -> dict[str, float]:
    links: dict[str, float] = {}
    if args.bench is not None:
        from zsfl.planning.measuring import link_of

        if not is_address(args.bench):
            raise ConfigError(f"--bench is {args.bench!r}: expected HOST:PORT, such as 192.168.1.20:7710")
        rate, latency_s = asyncio.run(link_of(args.bench, settings, min(1.0, args.seconds)))
        links = {"link_bytes_per_s": rate, "latency_s": latency_s}
        known["link"] = f"measured to {args.bench}"
    if args.link is not None:
        links["link_bytes_per_s"], known["link"] = args.link * BYTES_IN_MBIT, "given"
    links["server_link_bytes_per_s"] = links.get("link_bytes_per_s", math.inf)
    if args.server_link is not None:
        links["server_link_bytes_per_s"] = args.server_link * BYTES_IN_MBIT
    if args.latency_ms is not None:
        links["latency_s"] = args.latency_ms / 1e3
        known.setdefault("link", "given")
    return links


# --- what is said of it -----------------------------------------------------------------------------------------


def _head(name: str, figures: Figures, known: dict[str, str]) -> list[str]:
    steps = "" if isinstance(figures.mode, Async) else f", {number_of(figures.steps, 'step')} of each client a version"
    who = f"{number_of(figures.clients, 'client')}"
    if figures.client_nodes:
        who += f" in {number_of(figures.client_nodes, 'process', 'processes')}"
    of = f"job {name}" if name else "a run"
    there, back = figures.activation_bytes, figures.output_bytes or figures.input_grad_bytes
    bodies = figures.body_weights_bytes, figures.client_weights_bytes
    lines = [
        (f"{of} with {who}, {mode_name(figures.mode)} mode{steps}; a step costs", "", ""),
        ("client", f"{1e3 * figures.client_s:.3g} ms", known.get("client", "")),
        ("split server", f"{1e3 * figures.server_s:.3g} ms", known.get("split server", "")),
        (
            "aggregator",
            f"{2e3 * figures.part_s:.3g} ms, and {1e3 * figures.version_s:.3g} ms a version",
            known.get("aggregator", ""),
        ),
        ("activations", f"{_bytes(there)} to the split server, {_bytes(back)} back", ""),
        ("weights", f"body {_bytes(bodies[0])}, head and tail {_bytes(bodies[1])}", ""),
        ("link", _link(figures), known.get("link", "not given")),
    ]
    if figures.cores:
        lines.append(("cores", f"{figures.cores:g}, shared by all nodes", "given"))
    first, *rest = lines
    width = max(len(what) for _, what, _ in rest)
    return [first[0], "", *(f"  {label:13} {what:{width}}  {source}".rstrip() for label, what, source in rest)]


def _link(figures: Figures) -> str:
    def rate(bytes_per_s: float) -> str:
        return "unlimited" if math.isinf(bytes_per_s) else f"{shown(bytes_per_s / BYTES_IN_MBIT)} Mbit/s"

    said = rate(figures.link_bytes_per_s)
    if figures.server_link_bytes_per_s != figures.link_bytes_per_s:
        said += f", of split servers and aggregator {rate(figures.server_link_bytes_per_s)}"
    return f"{said}, {1e3 * figures.latency_s:.3g} ms"


def _bytes(size: float) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def _rows(figures: Figures, comparison: Comparison) -> list[str]:
    rounds = figures.samples > 0
    head = f"{'split servers':>15}  {'steps/s':>8}  {'a version':>9}  " + f"{'a round':>9}  " * rounds
    lines = [f"{head}{'busy':>5}  bound by"]
    for one in comparison.tried:
        mark = ">" if one is comparison.asked else " "
        round_ = f"{_time(round_s(figures, one)):>9}  " * rounds
        note = "" if one.is_whole else "  (as far as it was simulated)"
        lines.append(
            f"{mark}{one.split_servers:14,}  {shown(one.steps_per_s):>8}  {_time(one.version_s):>9}  {round_}"
            f"{one.busy['split servers']:5.0%}  {SAID[one.bottleneck]}{note}"
        )
    return lines


def round_s(figures: Figures, outcome: Outcome) -> float:
    """How long the clients take to go once over their data, tests apart; infinity where that is not known."""
    if not figures.samples:
        return math.inf
    steps = max(1, -(-figures.samples // figures.batch)) * figures.clients
    return steps / outcome.steps_per_s if outcome.steps_per_s else math.inf


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:,.3g} min"


def _words(figures: Figures, comparison: Comparison) -> list[str]:
    said, asked = [comparison.says], comparison.asked
    if asked.refused:
        said.append(f"{number_of(asked.refused, 'request')} found no room at a split server and went to another.")
    peers = figures.nodes + asked.split_servers
    if peers > MAX_PEERS:
        said.append(
            f"A node has {MAX_PEERS:,} peers at most, and these are {peers:,}: put several clients into each process "
            "(--client-processes; zsfl node client --shards)."
        )
    return [line for one in said for line in textwrap.wrap(one, WIDTH)]


def _data(name: str, figures: Figures, comparison: Comparison) -> dict[str, Any]:
    """For programs; what has no end is null."""
    plans = [{**dataclasses.asdict(one), "round_s": round_s(figures, one)} for one in comparison.tried]
    numbers = {one.name: getattr(figures, one.name) for one in dataclasses.fields(figures)} | {
        "mode": mode_name(figures.mode)
    }
    return {
        "job": name,
        "figures": _finite(numbers),
        "asked": figures.split_servers,
        "needed": comparison.needed.split_servers,
        "says": comparison.says,
        "plans": [_finite(plan) for plan in plans],
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _waiting(outcome: Outcome) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[Ksimulated {number_of(outcome.split_servers, 'split server')}", end="", flush=True)


def _clear() -> None:
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")
