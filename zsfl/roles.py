"""From a role, a job and settings to a running node: what `zsfl node ROLE` and every file in `nodes/` call."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq.asyncio

from zsfl.aggregator.curves import check_tensorboard, drawing
from zsfl.aggregator.mirror import Mirror
from zsfl.aggregator.opening import Opening, describe, done
from zsfl.aggregator.role import AggregatorRole
from zsfl.aggregator.run_folder import RunFolder
from zsfl.aggregator.standby import StandbyRole
from zsfl.aggregator.standing import Elected, Standing, what_is_kept
from zsfl.bounds import SYNCED
from zsfl.client.role import ClientRole
from zsfl.dashboard.metered import metered
from zsfl.dashboard.printer import NodePrinter
from zsfl.errors import ConfigError, Fenced, StorageError, ZsflError
from zsfl.flags import Parser
from zsfl.front import Front, failed
from zsfl.ids import Role
from zsfl.lane import compute, use_threads
from zsfl.learning.cuts import Cuts
from zsfl.learning.job import Job, load_job
from zsfl.learning.modes import max_staleness, mode_name
from zsfl.lifetime import Listen, on_signals
from zsfl.locks import LOCK, lock_folder
from zsfl.node import Node, RoleShell
from zsfl.outputs import drop_unread
from zsfl.ranges import parse_shards
from zsfl.reports import LOGGED, AnyReport, Note, to_line
from zsfl.settings import NODE_FLAGS, NodeSettings, add_flags, load_settings
from zsfl.spill.objects import store_for
from zsfl.split_server.role import SplitServerRole
from zsfl.tensors.codec import SUPPORTED
from zsfl.tensors.plan import CodecPlan
from zsfl.wire.door import door_for
from zsfl.wire.gatekeeper import kept
from zsfl.wire.sockets import is_free, open_context
from zsfl.words import number_of

Reporter = Callable[[AnyReport], None]
MOST_KNOWN = 16
"""Addresses that a node takes over from its former role."""
PORT_LOOKS, PORT_LOOK_S = 200, 0.01
"""How often, and after what pause, to see whether a port that this node itself used is free again."""


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first GPU, if there is one; ConfigError for a GPU that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            f"device {wanted} is not there: torch sees {number_of(count, 'CUDA device')}; use --device cpu or auto"
        )
    return device


async def run_role(
    role: Role,
    job: Job,
    settings: NodeSettings,
    report: Reporter,
    *,
    context: zmq.asyncio.Context,
    stop: asyncio.Event | None = None,
) -> None:
    """Run one node until its run ends, or, where it is to stay, `stop` is set; that ends it in any case."""
    stop = stop or asyncio.Event()
    if settings.clients:
        job = dataclasses.replace(job, shards=settings.clients)
    if settings.mode and settings.mode != mode_name(job.how):
        job = dataclasses.replace(job, mode=settings.mode)
    CodecPlan.parse(settings.codec or job.codec)
    store_for(settings, job.name)  # one that stands by would use either, and fail, only much later
    # Where all of torch runs: elsewhere it would disturb the random numbers of other nodes of this process.
    cuts = await compute(job.build_cuts)
    name = settings.name or default_name(role, settings)
    loop = asyncio.get_running_loop()

    def warn(message: str) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(report, Note(node=name, message=message, level="warning"))

    door = door_for(settings, name, warn)
    spills = settings.runs / "spills" / (settings.cluster or settings.run or job.name) / name
    own = nullcontext() if settings.spill else _own_folder(spills)
    with metered(settings, report) as told, own, kept(context, door):
        front = partial(
            Front,
            name=name,
            settings=settings,
            facts=job.facts(cuts) | {"cluster": settings.cluster},
            codecs=SUPPORTED,
            report=told.tell,
            context=context,
            stopping=stop,
            door=door,
            on_beat=told.beat,
        )
        if role in (Role.AGGREGATOR, Role.STANDBY):
            await _aggregate(role, front, name, job, cuts, settings, told.tell)
        else:
            await _play(front(role), job, cuts, spills)
        if settings.stay and not stop.is_set():
            told.rest()
            told.tell(Note(node=name, message="stays, with nothing to do, until it is told to leave"))
            await stop.wait()


@contextmanager
def _own_folder(spills: Path) -> Iterator[None]:
    """Nobody else spills into this folder meanwhile; afterwards it is gone, unless spills are left that still count."""
    try:
        spills.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(spills, f"does {spills.name} run here already? Give this node another --name")
    except OSError as error:
        raise StorageError(f"cannot write in {spills}: {error.strerror}; choose another folder with --runs") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in spills.iterdir()] == [LOCK]:
                (spills / LOCK).unlink()
                spills.rmdir()
                spills.parent.rmdir()
        os.close(lock)


async def _play(front: Front, job: Job, cuts: Cuts, spills: Path) -> None:
    settings = front.settings
    match front.card.role:
        case Role.CLIENT:
            shards = parse_shards(settings.shards, job.shards) if settings.shards else ()
            if not shards:
                raise ConfigError(f"which shards does this client hold? Give --shard, 0 to {job.shards - 1}")

            async def make(node: Node) -> RoleShell:
                client = ClientRole(node, job, cuts, shards, choose_device(settings.device), spills)
                client.prepare()
                return client

            await front.run(make)
            front.say_left("the run goes on without its shards, as its mode says, until a client holds them again")
        case Role.SPLIT_SERVER:

            async def make(node: Node) -> RoleShell:
                server = SplitServerRole(node, job, cuts, choose_device(settings.device), spills)
                server.prepare()
                return server

            await front.run(make)
            front.say_left("clients go to other split servers; where there is none, the run waits for one")
        case role:
            raise ConfigError(f"{role} is not a role that a node can play")


async def _aggregate(
    role: Role, front: Callable[..., Front], name: str, job: Job, cuts: Cuts, settings: NodeSettings, report: Reporter
) -> None:
    """Aggregate, or stand by and aggregate once that is called for; whoever is succeeded stands by from then on.

    Where somebody else may have taken over meanwhile, it is found out first who aggregates.
    """
    run, opening = settings.run or job.name, Opening(settings, job, cuts.first.load_lines())
    if settings.tensorboard:
        check_tensorboard()
    or_begin = settings.service or opening.is_kept
    with (
        RunFolder.of_copy(settings.runs, f"{run}.{name}")
        if role is Role.STANDBY
        else RunFolder.create(settings.runs, run, settings.resume, or_begin=or_begin)
    ) as folder:
        for note in await opening.begin_or_go_on(folder) if role is Role.AGGREGATOR else ():
            report(msgspec.structs.replace(note, node=name))
        if settings.service:
            if (over := done(folder, settings, job)) is not None:
                return report(Note(node=name, message=over))
            settings = dataclasses.replace(settings, resume=not folder.is_new and role is Role.AGGREGATOR)
        known: tuple[str, ...] = ()
        while True:
            elected, standing = None, Standing.of(folder.path)
            # Of a run that never began nobody can have taken over.
            if role is Role.STANDBY or (standing.shared and not folder.is_new):
                standby = front(Role.STANDBY, settings=_knowing(settings, known))
                elected = await _stand_by(standby, job, cuts, folder, standing)
                if elected is None:
                    return
                known = standby.known()
                await _until_free(settings)
            rounds = settings.rounds or ((elected and elected.rounds) or None)
            leading = front(Role.AGGREGATOR, settings=dataclasses.replace(_knowing(settings, known), rounds=rounds))
            drawn = ExitStack()

            async def make(node: Node, elected: Elected | None = elected, drawn: ExitStack = drawn) -> RoleShell:
                aggregator = AggregatorRole(node, job, cuts, folder, *await opening.stored(node, folder, elected))
                aggregator.prepare()
                folder.write_settings(describe(job, settings, node.facts))
                folder.write_address(node.card.address)
                if settings.tensorboard:
                    drawn.enter_context(drawing(folder, node.note))
                return aggregator

            try:
                with drawn:
                    await leading.run(make)
            except Fenced as fenced:
                if not Standing.of(folder.path).shared:  # nobody stands by, and so nobody need stand by another
                    raise
                leading.note(str(fenced), "warning")
                role, known = Role.STANDBY, leading.known()
                await _until_free(settings)
            else:
                return leading.say_left(what_is_kept(folder))


async def _until_free(settings: NodeSettings) -> None:
    """Returns when the control port that this process used is free again: ZeroMQ closes it a moment later."""
    for _ in range(PORT_LOOKS):
        if not settings.port or is_free(settings.host, settings.port):
            return
        await asyncio.sleep(PORT_LOOK_S)


def _knowing(settings: NodeSettings, known: Sequence[str]) -> NodeSettings:
    """The same, and these addresses to find the others by."""
    return dataclasses.replace(settings, peers=tuple(dict.fromkeys((*settings.peers, *known)))[:MOST_KNOWN])


async def _stand_by(front: Front, job: Job, cuts: Cuts, folder: RunFolder, standing: Standing) -> Elected | None:
    """Stand by until this node is elected; None: the run is over, or the node was asked to leave."""
    made: list[StandbyRole] = []

    def warm_up() -> None:
        """What the first optimizer of a process imports takes seconds."""
        job.optimizer.build([torch.nn.Parameter(torch.zeros(1))])

    async def make(node: Node) -> RoleShell:
        syncs = front.settings.durability in SYNCED
        write_loader = partial(folder.write_loader, cuts.first.load_lines())
        mirror = Mirror(folder.path, max_staleness(job.how), syncs=syncs, model_came=write_loader)
        made.append(StandbyRole(node, mirror, standing, shards=job.shards, warm_up=warm_up))
        return made[-1]

    await front.run(make)
    front.say_left(f"its copy of the run is kept in {folder.path}")
    return made[-1].elected


def default_name(role: Role, settings: NodeSettings) -> str:
    """A name that is free in most LANs: a client's by its shards, any other's by its process."""
    if role is Role.CLIENT:
        return f"client-{settings.shards.replace(',', '.')}"
    host = os.uname().nodename.split(".")[0][:20]
    if role is Role.STANDBY:  # its copy of the run is found again by it
        return f"{role}-{host}"
    return f"{role}-{host}-{os.getpid()}"


@contextmanager
def _reporting(flags: Mapping[str, Any]) -> Iterator[Reporter]:
    """Reports on standard output: JSON for a program that reads it, words for a person at a terminal or with a log."""
    if not sys.stdout.isatty() and not _is_service(flags):
        yield print_report
        return
    with NodePrinter() as printer:
        yield printer.on


def _is_service(flags: Mapping[str, Any]) -> bool:
    try:
        return load_settings(flags, os.environ).service
    except ConfigError:  # told of later, in words where they may have been meant
        return bool(flags.get("service") or os.environ.get("ZSFL_SERVICE"))


def print_report(report: AnyReport) -> None:
    """One line of JSON on standard output."""
    try:
        sys.stdout.buffer.write(to_line(report))
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # a node goes on when nobody watches any more
        drop_unread()


def main(role: str, job: Job, argv: Sequence[str] | None = None) -> int:
    """Run one node of `job`, set up by the flags of `zsfl node ROLE`; the exit code.

    What a file in `nodes/` ends with.
    """
    wanted = Role(role)
    parser = Parser(description=f"Run one {role} of job {job.name!r}.")
    add_flags(parser, NODE_FLAGS[wanted])
    return run_node(wanted, job, vars(parser.parse_args(argv)))


def run_node(
    role: Role, job: Job | Path, flags: Mapping[str, Any], report: Reporter | None = None, listen: Listen = on_signals
) -> int:
    """Run one node in this process; 0 when it ended well, 1 when it failed, 2 when its job or settings are wrong."""
    if report is None:
        with _reporting(flags) as told:
            return run_node(role, job, flags, told, listen)
    name = str(flags.get("name") or role)
    try:
        settings = load_settings(flags, os.environ)
        use_threads(settings.threads)
        asyncio.run(_until_done(role, job if isinstance(job, Job) else load_job(job), settings, report, listen))
    except ZsflError as error:
        report(failed(name, error))
        print(f"zsfl: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a fault of ours, or of the job's own functions: its traceback says where
        traceback.print_exc()
        report(said := failed(name, error))
        print(f"zsfl: {said.message.removesuffix(LOGGED)}", file=sys.stderr)
        return 1
    return 0


async def _until_done(role: Role, job: Job, settings: NodeSettings, report: Reporter, listen: Listen) -> None:
    """Run a node until it is asked to leave; asked twice, it leaves at once."""
    stop, running = asyncio.Event(), asyncio.current_task()

    def asked() -> None:
        if stop.is_set() and running is not None:
            running.cancel()
        stop.set()

    listen(asked)
    context = open_context(settings.io_threads)
    try:
        with suppress(asyncio.CancelledError):
            await run_role(role, job, settings, report, context=context, stop=stop)
    finally:
        context.destroy(linger=200)
