"""Trains a job on this machine and logs it to MLflow, round by round.

pip install mlflow
python tools/examples/mlflow_run.py my_job.py --rounds 20
mlflow ui                       # where it shows, unless MLFLOW_TRACKING_URI says elsewhere
"""

from __future__ import annotations

import argparse
import asyncio

import mlflow  # pyright: ignore[reportMissingImports]

import zsfl


async def train(job: str, clients: int | None, rounds: int | None) -> None:
    """One MLflow run for one run of the job."""
    mlflow.set_experiment("zsfl")
    async with zsfl.LocalCluster(job, clients=clients) as cluster:
        with mlflow.start_run():
            async for report in cluster.train(rounds):
                values = {
                    "train_loss": report.train_loss,
                    "test_loss": report.loss,
                    "test_accuracy": report.accuracy,
                    "steps_per_s": report.steps_per_s,
                    "bytes_sent": report.bytes_sent,
                }
                measured = {name: value for name, value in values.items() if value is not None}
                mlflow.log_metrics(measured, step=report.round)
            if cluster.result is not None:
                folder = cluster.result.folder
                run = zsfl.read_run(folder)
                mlflow.log_params(
                    {name: run.job[name] for name in ("name", "mode", "optimizer", "batch_size", "shards")}
                )
                for test in run.tests:
                    of_clients = {
                        f"accuracy_of/{client}": one for client, one in test.clients.items() if one is not None
                    }
                    mlflow.log_metrics(of_clients, step=test.round)
                for file in ("settings.json", "metrics.jsonl", "plot.png", "model.safetensors", "load_model.py"):
                    mlflow.log_artifact(f"{folder}/{file}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("job", help="a job file")
    arguments.add_argument("--clients", type=int, help="how many; default: what the job says")
    arguments.add_argument("--rounds", type=int, help="to train; default: what the job says")
    given = arguments.parse_args()
    asyncio.run(train(given.job, given.clients, given.rounds))
