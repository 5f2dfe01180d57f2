"""Fuzzes everything that reads bytes from outside, guided by coverage: one target after another, or some of them.

    python tests/fuzz/run.py --seconds 600
    python tests/fuzz/run.py --seconds 600 spill mirror

It needs atheris: pip install -e '.[fuzz]', on Linux and a Python that it has a wheel for. What it finds worth keeping
goes to tests/fuzz/corpus, the smallest inputs that reach all that is reached. An input that crashes, hangs or
fills the memory ends its target, is left in tests/fuzz/found, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import IO, Any, cast

HERE = Path(__file__).resolve().parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"
MOST_BYTES = 8192
"""Of one input: what is slow because it is long does not show, see `targets.py`."""
MEMORY_MIB = 2048
HANG_S = 10
"""An input that takes so long is a hang; a busy machine may well hold up one that takes no time for a second."""
SLOW_S = 1
WILD = 0.25
"""Of the inputs, so many are made from scratch by the target's own maker of near-valid ones."""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="names; default: all of them")
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default: 600)")
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
    if sys.argv[1:2] == ["--one"]:  # in a process of its own, with libFuzzer's options
        return fuzz(sys.argv[2], sys.argv[3:])
    given = parser.parse_args()
    from fuzz.targets import TARGETS

    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    failed = [name for name in given.targets or TARGETS if not run(name, given.seconds)]
    print(f"failed: {', '.join(failed)}; see {FOUND}" if failed else "nothing was found")
    return 1 if failed else 0


def run(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own, and keep what is worth it; whether nothing was found."""
    corpus, log = CORPUS / name, FOUND / f"{name}.log"
    FOUND.mkdir(exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work, seeds, small = (Path(folder) / one for one in ("work", "seeds", "small"))
        for one in (work, seeds, small):
            one.mkdir()
        from fuzz.targets import TARGETS

        for number, seed in enumerate(TARGETS[name].seeds()):
            (seeds / f"seed-{number}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={FOUND}/{name}-", "-print_final_stats=1"]
        with log.open("wb") as file:
            ended = _libfuzzer(name, Path(folder), [*options, str(work), str(corpus), str(seeds)], file)
            # Of what reaches as much, the smallest.
            merged = ended == 0 and _libfuzzer(name, Path(folder), ["-merge=1", *map(str, (small, corpus, work))], file)
        print(f"{name}: {_summary(log)}", flush=True)
        if merged == 0 and any(small.iterdir()):
            for path in corpus.iterdir():
                path.unlink()
            for path in small.iterdir():
                (corpus / path.name[:16]).write_bytes(path.read_bytes())
    return ended == 0


def _summary(log: Path) -> str:
    """How much was run, and how it ended."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("Done ", "stat::peak_rss", "stat::slowest", "SUMMARY", "==="))]
    return "; ".join(dict.fromkeys(said)) or "it did not begin"


def _libfuzzer(name: str, folder: Path, options: list[str], log: IO[bytes]) -> int:
    """libFuzzer starts itself again to merge, by the name of its program: so that has to be one file."""
    program = folder / "fuzz"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" --one {name} "$0" "$@"\n')
    program.chmod(0o755)
    limits = [f"-max_len={MOST_BYTES}", f"-timeout={HANG_S}", f"-report_slow_units={SLOW_S}"]
    limits += [f"-rss_limit_mb={MEMORY_MIB}", "-malloc_limit_mb=1024"]
    return subprocess.run([str(program), *limits, *options], check=False, stdout=log, stderr=log).returncode


def fuzz(name: str, command: list[str]) -> int:
    """Fuzz until libFuzzer says that it is enough."""
    import atheris  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

    with cast(Any, atheris).instrument_imports(include=["zsfl"]):
        from fuzz.targets import TARGETS

    target = TARGETS[name]
    for seed in target.seeds():  # what is done once takes long, as torch is imported piece by piece
        target.one(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < WILD:
            data = target.wild(rng)
        return atheris.Mutate(data, min(len(data) + 64, most)) if rng.random() < 0.8 else data[:most]

    atheris.Setup(command, target.one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
