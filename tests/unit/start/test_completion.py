"""`zsfl completion`: scripts that real shells read, and what they complete."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from zsfl.cli import main

SHELLS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """With scripts for all shells, a job and a run."""
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        (tmp_path / f"{shell}.script").write_text(capsys.readouterr().out)
    (tmp_path / "job.py").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "runs" / "night").mkdir(parents=True)
    (tmp_path / "runs" / "night" / "settings.json").touch()
    (tmp_path / "runs" / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_it(shell: str, folder: Path) -> None:
    text = (folder / f"{shell}.script").read_text()
    assert all(word in text for word in ("split-server", "client-processes", "elastic"))
    if shutil.which(shell):
        done = subprocess.run([*SHELLS[shell], f"{shell}.script"], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert shell != "bash"


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("zsfl no", ["node"]),
        ("zsfl node s", ["split-server", "standby"]),
        ("zsfl up --cl", ["--clients", "--client-processes", "--cluster"]),
        ("zsfl up job.py --durability ", ["process", "power", "replica", "store"]),
        ("zsfl node client job.py --mode e", ["exact", "elastic"]),
        ("zsfl baseline splitfed-v", ["splitfed-v1", "splitfed-v2"]),
        ("zsfl completion ", ["bash", "zsh", "fish"]),
        ("zsfl up ", ["job.py", "runs"]),
        ("zsfl bench j", ["job.py"]),
        ("zsfl status ", ["night"]),
        ("zsfl up job.py --resume --run n", ["night"]),
        ("zsfl audit n", ["night"]),
        ("zsfl runs --plot n", ["notes.txt"]),
        ("zsfl keys show --keys ", ["runs"]),
    ],
)
def test_bash_completes(line: str, completed: list[str], folder: Path) -> None:
    words = [*shlex.split(line), *([""] if line.endswith(" ") else [])]
    program = """
        source bash.script
        [[ $(complete -p zsfl) =~ -F\\ ([^ ]+) ]] && function=${BASH_REMATCH[1]}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        $function zsfl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", program, "bash", *words], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == completed
