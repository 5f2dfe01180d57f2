"""Looks at this machine: addresses, disk, keys, and in a process of its own PyTorch and the job file."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import ifaddr
import msgspec

from zsfl.condition import room_in, versions_here
from zsfl.doctor.seen import Disk, Here, Interface, Keys, Multicast, Store, Torch
from zsfl.errors import ConfigError, StorageError
from zsfl.ids import PROTOCOL
from zsfl.keys.machine import machine_id
from zsfl.keys.secret import KEY_FILE, keys_folder, own_keys
from zsfl.keys.trusted import TrustFile
from zsfl.settings import NodeSettings
from zsfl.spill.shared import Shared, opened
from zsfl.wire.door import Door, is_loopback

TRIAL_BYTES = 1 << 20
"""Written, to see whether a disk takes it: a quota shows no other way."""
MAX_SPILLS = 100_000
"""Files of spills that are counted."""
STORE_S = 5.0
TORCH_S = 60.0
"""Importing PyTorch takes seconds, on a busy machine many."""
OUTPUT = "zsfl doctor: "
"""Begins the line with which that process answers; a job file may print others."""


def interfaces() -> list[Interface]:
    """All IPv4 addresses of this machine."""
    return [
        Interface(name=adapter.nice_name, address=str(ip.ip))
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4
    ]


def look_at_disk(settings: NodeSettings) -> Disk:
    """Write a file where runs go, and remove it."""
    runs = settings.runs
    there = next((path for path in (runs, *runs.absolute().parents) if path.exists()), Path("/"))
    free_bytes, _ = room_in(runs)
    error = ""
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".zsfl-doctor-") as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        error = os.strerror(refusal.errno) if refusal.errno else str(refusal)
    spilled = sum(path.stat().st_size for path in islice((runs / "spills").rglob("*"), MAX_SPILLS) if path.is_file())
    return Disk(
        folder=str(runs), free_bytes=free_bytes, error=error, spilled_bytes=spilled, spill_mib=settings.spill_mib
    )


async def look_at_store(settings: NodeSettings) -> Store | None:
    """Write an object where spills go, and delete it; None where they go to the disk."""
    if not settings.spill:
        return None
    try:
        files, root = opened(settings)
        store = Shared(files, root, settings.spill, min(STORE_S, settings.request_s / 2), "spills")
        try:
            return Store(url=settings.spill, once=await store.creates_once())
        finally:
            store.close()
    except (ConfigError, StorageError) as error:
        return Store(url=settings.spill, error=str(error))


def look_at_keys(settings: NodeSettings) -> tuple[Keys, Door | None]:
    """What keys there are, made by nobody now; and with them a door to talk through."""
    folder = keys_folder(settings.keys)
    used = (bool(settings.keys) or not is_loopback(settings.host)) and not settings.insecure
    if not (folder / KEY_FILE).exists():
        return Keys(used=used, folder=str(folder)), None
    errors: list[str] = []
    try:
        own = own_keys(folder)
    except ConfigError as error:
        return Keys(used=used, folder=str(folder), errors=[str(error)]), None
    trust = TrustFile(folder, own.public, errors.append)
    others = {str(key): entry.name for key, entry in trust.known.items() if key != own.public}
    keys = Keys(used=used, folder=str(folder), machine=machine_id(own.public), trusted=others, errors=errors)
    return keys, Door("doctor", own, trust)


async def look_at_torch(device: str, job: Path | None) -> Torch:
    """Have another process import PyTorch, find the device and load the job file."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "zsfl.doctor.heavy",
        device,
        *([] if job is None else [str(job)]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TORCH_S):
            out, err = await process.communicate()
    except TimeoutError:
        return Torch(error=f"importing PyTorch and the job file takes longer than {TORCH_S:g} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    answers = [line for line in out.decode(errors="replace").splitlines() if line.startswith(OUTPUT)]
    if not answers:
        last = (err.decode(errors="replace").strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        return Torch(error=f"PyTorch cannot be used: {last}")
    return msgspec.json.decode(answers[-1].removeprefix(OUTPUT), type=Torch)


def here(
    settings: NodeSettings, disk: Disk, store: Store | None, keys: Keys, torch: Torch, multicast: list[Multicast]
) -> Here:
    """All of it."""
    return Here(
        host=settings.host,
        interfaces=interfaces(),
        mdns=settings.mdns,
        multicast=multicast,
        disk=disk,
        store=store,
        keys=keys,
        torch=torch,
        device=settings.device,
        versions=versions_here(),
        protocol=PROTOCOL,
    )
