"""The job: what is trained. Stated once in a Python file that every node imports, never sent to anybody."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zsfl.errors import ConfigError
from zsfl.learning.batches import BySpeed, batch_place, is_number
from zsfl.learning.blame import line_of, own_line, said_of
from zsfl.learning.model import JOB_MODULE_PREFIX
from zsfl.learning.modes import Async, Elastic, Exact, Mode, ModeName, mode_named
from zsfl.learning.norms import tracked_norms
from zsfl.learning.optim import OptimizerSpec
from zsfl.learning.privacy import Protection
from zsfl.learning.robust import Average, Krum, Median, NormBound, TrimmedMean
from zsfl.learning.weighting import MOST_WEIGHT, weight_objection
from zsfl.tensors.plan import CodecPlan

if TYPE_CHECKING:
    from zsfl.learning.cuts import Cuts
    from zsfl.learning.model import SplitModel

_Made = TypeVar("_Made")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""A DNS label short enough to leave room for a node's part in an mDNS label (63 bytes)."""

MOST_STEPS = 1000
"""Of one client at one version."""


def accuracy(output: Tensor, target: Tensor) -> float:
    """Correct samples of a batch, for logits [B, C, ...] and class indices [B, ...].

    A sample with many targets (a segmented image, a text) counts as the share of them that is right.
    """
    if target.is_floating_point() or output.ndim < 2 or target.shape != output.shape[:1] + output.shape[2:]:
        raise ConfigError(
            f"zsfl.accuracy wants logits [B, C, ...] and class indices [B, ...], but this job's output is "
            f"{list(output.shape)} and its target {list(target.shape)} of {target.dtype}: state metric=None "
            "in the job, or a function (output, target) -> number of correct samples"
        )
    right = (output.argmax(1) == target).double()
    return right.flatten(1).mean(1).sum().item() if right.ndim > 1 else right.sum().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained; wrong values are a `ConfigError` when it is made."""

    name: str
    """Lower-case letters, digits and hyphens, at most 40: names the run's folder and its mDNS service."""
    model: Callable[[], SplitModel | Mapping[str, SplitModel]]
    """Builds the model; called by every node, under the job's seed. Several cuts of one network by name, each made by
    `zsfl.split`, where clients do not all keep as much of it: see `cut`."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of output and target; a mean over the samples (or see `loss_weight`)."""
    data: Callable[[int, int], tuple[Dataset[Any], Dataset[Any] | None]]
    """Of shard and shards: the training data of that shard, and its held-out data or None."""
    optimizer: OptimizerSpec
    """Runs at the aggregator, once a version: `zsfl.sgd(lr=0.1)`, `adam`, `adamw`, `optimizer(cls, ...)`."""
    batch_size: int = 64
    """Samples of one step of one client: of each, or on average, see `batches`."""
    batches: Literal["proportional", "equal"] | BySpeed = "proportional"
    """`proportional`: a client's batches are as large as its share of the data, so that all end a round together and
    every merged batch has the mix of the whole. `equal`: `batch_size` for everybody, so that a round ends with those
    who have most. `zsfl.by_speed()`: fast clients take more, so that all are done at the same time."""
    steps: int = 1
    """Steps of each client that make one version (exact and elastic): merged batches so many times as large."""
    local_lr: float | None = None
    """With `steps` above 1, a client moves its own head and tail by plain gradient descent at this rate between the
    steps of one version, and the aggregator makes one optimizer step for each. Where the optimizer is plain SGD of the
    same rate, that is FedAvg of the clients' deltas, and O(local_lr^2) away from exact steps."""
    rounds: int = 10
    """How long to train; in a round the clients go once over their data."""
    shards: int = 5
    """How many clients the data is divided among."""
    seed: int = 0
    """Of initial weights, of the order of samples, and of what is random in a forward."""
    codec: str = "raw"
    """How tensors travel; `raw` changes no bit. `auto-lossless`, `auto-half`, `auto`: as is quickest on each link, by
    what loses nothing, down to half precision, down to int8. Kinds of tensors may differ, weights too: see
    `CodecPlan.parse`."""
    mode: ModeName | Mode = "exact"
    """`exact`, `elastic` or `async`, or one of these with settings of its own: `zsfl.Elastic(quorum=0.5)`."""
    batch_norm: Literal["per-client", "merged", "frozen"] = "per-client"
    """Which statistics batch norm uses in training: of one client's batch, of the merged batch of a window (body only,
    exact mode), or the running ones, never changed."""
    merge: bool = False
    """Whether a split server may take several waiting steps through the body at once, when its own measurements say
    that this is faster. The gradient is the same but for the last bits, which then depend on who waited with whom.
    Exact mode only, where what was merged with a step whose client is lost is asked for anew."""
    autocast: bool = False
    """Whether matrix products and convolutions are made in bfloat16: several times as fast where the hardware has it,
    with three significant digits. Weights, gradients and what travels keep their types."""
    average: Average = "mean"
    """What a version makes of its window: the exact sample average, or what some bad clients cannot spoil:
    `zsfl.Median()`, `zsfl.TrimmedMean(f=2)`, `zsfl.Krum(f=2)`. In exact and elastic mode; see `learning/robust.py`."""
    norm_bound: float | NormBound | None = None
    """Steps with a longer mean gradient are clipped to this norm, or with `zsfl.NormBound(10.0, "refuse")` dropped."""
    protect: Protection | None = None
    """What clients do to their activations in training: `zsfl.private_activations(clip=1.0, epsilon=8.0, delta=1e-5)`,
    or `zsfl.gaussian_noise(std=0.5)`, of which nothing is proven."""
    adjust_logits: Literal["participants", "client"] | None = None
    """Logit adjustment, for class indices: the loss sees logits shifted by log(p/q), with p the class shares of those
    who are present (`participants`) or of this client alone (`client`), and q those of all shards. The clients then
    tell the aggregator how many samples of each class they have."""
    evaluate_every: int | None = None
    """Versions between two held-out tests; None: one at the end of each round."""
    stop_after: int | None = None
    """Training ends early after so many held-out tests without a better one; None: never."""
    shuffle: bool = True
    """Whether every round has an order of its own."""
    metric: Callable[[Tensor, Tensor], float] | None = accuracy
    """Of output and target: the number of correct samples in the batch; None to report the loss only."""
    loss_weight: Callable[[Tensor], float] | None = None
    """Of the target: a batch's weight sum, when the loss is a weighted mean; None for its sample count."""
    most_weight: float = MOST_WEIGHT
    """With `loss_weight`, the most that a sample may weigh: a batch that weighs more is refused, whoever it is of."""
    cut: Callable[[int], str] | None = None
    """Of a shard: the name of the cut that its client uses; needed where `model` gives several."""

    def __post_init__(self) -> None:
        """Check what can be checked without building anything."""
        if not isinstance(cast(object, self.name), str) or not _NAME.fullmatch(self.name):
            better = re.sub(r"[^a-z0-9]+", "-", str(self.name).lower())[:40].strip("-") or "my-job"
            raise ConfigError(
                f"job name {self.name!r} will not do: use at most 40 lower-case letters, digits and inner "
                f"hyphens, such as {better!r}"
            )
        self._check_callables()
        if not isinstance(cast(object, self.optimizer), OptimizerSpec):
            raise self._wrong(f"optimizer is {self.optimizer!r}: use zsfl.sgd(lr=0.1), adam, adamw or optimizer")
        for field, least in (
            ("batch_size", 1),
            ("steps", 1),
            ("rounds", 1),
            ("shards", 1),
            ("seed", 0),
            ("evaluate_every", 1),
            ("stop_after", 1),
        ):
            value = getattr(self, field)
            if value is None and field in ("evaluate_every", "stop_after"):
                continue
            most = MOST_STEPS if field == "steps" else 2**63 - 1
            if type(value) is not int or not least <= value <= most:
                to = f"from {least} {f'to {most}' if field == 'steps' else 'up'}"
                raise self._wrong(f"{field} is {value!r}: use a whole number {to}")
        if not (is_number(self.most_weight) and 0 < self.most_weight < math.inf):
            raise self._wrong(f"most_weight is {self.most_weight!r}: use a number above 0")
        self._check_choices()
        self._check_defences()

    def _check_choices(self) -> None:
        """Choices that are none, and those that do not go together."""
        if not isinstance(cast(object, self.batches), BySpeed) and self.batches not in ("proportional", "equal"):
            raise self._wrong(f"batches is {self.batches!r}: use 'proportional', 'equal' or zsfl.by_speed()")
        if self.batch_norm not in ("per-client", "merged", "frozen"):
            raise self._wrong(f"batch_norm is {self.batch_norm!r}: use 'per-client', 'merged' or 'frozen'")
        if self.adjust_logits not in (None, "participants", "client"):
            raise self._wrong(f"adjust_logits is {self.adjust_logits!r}: use 'participants', 'client' or None")
        try:
            how = self.how
        except ConfigError as error:
            raise self._wrong(str(error)) from error
        if not isinstance(how, Exact) and self.batch_norm == "merged":
            raise self._wrong("batch_norm='merged' needs mode='exact', where it is known whose batches are merged")
        if self.merge and not isinstance(how, Exact):
            raise self._wrong(
                "merge=True needs mode='exact', where what a lost client's step was merged with is redone"
            )
        if isinstance(how, Async) and self.steps > 1:
            raise self._wrong("steps are the steps of a window, and mode='async' has none: state its samples instead")
        if isinstance(how, Async) and isinstance(self.batches, BySpeed):
            raise self._wrong("in mode='async' fast clients step more often already: use batches='proportional'")
        if not isinstance(cast(object, self.shuffle), bool):
            raise self._wrong(f"shuffle is {self.shuffle!r}: use True or False")
        CodecPlan.parse(self.codec)
        if self.local_lr is not None and not (
            self.steps > 1 and is_number(self.local_lr) and 0 < self.local_lr < math.inf
        ):
            raise self._wrong(f"local_lr is {self.local_lr!r}: use a rate above 0, together with steps above 1")

    def _check_defences(self) -> None:
        """What is to keep bad gradients out, and what it does not go together with."""
        try:
            bound = self.bound
        except ConfigError as error:
            raise self._wrong(str(error)) from error
        if self.protect is not None and not isinstance(cast(object, self.protect), Protection):
            raise self._wrong(f"protect is {self.protect!r}: use zsfl.private_activations() or zsfl.gaussian_noise()")
        average = cast(object, self.average)
        if average != "mean" and not isinstance(average, Median | TrimmedMean | Krum):
            raise self._wrong(f"average is {average!r}: use 'mean', zsfl.Median(), zsfl.TrimmedMean() or zsfl.Krum()")
        if average == "mean" and bound is None:
            return
        what = "norm_bound" if average == "mean" else f"average={average!r}"
        if self.merge or self.batch_norm == "merged":
            shared = "merge=True" if self.merge else "batch_norm='merged'"
            raise self._wrong(f"{what} needs the gradient of each client by itself, which {shared} does not keep apart")
        if self.average == "mean":
            return
        if isinstance(self.how, Async):
            raise self._wrong(
                f"{what} is a vote of clients, and in mode='async' those who are quick would have most of them: use "
                "mode='elastic', or norm_bound"
            )
        if self.local_lr is not None:
            raise self._wrong(f"{what} takes one gradient of each client, and with local_lr it has one for each step")
        if self.shards < self.average.least:
            raise self._wrong(f"{what} needs {self.average.least} clients, and this job has {self.shards}")
        if isinstance(self.average, Krum) and self.average.m > self.shards - self.average.f - 2:
            most = self.shards - self.average.f - 2
            raise self._wrong(f"{what} can take the gradients of {most} of {self.shards} clients at most")

    @property
    def bound(self) -> NormBound | None:
        """How long gradients may be."""
        given = self.norm_bound
        return given if given is None or isinstance(given, NormBound) else NormBound(given)

    def objection_to(self, n: float, samples: int) -> str:
        """Why a batch of so many samples cannot weigh `n`; empty when it can."""
        return weight_objection(n, samples, None if self.loss_weight is None else self.most_weight)

    @property
    def how(self) -> Mode:
        """The mode with its settings."""
        mode = cast(object, self.mode)
        return mode if isinstance(mode, Exact | Elastic | Async) else mode_named(str(mode))

    def _check_callables(self) -> None:
        """Functions where functions belong, and no model where its factory belongs."""
        if isinstance(self.model, nn.Module):
            raise self._wrong("model is a model: use a function without arguments that builds and returns it")
        for field, optional in (
            ("model", False),
            ("loss", False),
            ("data", False),
            ("metric", True),
            ("loss_weight", True),
            ("cut", True),
        ):
            value = getattr(self, field)
            if not (callable(value) or (optional and value is None)):
                raise self._wrong(f"{field} is {value!r}: use a function{' or None' if optional else ''}")

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"job {self.name!r}: {what}")

    def most_samples(self, held: int) -> int:
        """How many samples a batch of a shard can have that holds so many."""
        if isinstance(self.batches, BySpeed):
            return self.batches.most
        return self.batch_size if self.batches == "equal" else -(-held // self.steps)

    def batch_place(self, samples: int, windows: int, number: int) -> tuple[int, int]:
        """Start and size of a shard's batch `number` in a round of so many windows, see `batches.batch_place`."""
        equal = self.batch_size if self.batches == "equal" else None
        return batch_place(samples, windows * self.steps, equal, number)

    def batch_sizes(self, samples: int, windows: int) -> list[int]:
        """Sizes of all batches of a shard in a round of so many windows, in order."""
        return [self.batch_place(samples, windows, number)[1] for number in range(windows * self.steps)]

    def build(self) -> SplitModel:
        """The model with its initial weights, equal on every node (of several cuts the first); see `build_cuts`."""
        return self.build_cuts().first

    def build_cuts(self) -> Cuts:
        """All cuts of the model with its initial weights; `ConfigError` when the job's functions fail."""
        from zsfl.learning.cuts import Cuts
        from zsfl.learning.model import SplitModel

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            model = self._made_by("model()", self.model)
        by_name = cast("Mapping[object, object]", model).items() if isinstance(model, Mapping) else [("", model)]
        for name, one in by_name:
            if not isinstance(one, SplitModel):
                raise self._wrong(
                    f"model() returned a {type(one).__name__}{f' for {name!r}' if name else ''}: return a "
                    "zsfl.SplitModel(head=..., body=..., tail=...), or cut an existing module with zsfl.split"
                )
        cut = self.cut
        by_shard = cut and self._made_by("cut(shard)", lambda: [cut(shard) for shard in range(self.shards)])
        try:
            cuts = Cuts(cast("SplitModel | Mapping[str, SplitModel]", model), by_shard)
        except ConfigError as error:
            raise self._wrong(str(error)) from error
        if len(cuts.all) > 1 and self.batch_norm == "merged":
            raise self._wrong("batch_norm='merged' needs one body for all: give all clients the same cut")
        if self.average != "mean" and self.batch_norm != "frozen" and tracked_norms(cuts.first):
            raise self._wrong(
                f"average={self.average!r} is of gradients, and any client could spoil the running statistics of batch "
                "norm: use batch_norm='frozen' or group norm"
            )
        return cuts

    def _made_by(self, call: str, function: Callable[[], _Made]) -> _Made:
        try:
            return function()
        except Exception as error:
            where = f"{said_of(error)}{own_line(error) or line_of(error, None)}"
            raise self._wrong(f"{call} failed: {where}; correct the {call.partition('(')[0]}'s function") from error

    def tests(self, version: int) -> bool:
        """Whether a version is tested although it ends no round."""
        return bool(self.evaluate_every) and version % (self.evaluate_every or 1) == 0

    @property
    def merges(self) -> bool:
        """Whether split servers may merge waiting steps."""
        return self.merge and self.batch_norm != "merged"

    def warnings(self) -> list[str]:
        """What in these settings makes a run other than people may expect."""
        found: list[str] = []
        if isinstance(self.batches, BySpeed) and isinstance(self.how, Exact):
            found.append(
                "batch sizes follow measured speeds, so no two runs are equal; batches='proportional' would do"
            )
        if isinstance(self.how, Exact) and CodecPlan.parse(self.codec).loses_by_chance:
            found.append(
                f"codec={self.codec!r} loses what measured speeds, or the choice of servers, say, so no two runs are "
                "equal bit for bit; one fixed codec without feedback would do"
            )
        if self.protect is not None and not self.protect.secret:
            found.append("the noise on activations follows the job's seed, which all nodes know: it hides nothing")
        if self.local_lr is not None:
            options = {name: value for name, value in self.optimizer.options.items() if value and name != "lr"}
            is_plain = self.optimizer.factory is torch.optim.SGD and not options and self.optimizer.schedule is None
            if not (is_plain and self.optimizer.options["lr"] == self.local_lr):
                found.append(
                    f"local_lr={self.local_lr:g} beside {self.optimizer!r} is not FedAvg of deltas: "
                    "that takes plain SGD of the same rate"
                )
        return found

    def facts(self, cuts: Cuts) -> dict[str, str]:
        """What all nodes of a run must agree on, as short strings; `rounds` may differ."""
        from zsfl.learning.facts import facts_of

        return facts_of(self, cuts)


def load_job(path: Path) -> Job:
    """The `job` of a Python file: a `Job`, or a function without arguments that returns one.

    The file's folder is importable while the file runs. Whatever is wrong is a `ConfigError`.
    """
    path = path.absolute()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name the Python file in it that states the job")
    if not path.exists():
        raise ConfigError(f"there is no job file {path}: check the path, which starts at the current folder")
    name = f"{JOB_MODULE_PREFIX}{path.stem}"
    sys.path.insert(0, str(path.parent))
    try:
        found = _job_in(name, path)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ConfigError(
            f"job file {path} cannot be imported: {said_of(error)}{line_of(error, path.parent)}"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    if found is None:
        raise ConfigError(f"job file {path} has no `job`: add a line job = zsfl.Job(name=..., ...)")
    if not isinstance(found, Job):
        raise ConfigError(
            f"`job` in {path} is a {type(found).__name__}: make it a zsfl.Job, or a function without "
            "arguments that returns one"
        )
    return found


def _job_in(name: str, path: Path) -> object:
    """Run the file as module `name` and take its `job`, called if it is a function; None if it has none."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101  # it is None only where a loader has to be guessed
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    found: object = getattr(module, "job", None)
    return found() if callable(found) and not isinstance(found, type) else found
