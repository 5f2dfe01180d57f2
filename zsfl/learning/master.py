"""The master copy of the weights: the one place where an optimizer runs."""

from __future__ import annotations

import cmath
import copy
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zsfl.errors import ConfigError, RunFailed, StorageError
from zsfl.ids import parse_cid
from zsfl.learning.averaging import Contribution, is_loss
from zsfl.learning.flat import FlatLayout, FlatTensors
from zsfl.learning.norms import VALUES, norm_rules, pool_buffers, uncounted
from zsfl.learning.optim import OptimizerSpec, make_step
from zsfl.learning.robust import Average, combine

if TYPE_CHECKING:
    from zsfl.learning.model import SplitModel

_FILE = "master.safetensors"
"""Weights as `weights/NAME`, optimizer tensors as `optimizer/NUMBER`, the rest as JSON in its metadata."""


def state_digest(state: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of SHA-256 over names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + b"\0")
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class Master:
    """Weights, buffers and optimizer of one run, on the CPU; knows nothing of versions and the network."""

    def __init__(
        self, model: SplitModel, optimizer: OptimizerSpec, average: Average = "mean", *, frozen_norms: bool = False
    ) -> None:
        """Takes `model` over; `ConfigError` when it has nothing to train.

        With `frozen_norms` the running statistics of batch norms stay, whatever contributions say.
        """
        self._model = model.cpu()
        self._spec = optimizer
        self._average: Average = average
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ConfigError("the model has nothing to train: give at least one parameter requires_grad=True")
        self._optimizer = optimizer.build(self._trained.values())
        self._lr = self._optimizer.param_groups[0]["lr"]
        self._norms = norm_rules(self._model)
        self._frozen_norms = frozen_norms
        self._state: dict[str, Tensor] = dict(self._model.state_dict())
        """The model's own tensors: to go through its modules takes longer than to read small ones."""
        self._buffers = {name: self._state[name] for name, _ in self._model.named_buffers() if name in self._state}
        self._right: WeakSet[FlatLayout] = WeakSet()
        """Layouts of contributions whose gradients fit this model."""
        self._values = {f"{name}.{VALUES}": torch.tensor(0) for name in self._norms}

    @property
    def most_bytes(self) -> int:
        """What one contribution can take, in the widest numbers that there are: complex128."""
        return 16 * sum(tensor.numel() for tensor in (*self._state.values(), *self._values.values()))

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by full name, as copies that later steps leave alone."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def digest(self) -> str:
        """`state_digest` of the current state."""
        return state_digest(self._state)

    @torch.no_grad()
    def step(
        self, contributions: Sequence[Contribution], version: int = 0, sequential: bool = False
    ) -> tuple[int, ...]:
        """One optimizer step over the average of `contributions`, made at `version`, then the pooled buffers.

        Returns the shards whose gradients were taken, where the average is one that chooses.

        `sequential` is for local steps: one optimizer step for the first steps of all clients, one for their second
        ones, and so on, in order of k. Each client moved its own parts by local_lr * S/n in between and took its next
        gradient there, so where the optimizer is plain gradient descent at that rate the sum of these steps is the mean
        of the clients' moves (FedAvg of deltas), weighted at each step by samples. The body's gradients of all k are
        taken at the body of `version`; buffers are pooled once.

        `RunFailed` names the cid, node and tensor that cannot be used, or the tensor that the step itself made
        overflow, and leaves everything as it was.
        """
        buffers = self._buffers
        self.check(contributions)
        groups = _by_k(contributions) if sequential else [contributions]
        gradients, chosen = zip(*(combine(self._average, group) for group in groups), strict=True)
        # The statistics of late ones began elsewhere.
        known = [c for c in contributions if c.version == version]
        pooled = pool_buffers(buffers, known, self._norms, frozen=self._frozen_norms)
        for tensors in (*gradients, pooled):
            for name, tensor in tensors.items():
                if not _finite(tensor):
                    raise _not_finite(name, contributions)
        self._descend_all(gradients, version)
        for name, tensor in pooled.items():
            buffers[name].copy_(tensor)
        return chosen[0]

    def _descend_all(self, gradients: Sequence[Mapping[str, Tensor]], version: int) -> None:
        """One step of the optimizer for each of `gradients`; when one fails, weights and optimizer are as before."""
        if self._spec.schedule is not None:
            try:
                self._optimizer.param_groups[0]["lr"] = self._lr * self._spec.factor(version)
            except ConfigError as error:
                raise RunFailed(str(error)) from error
        weights = [parameter.clone() for parameter in self._trained.values()]
        held = {parameter: _copied(state) for parameter, state in self._optimizer.state.items()}
        try:
            for gradient in gradients:
                self._descend(gradient)
            self._check_finite()
        except Exception:
            for parameter, before in zip(self._trained.values(), weights, strict=True):
                parameter.copy_(before)
            self._optimizer.state.clear()
            self._optimizer.state.update(held)
            for parameter in self._trained.values():
                parameter.grad = None
            raise

    def _descend(self, gradient: Mapping[str, Tensor]) -> None:
        """One step of the optimizer."""
        for name, parameter in self._trained.items():
            parameter.grad = gradient[name].to(parameter.dtype) if name in gradient else None
        self._spec.clip(self._trained.values())
        make_step(self._optimizer)

    def _check_finite(self) -> None:
        """RunFailed, naming the tensor, when weights or what the optimizer remembers of them overflowed."""
        for name, parameter in self._trained.items():
            if not _finite(parameter):
                raise RunFailed(f"the optimizer's step made {name} not finite: lower the learning rate")
            # A second moment that is infinite would hold its weight still for ever.
            for what, kept in self._optimizer.state[parameter].items():
                if isinstance(kept, Tensor) and not _finite(kept):
                    raise RunFailed(f"the optimizer's step made {what} of {name} not finite: use clip_norm")

    def objection(self, one: Contribution, beside: Sequence[Contribution] = (), *, finite: bool = False) -> str:
        """Why a contribution cannot be counted, with others of its steps; empty when it can. No number is added.

        With `finite` its gradients are looked through, which a sum over all would tell only too late.
        """
        try:
            self.check([*beside, one])
            for tensors in (one.grads, one.buffers) if finite else ():
                for name in tensors:
                    if not _finite(tensors[name]):
                        raise _unusable(
                            one, f"is not finite in {name}: lower the learning rate, or look for bad samples"
                        )
        except RunFailed as error:
            return str(error)
        return ""

    def check(self, contributions: Sequence[Contribution]) -> None:
        """RunFailed unless all fit this model and each is there once; numbers inside gradients are looked at later."""
        buffers = self._buffers
        if not contributions:
            raise RunFailed("a window without contributions cannot be stepped")
        seen: set[tuple[str, str]] = set()
        batches: dict[str, tuple[float, int, Contribution]] = {}
        for c in contributions:
            if (c.cid, c.part) in seen:
                raise _unusable(c, "is counted twice in one window")
            seen.add((c.cid, c.part))
            if not (math.isfinite(c.n) and c.n >= 0 and c.samples > 0):
                raise _unusable(c, f"weighs n={c.n} for {c.samples} samples")
            if not (0 < c.scale < math.inf and 0 < c.damping <= 1 and 0 < c.clip <= 1):
                raise _unusable(c, f"counts with a scale of {c.scale}, a damping of {c.damping}, clipped to {c.clip}")
            if c.loss_sum is not None and not is_loss(c.loss_sum):
                raise _unusable(c, f"has a loss of {c.loss_sum}: lower the learning rate, or look for bad samples")
            self._check_batch(c, batches)
            if not isinstance(c.grads, FlatTensors):
                _check_names(c, "gradient", c.grads, self._trained)
            elif c.grads.layout not in self._right:
                _check_names(c, "gradient", c.grads, self._trained)
                self._right.add(c.grads.layout)
            if not c.buffers:
                continue
            _check_names(c, "buffer", c.buffers, {**buffers, **self._values})
            if norm := uncounted(buffers, c, self._norms):
                raise _unusable(c, f"does not say how many values {norm} saw: the nodes' versions of zsfl differ")

    def _check_batch(self, c: Contribution, batches: dict[str, tuple[float, int, Contribution]]) -> None:
        """Whether the parts of each step are of one batch; `batches` are those seen so far, by cid."""
        steps = [(one.cid, one.n, one.samples) for one in c.members] or [(c.cid, c.n, c.samples)]
        if c.members and not math.isclose(c.n, sum(n for _, n, _ in steps), rel_tol=1e-9):
            raise _unusable(c, f"weighs n={c.n}, which is not what its {len(steps)} steps weigh together")
        for cid, n, samples in steps:
            other_n, other_samples, other = batches.setdefault(cid, (n, samples, c))
            if (n, samples) != (other_n, other_samples):
                raise _unusable(
                    c,
                    f"weighs n={n} for {samples} samples of {cid}, and the {other.part} part of {other.whose} "
                    f"n={other_n} for {other_samples}: they are not of one batch; do the nodes' jobs differ?",
                )

    def save(self, folder: Path) -> None:
        """Write what a later `restore` needs into `folder`; a crash leaves the old file or the new one."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.state().items()}
        held: list[Tensor] = []
        options = {key: value for key, value in self._optimizer.param_groups[0].items() if key != "params"}
        options["lr"] = self._lr
        described: dict[str, Any] = {
            "optimizer": self._spec.factory.__qualname__,
            "options": _to_json(options, held),
            "state": {n: _to_json(self._optimizer.state.get(p, {}), held) for n, p in self._trained.items()},
        }
        tensors |= {f"optimizer/{number}": tensor for number, tensor in enumerate(held)}
        text = json.dumps(described)
        temporary = folder / f"{_FILE}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, {"master": text, "digest": _seal(tensors, text)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(folder / _FILE)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            what = f"the weights cannot be saved in {folder}: {error}"
            raise StorageError(f"{what}; make room there or choose another folder") from error

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote, bit for bit, under the optimizer's options of then; see `take_options`.

        `StorageError` when the file is missing or corrupt, `ConfigError` when of another model or optimizer.
        """
        path = folder / _FILE
        tensors, described = _read(path)
        kept = _kept_of(path, described, tensors)
        weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
        state = self._state
        mine, theirs = ({(n, t.shape, t.dtype) for n, t in side.items()} for side in (state, weights))
        if mine != theirs or set(described["state"]) != set(self._trained):
            names = sorted({name for name, *_ in mine ^ theirs} or set(described["state"]) ^ set(self._trained))
            raise ConfigError(f"{path} is of another model (see {names[0]}): go on with the job that made it")
        if described["optimizer"] != self._spec.factory.__qualname__:
            raise ConfigError(
                f"{path} was made with {described['optimizer']}, and the job now says {self._spec!r}: go on "
                "with the same class of optimizer"
            )
        for name, tensor in weights.items():
            state[name].copy_(tensor)
        options, states = kept
        self._optimizer.param_groups[0].update(options)
        self._lr = self._optimizer.param_groups[0]["lr"]
        for name, parameter in self._trained.items():
            self._optimizer.state[parameter] = states[name]

    def take_options(self) -> None:
        """From now on the optimizer has the options that the job states."""
        self._optimizer.param_groups[0].update(self._spec.options)
        self._lr = self._optimizer.param_groups[0]["lr"]


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer remembers of one parameter, as later steps leave it alone."""
    return {key: kept.clone() if isinstance(kept, Tensor) else copy.deepcopy(kept) for key, kept in state.items()}


def _finite(tensor: Tensor) -> bool:
    """Whether every number is finite. If their sum is, all are, and that is 6 (small) to 40 times (large) as fast."""
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _by_k(contributions: Sequence[Contribution]) -> list[list[Contribution]]:
    """The first steps of all clients, their second ones, and so on."""
    groups: defaultdict[int, list[Contribution]] = defaultdict(list)
    for contribution in contributions:
        groups[parse_cid(contribution.cid).k].append(contribution)
    return [groups[k] for k in sorted(groups)]


def _check_names(
    contribution: Contribution, kind: str, tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    """Whether every tensor is one that the model has, in the model's shape, and of numbers of that kind."""
    for name, tensor in tensors.items():
        if name not in known:
            raise _unusable(contribution, f"has a {kind} {name}, which this model has not: the nodes' jobs differ")
        if _kind(tensor) != _kind(known[name]):
            types = f"{tensor.dtype} instead of {known[name].dtype}"
            raise _unusable(contribution, f"has a {kind} {name} of {types}: the nodes' jobs differ")
        if tensor.shape != known[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(known[name].shape)}"
            raise _unusable(contribution, f"has a {kind} {name} of shape {shapes}: the nodes' jobs differ")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _unusable(contribution: Contribution, what: str) -> RunFailed:
    return RunFailed(f"the {contribution.part} contribution {contribution.cid} of {contribution.whose} {what}")


def _not_finite(name: str, contributions: Sequence[Contribution]) -> RunFailed:
    """Who brought NaN or infinity into the tensor `name`."""
    for c in sorted(contributions, key=lambda c: c.cid):
        tensor = c.grads.get(name, c.buffers.get(name))
        if tensor is not None and not _finite(tensor):
            return _unusable(
                c, f"is not finite in {name}: lower the learning rate, look for bad samples, or set norm_bound"
            )
    return RunFailed(f"the sum over all contributions overflows in {name}: lower the learning rate")


def saved_state(folder: Path) -> dict[str, Tensor]:
    """The state that `Master.save` wrote; `StorageError` when it is missing or corrupt."""
    tensors, prefix = _read(folder / _FILE)[0], "weights/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a saved master and its description, the digest verified."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: cast(Tensor, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        text, digest = metadata["master"], metadata["digest"]
    except FileNotFoundError as error:
        raise StorageError(f"there are no saved weights at {path}: check the folder of the run") from error
    except (OSError, SafetensorError, KeyError) as error:
        raise StorageError(f"{path} is corrupt: {error}; go on from an older copy") from error
    if digest != _seal(tensors, text):
        raise StorageError(f"{path} is corrupt: its bytes do not match its digest; go on from an older copy")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is corrupt: {error}; go on from an older copy") from error


def _kept_of(
    path: Path, described: Any, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options of the optimizer, and what it remembers of each parameter; `StorageError` where it says neither."""
    try:
        options = dict(_from_json(described["options"], tensors))
        states = {str(name): dict(_from_json(kept, tensors)) for name, kept in described["state"].items()}
        if not (isinstance(described["optimizer"], str) and isinstance(options["lr"], float | int | Tensor)):
            raise TypeError("it names no optimizer and learning rate")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is corrupt: {error!r}; go on from an older copy") from error
    return options, states


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    """Digest of everything in a saved master."""
    return hashlib.sha256(f"{state_digest(tensors)} {text}".encode()).hexdigest()


def _to_json(value: Any, held: list[Tensor]) -> Any:
    """Optimizer state as JSON, each tensor put into `held` and replaced by its place there."""
    if isinstance(value, Tensor):
        held.append(value.detach().contiguous().clone())
        return {"tensor": len(held) - 1}
    if isinstance(value, Mapping):
        return {"map": [[k, _to_json(v, held)] for k, v in cast("Mapping[str, Any]", value).items()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_to_json(item, held) for item in cast("list[Any]", value)]}
    return value


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_to_json` took apart."""
    match value:
        case {"tensor": number}:
            return tensors[f"optimizer/{number}"]
        case {"map": items}:
            return {key: _from_json(item, tensors) for key, item in items}
        case {"tuple": items}:
            return tuple(_from_json(item, tensors) for item in items)
        case {"list": items}:
            return [_from_json(item, tensors) for item in items]
        case _:
            return value
