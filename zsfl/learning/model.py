"""The network as zsfl sees it: three parts in a row, each run by a node of its own.

Inside zsfl a parameter is always called `head.…`, `body.…` or `tail.…`. Only what a run leaves behind is
named as the module was that the user cut (`merged_state`), so that it loads without zsfl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

JOB_MODULE_PREFIX = "zsfl_job_"
"""Before the name of a job file's module, so that a job file json.py replaces no module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a `SplitModel` was cut from."""

    names: Mapping[str, str]
    """State name in the original module to state name in the split model."""
    unused: Mapping[str, Tensor]
    """State of the original that its forward never uses: no part holds it and it is never trained."""
    expression: str
    """Python expression that builds the original, as far as it can be known."""
    imports: frozenset[str]
    """Modules which `expression` needs."""


class SplitModel(nn.Module):
    """`tail(body(head(x)))`; without a tail the body ends the network and labels travel to it."""

    def __init__(
        self, head: nn.Module, body: nn.Module, tail: nn.Module | None = None, *, origin: Origin | None = None
    ) -> None:
        super().__init__()
        self.head = head
        self.body = body
        self.tail = tail
        self.origin = origin

    @property
    def u_shaped(self) -> bool:
        """Whether the client also runs the end of the network, so that labels never leave it."""
        return self.tail is not None

    def parts(self) -> dict[str, nn.Module]:
        """The parts there are by name, in the order in which data passes them."""
        parts = {"head": self.head, "body": self.body}
        return parts if self.tail is None else {**parts, "tail": self.tail}

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts().values():
            x = part(x)
        return x

    def merged_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` (names as in `state_dict()`) under the names of the module that was cut, complete.

        Tensors that the original ties come out as copies, since safetensors stores no aliases.
        """
        if self.origin is None:
            return dict(state)
        merged = {name: tensor.detach().clone() for name, tensor in self.origin.unused.items()}
        seen: set[str] = set()
        for name, held_as in self.origin.names.items():
            merged[name] = state[held_as].clone() if held_as in seen else state[held_as]
            seen.add(held_as)
        return merged

    def load_lines(self) -> str:
        """Three lines of plain PyTorch that load `model.safetensors`, which holds `merged_state`."""
        if self.origin is None:
            imports: set[str] = set()
            model = _sequence(self.parts(), imports)
        else:
            imports, model = set(self.origin.imports), self.origin.expression
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        if dtype is not torch.float32:
            imports.add("torch")
            model = f"{model}.to({dtype})"
        names = ", ".join(sorted(imports | {"safetensors.torch"}))
        return (
            f"import {names}\nmodel = {model}\n"
            'model.load_state_dict(safetensors.torch.load_file("model.safetensors"))\n'
        )


def spell(module: nn.Module, imports: set[str]) -> str:
    """An expression that builds `module` anew; adds to `imports` what it needs.

    Plain torch layers are spelled out; of a user's own class the arguments are unknown and left out.
    """
    kind = type(module)
    if kind is nn.Sequential:
        return _sequence({name: child for name, child in module.named_children()}, imports)
    if getattr(nn, kind.__name__, None) is kind and not any(True for _ in module.children()):
        imports.add("torch.nn as nn")
        return f"nn.{module!r}"
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return f"{kind.__name__}()"
    module_name = kind.__module__.removeprefix(JOB_MODULE_PREFIX)
    imports.add(module_name)
    return f"{module_name}.{kind.__qualname__}()"


def _sequence(children: Mapping[str, nn.Module], imports: set[str]) -> str:
    imports.add("torch.nn as nn")
    built = {name: spell(child, imports) for name, child in children.items()}
    if list(built) == [str(index) for index in range(len(built))]:
        return f"nn.Sequential({', '.join(built.values())})"
    imports.add("collections")
    if all(name.isidentifier() for name in built):
        inner = ", ".join(f"{name}={code}" for name, code in built.items())
    else:
        inner = "{" + ", ".join(f"{name!r}: {code}" for name, code in built.items()) + "}"
    return f"nn.Sequential(collections.OrderedDict({inner}))"
