"""zsfl: split federated learning over ZeroMQ.

The public names below are loaded when they are first used, so that `import zsfl` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsfl import baselines as baselines
    from zsfl.cluster.chaos import Chaos as Chaos
    from zsfl.cluster.local import LocalCluster as LocalCluster
    from zsfl.dashboard.runs import Run as Run
    from zsfl.dashboard.runs import read_run as read_run
    from zsfl.errors import ConfigError as ConfigError
    from zsfl.errors import RunFailed as RunFailed
    from zsfl.errors import Unavailable as Unavailable
    from zsfl.errors import ZsflError as ZsflError
    from zsfl.learning.batches import by_speed as by_speed
    from zsfl.learning.datasets import cifar10 as cifar10
    from zsfl.learning.datasets import digits as digits
    from zsfl.learning.datasets import fashion_mnist as fashion_mnist
    from zsfl.learning.datasets import mnist as mnist
    from zsfl.learning.job import Job as Job
    from zsfl.learning.job import accuracy as accuracy
    from zsfl.learning.job import load_job as load_job
    from zsfl.learning.model import SplitModel as SplitModel
    from zsfl.learning.modes import Async as Async
    from zsfl.learning.modes import Elastic as Elastic
    from zsfl.learning.modes import Exact as Exact
    from zsfl.learning.optim import adam as adam
    from zsfl.learning.optim import adamw as adamw
    from zsfl.learning.optim import optimizer as optimizer
    from zsfl.learning.optim import sgd as sgd
    from zsfl.learning.optim import yogi as yogi
    from zsfl.learning.partitions import classes_per_client as classes_per_client
    from zsfl.learning.partitions import dirichlet_labels as dirichlet_labels
    from zsfl.learning.partitions import dirichlet_sizes as dirichlet_sizes
    from zsfl.learning.partitions import iid as iid
    from zsfl.learning.partitions import shards as shards
    from zsfl.learning.privacy import gaussian_noise as gaussian_noise
    from zsfl.learning.privacy import private_activations as private_activations
    from zsfl.learning.robust import Krum as Krum
    from zsfl.learning.robust import Median as Median
    from zsfl.learning.robust import NormBound as NormBound
    from zsfl.learning.robust import TrimmedMean as TrimmedMean
    from zsfl.learning.schedules import cosine as cosine
    from zsfl.learning.schedules import linear as linear
    from zsfl.learning.schedules import step_down as step_down
    from zsfl.learning.schedules import warmup as warmup
    from zsfl.learning.split import split as split
    from zsfl.reports import Finished as Finished
    from zsfl.reports import RoundReport as RoundReport
    from zsfl.reports import Tested as Tested
    from zsfl.roles import main as main

_HOMES = {
    "zsfl.cluster.chaos": ("Chaos",),
    "zsfl.cluster.local": ("LocalCluster",),
    "zsfl.dashboard.runs": ("Run", "read_run"),
    "zsfl.errors": ("ConfigError", "RunFailed", "Unavailable", "ZsflError"),
    "zsfl.learning.batches": ("by_speed",),
    "zsfl.learning.datasets": ("cifar10", "digits", "fashion_mnist", "mnist"),
    "zsfl.learning.job": ("Job", "accuracy", "load_job"),
    "zsfl.learning.model": ("SplitModel",),
    "zsfl.learning.modes": ("Async", "Elastic", "Exact"),
    "zsfl.learning.optim": ("adam", "adamw", "optimizer", "sgd", "yogi"),
    "zsfl.learning.partitions": (
        "classes_per_client",
        "dirichlet_labels",
        "dirichlet_sizes",
        "iid",
        "shards",
    ),
    "zsfl.learning.privacy": ("gaussian_noise", "private_activations"),
    "zsfl.learning.robust": ("Krum", "Median", "NormBound", "TrimmedMean"),
    "zsfl.learning.schedules": ("cosine", "linear", "step_down", "warmup"),
    "zsfl.learning.split": ("split",),
    "zsfl.reports": ("Finished", "RoundReport", "Tested"),
    "zsfl.roles": ("main",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "baselines"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("zsfl")
    if name == "baselines":
        return import_module("zsfl.baselines")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'zsfl' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
