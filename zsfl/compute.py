"""The thread that torch runs in: one a process, so that the event loop never blocks.

One thread, because torch uses the cores inside an operation, because seeding its generator must not race, and
because nodes that share a process must not fight for the cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

# The thread starts with the first call, so a process may still fork before it.
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="zsfl-compute")


async def compute(function: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
    """Run `function` in the compute thread; its result or its error.

    Cancelling the caller does not stop a function that has begun.
    """

    def call() -> _Result:
        try:
            return function(*args, **kwargs)
        except StopIteration as error:  # which no future can carry: the caller would wait for ever
            raise RuntimeError(
                f"StopIteration {error} came out of {getattr(function, '__qualname__', function)}"
            ) from error

    return await asyncio.get_running_loop().run_in_executor(_thread, call)


def use_threads(count: int) -> None:
    """Let torch use so many threads inside one operation.

    Set in the compute thread itself: OpenMP keeps the number per thread, and spinning workers starve the loop.
    """
    import torch

    _thread.submit(torch.set_num_threads, count).result()
