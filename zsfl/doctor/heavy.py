"""The part of looking that loads PyTorch and the job file, as a program of its own, which may take long, or crash."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from zsfl.doctor.here import OUTPUT
from zsfl.doctor.seen import Torch
from zsfl.errors import ZsflError


def main(device: str, job: str | None = None) -> None:
    """Say what was found, on one line."""
    found = _torch(device)
    if job is not None:
        found = _with_job(found, Path(job))
    print(f"\n{OUTPUT}{msgspec.json.encode(found).decode()}", flush=True)


def _torch(device: str) -> Torch:
    import torch

    from zsfl.roles import choose_device

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    error = ""
    try:
        chosen = choose_device(device)
        (torch.ones(8, device=chosen) + 1).sum().item()
    except ZsflError as refusal:
        error = str(refusal)
    except RuntimeError as refusal:
        error = f"device {device} does not compute: {str(refusal).splitlines()[0]}"
    return Torch(version=str(torch.__version__), devices=gpus, error=error)


def _with_job(found: Torch, path: Path) -> Torch:
    from zsfl.learning.job import load_job

    try:
        job = load_job(path)
        return msgspec.structs.replace(found, job=job.name, facts=job.facts(job.build_cuts()))
    except ZsflError as error:
        return msgspec.structs.replace(found, job_error=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
