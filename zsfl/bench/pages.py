"""What `zsfl bench` prints."""

from __future__ import annotations

import asyncio
from pathlib import Path

from zsfl.bench.network import RoundTrips, measure, serve
from zsfl.bounds import is_address
from zsfl.errors import ConfigError
from zsfl.settings import NodeSettings
from zsfl.words import number_of


def serve_aloud(settings: NodeSettings) -> int:
    """Be the other end of a measurement until SIGINT or SIGTERM; the exit code."""
    host = settings.host

    def ready(port: int) -> None:
        print(f"listening on {host}:{port}; on the other machine run: zsfl bench {host}:{port}", flush=True)
        if host == "127.0.0.1":
            print("only this machine reaches 127.0.0.1: give --host the address of a network interface", flush=True)

    print(f"sent back {asyncio.run(serve(settings, ready))} tensors")
    return 0


def print_network(address: str, settings: NodeSettings, seconds: float) -> int:
    """Measure against the bench server at `address`; the exit code. ConfigError when it is no address."""
    if not is_address(address):
        raise ConfigError(
            f"{address!r} is neither a job file that is there nor HOST:PORT, such as mnist.py or 192.168.1.20:7710"
        )
    asyncio.run(_print_network(address, settings, seconds))
    return 0


async def _print_network(address: str, settings: NodeSettings, seconds: float) -> None:
    print(f"from here to {address} and back, through zsfl's own messages\n")
    print(f"{'':>8}  {'round trip':>10}  {'95% below':>10}  {'open':>4}  {'answers/s':>9}  {'MB/s each way':>13}")
    async for one in measure(address, seconds=seconds, request_s=settings.request_s, settings=settings):
        print(_network_line(one), flush=True)


def _network_line(one: RoundTrips) -> str:
    mb_per_s = one.answers_per_s * one.size_bytes / 1e6
    return (
        f"{_bytes(one.size_bytes):>8}  {1e3 * one.median_s:7.2f} ms  {1e3 * one.slow_s:7.2f} ms  {one.open:4}  "
        f"{one.answers_per_s:9,.0f}  {mb_per_s:13,.1f}"
    )


def print_job(path: Path, settings: NodeSettings, seconds: float) -> int:
    """Measure what the body of a job costs here; the exit code."""
    import torch

    from zsfl.bench.local import body_costs, codec_costs
    from zsfl.learning.job import load_job
    from zsfl.roles import choose_device

    job, device = load_job(path), choose_device(settings.device)
    torch.set_num_threads(settings.threads)
    threads = f"{settings.threads} torch thread{'s' * (settings.threads > 1)}"
    where = f"{device}" if device.type == "cuda" else f"{device}, {threads}"
    for cost in body_costs(job, device, seconds):
        sent = cost.activations
        shape = "x".join(map(str, sent.shape))
        cut = f", cut {cost.cut!r}" if cost.cut else ""
        print(f"job {job.name}{cut} on {where}: {number_of(cost.samples, 'sample')} a step, initial weights\n")
        print(f"  body         {number_of(cost.parameters, 'parameter')}")
        print(f"  forward      {1e3 * cost.forward_s:.3f} ms")
        print(f"  backward     {1e3 * cost.backward_s:.3f} ms")
        print(f"  alone        {cost.steps_per_s:,.0f} steps/s, {cost.steps_per_s * cost.samples:,.0f} samples/s")
        print(
            f"  activations  {str(sent.dtype).removeprefix('torch.')} {shape}, {_bytes(sent.nbytes)} a step each way\n"
        )
        print(f"  {'codec':18}  {'bytes kept':>10}  {'pack MB/s':>9}  {'unpack MB/s':>11}  {'largest error':>13}")
        for number, (codec, measured) in enumerate(codec_costs(job, sent)):
            speeds = [sent.nbytes / 1e6 / max(s, 1e-9) for s in (measured.encode_s, measured.decode_s)]
            note = "  the job's own" if number == 0 else ""
            print(
                f"  {codec!s:18}  {measured.ratio:10.2f}  {speeds[0]:9,.0f}  {speeds[1]:11,.0f}  "
                f"{measured.max_error:13.1e}{note}"
            )
        print(flush=True)
    return 0


def _bytes(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"
