"""Logs what a run has left, on whichever machine its folder is, to Weights & Biases.

pip install wandb
python tools/examples/wandb_run.py runs/digits
WANDB_MODE=offline python tools/examples/wandb_run.py runs/digits
"""

from __future__ import annotations

import argparse

import wandb  # pyright: ignore[reportMissingImports]

import zsfl


def log(folder: str) -> None:
    """Curves by round, and those of tests by version."""
    run = zsfl.read_run(folder)
    with wandb.init(project="zsfl", name=run.name, config=dict(run.job)) as logged:
        logged.define_metric("by_round/*", step_metric="round")
        logged.define_metric("by_version/*", step_metric="version")
        for report in run.rounds:
            values = {
                "train_loss": report.train_loss,
                "test_loss": report.loss,
                "test_accuracy": report.accuracy,
                "steps_per_s": report.steps_per_s,
                "bytes_sent": report.bytes_sent,
            }
            measured = {f"by_round/{name}": value for name, value in values.items() if value is not None}
            logged.log({"round": report.round, **measured})
        for test in run.tests:
            values = {"test_loss": test.loss, "test_accuracy": test.accuracy, **test.clients}
            measured = {f"by_version/{name}": value for name, value in values.items() if value is not None}
            logged.log({"version": test.version, **measured})
        logged.summary["state"] = run.state
        if run.best is not None:
            logged.summary["best_accuracy"] = run.best.accuracy


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", help="of a run, such as runs/digits")
    log(arguments.parse_args().folder)
