"""Every module can be the first one imported, and what should be light is.

One interpreter is forked for each module: a fresh one would load torch each time, for over a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.waiting import HANG_S

import zsfl

ROOT = Path(__file__).parents[2]

PROBE = """
import gc, importlib, json, os, sys, traceback
gc.disable()
for name in sys.argv[1].split(","):
    importlib.import_module(name)
for name in sys.argv[2:]:
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        importlib.import_module(name)
        error = ""
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([name, error, sorted(sys.modules)]), flush=True)
    os._exit(0)
"""

OTHERS = "msgspec,zmq.asyncio,zeroconf.asyncio,ifaddr,lz4.block,tomllib,argparse,statistics,secrets,ssl"
"""What many modules need that is not ours, loaded once."""
LIGHT = (
    "cli",
    "cluster",
    "condition",
    "dashboard",
    "discovery",
    "doctor",
    "errors",
    "ids",
    "metrics",
    "node",
    "reports",
    "settings",
    "testing",
    "wire",
)


def modules() -> list[str]:
    """Names of all modules of zsfl, found without importing any."""
    paths = sorted((ROOT / "zsfl").rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return [".".join(part).removesuffix(".__init__") for part in parts]


def is_light(module: str) -> bool:
    return module == "zsfl" or module.split(".")[1] in LIGHT


def probe(preloaded: str, names: list[str]) -> dict[str, tuple[str, set[str]]]:
    """Of each module, imported alone: its error (empty when there is none) and what it loaded."""
    command = [sys.executable, "-c", PROBE, preloaded, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * HANG_S, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    found = {name: (error, set(loaded)) for name, error, loaded in answers}
    assert found.keys() == set(names)
    return found


@pytest.fixture(scope="module")
def all_modules() -> dict[str, tuple[str, set[str]]]:
    return probe(f"torch,{OTHERS}", [name for name in modules() if not name.endswith("__main__")])


def test_each_module_can_be_imported_first(all_modules: dict[str, tuple[str, set[str]]]) -> None:
    errors = [f"{name}: {error}" for name, (error, _) in all_modules.items() if error]
    assert not errors, "\n".join(errors)


def test_no_module_loads_matplotlib(all_modules: dict[str, tuple[str, set[str]]]) -> None:
    """It costs a second, and is needed once, at the end of a run."""
    assert [name for name, (_, loaded) in all_modules.items() if "matplotlib" in loaded] == []


def test_light_modules_load_no_torch() -> None:
    names = [name for name in modules() if is_light(name) and not name.endswith(("__main__", ".in_process"))]
    found = probe(OTHERS, names)
    assert [name for name, (_, loaded) in found.items() if loaded & {"torch", "sklearn"}] == []


def test_no_room_has_the_name_of_something_public() -> None:
    """Importing it would put it in the place of what people use."""
    rooms = {path.stem for path in (ROOT / "zsfl").iterdir()}
    assert rooms & set(zsfl.__all__) == {"baselines"}
