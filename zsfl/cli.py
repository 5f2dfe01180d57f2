"""The `zsfl` command. Loads what a subcommand needs only when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsfl.cluster.on_ray import commands as on_ray
from zsfl.dashboard import commands as looking
from zsfl.doctor import commands as doctor
from zsfl.errors import ConfigError, ZsflError
from zsfl.flags import Parser, check_job_file
from zsfl.ids import Role
from zsfl.pairing import pages as pairing
from zsfl.planning import commands as planning
from zsfl.settings import NODE_FLAGS, add_flags
from zsfl.start import commands as starting

if TYPE_CHECKING:
    from zsfl.cluster.cluster import Cluster
    from zsfl.dashboard.printer import ProgressPrinter
    from zsfl.reports import AnyReport

    Tell = Callable[[AnyReport], None]

EXAMPLES = """\
examples:
  zsfl demo                                        train the digits on this machine, nothing to download
  zsfl new my-project                              a job of your own, to begin with
  zsfl up mnist.py --clients 20 --rounds 10        a whole cluster of processes on this machine
  zsfl node split-server mnist.py                  one node; run it on each GPU machine of the LAN
  zsfl node aggregator mnist.py                    anywhere
  zsfl node client mnist.py --shard 3              where the data is
  zsfl baseline fedavg mnist.py                    what a well-known algorithm makes of the same job
  zsfl bench mnist.py                              what its body costs on this machine
  zsfl plan mnist.py --clients 50                  how fast it would be, and what would bound it
  zsfl audit runs/mnist                            was every step counted once?
  zsfl ls                                          who is there, and what they do
  zsfl dash                                        the same and the curves of the run, as a page
  zsfl doctor mnist.py                             why do nodes not find one another, or not run?
  zsfl drain 192.168.1.20:7700                     have a node finish what it has in hand and leave
  zsfl invite                                      pair this machine with another, once: then they trust each other

Every flag may also be set as ZSFL_NAME in the environment, or as `name` under [node] in zsfl.toml.
"""

DEMO_EXAMPLES = """\
examples:
  zsfl demo                              5 clients, 2 split servers and 1 aggregator, each its own process
  zsfl demo --rounds 3 --clients 3       a shorter one
  zsfl demo --dash                       and a page to watch it on
  zsfl demo --print-job > my_job.py      the job it runs, to begin your own with
"""

UP_EXAMPLES = """\
examples:
  zsfl up mnist.py                                   as the job says
  zsfl up mnist.py --clients 20 --split-servers 3    divide the data among 20 clients
  zsfl up mnist.py --clients 200 --client-processes 4   many clients in few processes, to simulate
  zsfl up mnist.py --run night --rounds 50           leaves runs/night
  zsfl up mnist.py --run night --rounds 80 --resume  goes on from there, to 80 rounds
  zsfl up mnist.py --in-process                      the same nodes in one process
  zsfl up mnist.py --on ray --min 1 --max 4          on Ray, with as many split servers as there is work for
  zsfl up lan.toml                                   the machines that this file names, over ssh: see docs/how-to/lan.md
"""

NODE_EXAMPLES = """\
examples, for a LAN of three machines that are paired (zsfl invite); give each its own address with --host:
  zsfl node aggregator mnist.py --host 192.168.1.10 --rounds 20
  zsfl node split-server mnist.py --host 192.168.1.20 --device cuda
  zsfl node client mnist.py --host 192.168.1.30 --shard 0
  zsfl node client mnist.py --host 192.168.1.30 --shards 1-4       four clients in one process
  zsfl node standby mnist.py --host 192.168.1.20     takes over when the aggregator is gone

Nodes find one another by mDNS. Where multicast is blocked, one address is enough:
  zsfl node aggregator mnist.py --host 192.168.1.10 --port 7700
  zsfl node split-server mnist.py --host 192.168.1.20 --peer 192.168.1.10:7700
  zsfl node client mnist.py --host 192.168.1.30 --shard 0 --peer 192.168.1.10:7700
  zsfl node standby mnist.py --host 192.168.1.20 --peer 192.168.1.10:7700
"""

ALGORITHMS = {
    "centralised": "one process with the data of all clients, shuffled together",
    "merged": "one process on the very batches of exact mode",
    "local": "every client trains alone on its own data",
    "fedavg": "McMahan et al. 2017: an epoch each, then the models are averaged",
    "sl": "Gupta and Raskar 2018: split learning, one client after another",
    "splitfed-v1": "Thapa et al. 2022: a copy of the body for each client, averaged an epoch",
    "splitfed-v2": "the same: clients in random order on one body",
    "microsfl": "MicroSFL as published: one step a round on the gradient over all samples",
    "microsfl-coded": "MicroSFL as its code does it: summed means of the batches",
}
BASELINE_EXAMPLES = f"""\
ALGORITHM is one of:
{chr(10).join(f"  {name:17} {what}" for name, what in ALGORITHMS.items())}

They run in this process, under the job's seed, initial weights and division of the data. benchmarks/learning.py of the
source tree draws several beside the modes.

examples:
  zsfl baseline fedavg mnist.py
  zsfl baseline splitfed-v2 mnist.py --clients 20 --rounds 5
"""

BENCH_EXAMPLES = """\
examples:
  zsfl bench mnist.py                       what the job's body costs on this machine, and what the codecs gain
  zsfl bench mnist.py --device cuda
  zsfl bench --serve --host 192.168.1.20 --port 7710   on one machine of the LAN, until Ctrl-C
  zsfl bench 192.168.1.20:7710              on another one: round trips and throughput between the two

Tensors go there and back through the messages that training uses. The other way round may differ: swap the machines.
"""

AUDIT_EXAMPLES = """\
examples:
  zsfl audit                                         was every step of the newest run counted once, or dropped?
  zsfl audit mnist                                   of that one; runs/mnist, too
  zsfl audit mnist --replay 12..15 --job mnist.py    make these versions again: do they come out the same?

How far back versions can be made again is a matter of how much the aggregator keeps: --keep-mib.
It ends with 0 when all is well, with 1 when it is not.
"""

DRAIN_EXAMPLES = """\
examples:
  zsfl drain 192.168.1.20:7700                        give me my GPU back: finish what is in hand, hand over, leave
  zsfl drain 192.168.1.20:7700 192.168.1.21:7700      several at once

HOST:PORT is what the node's first line says. A split server takes no new work from then on, and clients go to others
at once; it stays until the aggregator has got what it computed. A client leaves its shards, and the run goes on as its
mode says. An aggregator leaves its run as it is: --resume goes on from there. SIGTERM and Ctrl-C do the same.
It ends with 0 when all have left, with 1 when not.
"""

UP_FLAGS = (
    "rounds", "mode", "cluster", "run", "runs", "resume", "device", "slots", "codec", "mdns", "host", "threads",
    "patience_s", "durability", "keep_mib", "spill", "spill_mib", "keys", "insecure", "io_threads", "metrics",
    "tensorboard",
)  # fmt: skip
COUNTS = ("clients", "split_servers", "standbys", "client_processes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given:
        print(starting.SHORT, end="")
        return 2
    args = parser().parse_args(given)
    args.given = given
    try:
        return int(args.run_command(args))
    except ConfigError as error:
        print(f"zsfl: {error}", file=sys.stderr)
        return 2
    except ZsflError as error:
        print(f"zsfl: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _parser(Parser, prog="zsfl", description="Split federated learning.", epilog=EXAMPLES)
    top.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _parser(commands.add_parser, "demo", help="see it work on this machine", epilog=DEMO_EXAMPLES)
    _add_cluster_flags(demo, clients=5)
    demo.add_argument("--print-job", action="store_true", help="print the job file and exit")
    demo.set_defaults(run_command=_demo)

    up = _parser(commands.add_parser, "up", help="run a job on this machine, or several", epilog=UP_EXAMPLES)
    up.add_argument("job", type=Path, metavar="JOB", help="Python file with a `job`, or lan.toml")
    _add_cluster_flags(up, clients=None)
    on_ray.add_flags(up).set_defaults(run_command=_up)

    node = _parser(commands.add_parser, "node", help="run one node", epilog=NODE_EXAMPLES)
    roles = node.add_subparsers(title="roles", required=True, metavar="ROLE")
    for role, text in _ROLE_HELP.items():
        one = _parser(roles.add_parser, str(role), help=text, epilog=NODE_EXAMPLES)
        one.add_argument("job", type=Path, metavar="JOB", help="Python file with a `job`, the same on every node")
        add_flags(one, NODE_FLAGS[role])
        one.set_defaults(run_command=_node, role=role)

    baseline = _parser(
        commands.add_parser, "baseline", help="train a job by a well-known algorithm", epilog=BASELINE_EXAMPLES
    )
    baseline.add_argument("algorithm", choices=tuple(ALGORITHMS), metavar="ALGORITHM", help="see below")
    baseline.add_argument("job", type=Path, metavar="JOB", help="Python file with a `job`")
    baseline.add_argument("--clients", type=int, metavar="N", help="how many clients; default: what the job says")
    add_flags(baseline, ("rounds", "threads"))
    baseline.set_defaults(run_command=_baseline)

    audit = _parser(commands.add_parser, "audit", help="prove what a run counted", epilog=AUDIT_EXAMPLES)
    audit.add_argument("target", nargs="?", metavar="RUN", help="a run, or its folder; default: the newest")
    audit.add_argument("--replay", metavar="A..B", help="make versions A to B again, bit for bit; needs --job")
    audit.add_argument("--job", type=Path, metavar="JOB", help="the job file that the run was started with")
    add_flags(audit, ("runs",))
    audit.set_defaults(run_command=_audit)

    drain = _parser(commands.add_parser, "drain", help="have nodes finish and leave", epilog=DRAIN_EXAMPLES)
    drain.add_argument("nodes", nargs="+", metavar="HOST:PORT", help="a node, by the address in its first line")
    drain.add_argument("--wait-s", type=float, default=60.0, metavar="S", help="seconds to wait at most (default: 60)")
    add_flags(drain, ("keys", "insecure"))
    drain.set_defaults(run_command=_drain)

    for room in (looking, doctor, pairing, planning):
        room.add_commands(commands, _parser)
    starting.add_commands(commands, _parser, top)

    bench = _parser(commands.add_parser, "bench", help="measure this machine or the network", epilog=BENCH_EXAMPLES)
    bench.add_argument(
        "target", nargs="?", metavar="TARGET", help="a job file, or HOST:PORT where zsfl bench --serve runs"
    )
    bench.add_argument("--serve", action="store_true", help="be the other end of a measurement, until Ctrl-C")
    bench.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each measurement (default: 1)")
    add_flags(bench, ("host", "port", "device", "threads", "request_s", "keys", "insecure", "io_threads"))
    bench.set_defaults(run_command=_bench)
    return top


_ROLE_HELP = {
    Role.CLIENT: "trains head and tail where the data is",
    Role.SPLIT_SERVER: "runs the body for whoever asks",
    Role.AGGREGATOR: "averages, steps and publishes",
    Role.STANDBY: "keeps a copy of the run, and takes over when its aggregator is gone",
}


def _parser(make: Any, *args: str, **kwargs: Any) -> argparse.ArgumentParser:
    kwargs.setdefault("description", kwargs.get("help", "").capitalize() + "." if kwargs.get("help") else None)
    return make(*args, **kwargs)


class _PrintVersion(argparse.Action):
    """Looks the version up only when it is asked for: that alone takes as long as all the rest of the help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"zsfl {version('zsfl')}")
        parser.exit()


def _add_cluster_flags(target: argparse.ArgumentParser, *, clients: int | None) -> None:
    said = "what the job says" if clients is None else str(clients)
    target.add_argument("--clients", type=int, default=clients, metavar="N", help=f"how many clients; default: {said}")
    target.add_argument("--split-servers", type=int, metavar="N", help="how many split servers; default: 2")
    target.add_argument("--standbys", type=int, metavar="N", help="aggregators that stand by to take over; default: 0")
    target.add_argument(
        "--client-processes", type=int, metavar="N", help="processes the clients share; default: one each"
    )
    target.add_argument("--in-process", action="store_true", help="run all nodes in this process")
    add_flags(target, UP_FLAGS)
    looking.add_dash_flags(target)


def _demo(args: argparse.Namespace) -> int:
    job = Path(__file__).with_name("demo.py")
    if args.print_job:
        print(job.read_text(encoding="utf-8"), end="")
        return 0
    return _run_cluster(job, args)


def _up(args: argparse.Namespace) -> int:
    names_nodes = not on_ray.is_wanted(vars(args)) and args.job.suffix == ".toml"
    if wrong := [name.replace("_", "-") for name in (*COUNTS, "in_process") if names_nodes and getattr(args, name)]:
        raise ConfigError(f"--{wrong[0]} is for a job file: {args.job} says which nodes there are")
    return _run_cluster(args.job, args)


def _node(args: argparse.Namespace) -> int:
    if sys.stdout is not None and sys.stdout.isatty():
        print(f"loading PyTorch and {args.job.name}", flush=True)
    from zsfl.lifetime import staying

    with staying():
        from zsfl.roles import run_node
    return run_node(args.role, args.job, vars(args))


def _baseline(args: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from zsfl import baselines
    from zsfl.learning.job import load_job
    from zsfl.settings import load_settings

    settings = load_settings(vars(args), os.environ)
    torch.set_num_threads(settings.threads)
    job = load_job(args.job)
    if settings.clients:
        job = dataclasses.replace(job, shards=settings.clients)
    rounds = settings.rounds or job.rounds
    print(f"{'round':>7}  {'train loss':>10}  {'test loss':>10}  {'test accuracy':>13}  {'seconds':>7}  {'steps':>7}")
    for done in baselines.run(args.algorithm, job, rounds):
        loss = "-" if done.loss is None else f"{done.loss:.4f}"
        accuracy = "-" if done.accuracy is None else f"{done.accuracy:.2%}"
        place = f"{done.round}/{rounds}"
        print(
            f"{place:>7}  {done.train_loss:10.4f}  {loss:>10}  {accuracy:>13}  {done.seconds:7.1f}  {done.steps:7}",
            flush=True,
        )
    return 0


def _audit(args: argparse.Namespace) -> int:
    from zsfl.aggregator.pages import print_audit
    from zsfl.dashboard.runs import find_run
    from zsfl.settings import load_settings

    folder = find_run(args.target, load_settings(vars(args), os.environ).runs)
    return print_audit(folder, args.replay, args.job)


def _drain(args: argparse.Namespace) -> int:
    from zsfl.cluster.leaving import print_drain
    from zsfl.settings import load_settings

    return print_drain(args.nodes, args.wait_s, load_settings(vars(args), os.environ))


def _bench(args: argparse.Namespace) -> int:
    from zsfl.settings import load_settings

    settings = load_settings(vars(args), os.environ)
    if not 0 < args.seconds <= 3600:
        raise ConfigError(f"--seconds is {args.seconds:g}: expected a number above 0 and at most 3600")
    if args.serve == (args.target is not None):
        raise ConfigError("name a job file, or HOST:PORT where `zsfl bench --serve` runs, or give --serve: one of them")
    if not args.serve and Path(args.target).is_file():
        from zsfl.bench.pages import print_job

        return print_job(Path(args.target), settings, args.seconds)
    from zsfl.bench.pages import print_network, serve_aloud

    return serve_aloud(settings) if args.serve else print_network(args.target, settings, args.seconds)


def _run_cluster(job: Path, args: argparse.Namespace) -> int:
    check_job_file(job)
    flags = vars(args)
    import asyncio

    from zsfl.dashboard.dashing import watched
    from zsfl.dashboard.printer import ProgressPrinter, how_to_go_on

    is_job = job.suffix != ".toml"
    printer = ProgressPrinter(first=f"{'loading PyTorch and' if is_job else 'starting the nodes of'} {job.name}")
    try:
        with watched(flags) as watch:
            asyncio.run(_train(job, flags, watch, printer))
    except KeyboardInterrupt:
        print(f"zsfl: interrupted; all nodes have left{how_to_go_on(printer.view, args.given)}", file=sys.stderr)
        return 130
    return 0


async def _train(job: Path, flags: dict[str, Any], watch: Tell, printer: ProgressPrinter) -> None:
    import asyncio

    with printer:

        def on_report(report: AnyReport) -> None:
            printer.on(report)
            watch(report)

        drawing = asyncio.create_task(printer.keep_drawing())
        try:
            async with _cluster(job, flags, on_report) as cluster:
                async for _ in cluster.train():  # up to --rounds, of which a resumed run has done some
                    pass
        finally:
            drawing.cancel()


def _cluster(job: Path, flags: dict[str, Any], on_report: Tell) -> Cluster:
    given = {name: flags[name] for name in UP_FLAGS if flags.get(name) is not None}
    if job.suffix == ".toml":
        from zsfl.cluster.remote import LanCluster

        return LanCluster(job, on_report=on_report, **given)
    from zsfl.cluster.local import LocalCluster

    given |= {name: flags[name] for name in COUNTS if flags.get(name) is not None}
    given |= {"on_report": on_report}
    return on_ray.make(job, flags, given) or LocalCluster(job, in_process=flags["in_process"], **given)
