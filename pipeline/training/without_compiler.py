"""Engines without torch's compiler, whose import takes a rank longer than all of DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def _as_it_is(fn: Callable[..., Any] | None = None, *_: object, **__: object) -> Any:
    """Stands for a decorator, or for one that is called for its arguments first."""
    return _as_it_is if fn is None else fn


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import DeepSpeed and build an engine without `torch._dynamo`; nothing here is compiled.

    DeepSpeed 0.19.8 compiles its Muon when it is imported and marks its hooks as not to be
    compiled; an optimizer marks methods of its own when they are first called. Each of these
    imports 1,400 modules, five seconds of a core. Both decorators do nothing inside of the block,
    so what is decorated there stays plain Python; the optimizers' methods are marked without it.
    """
    for method in (
        torch.optim.Optimizer.add_param_group,
        torch.optim.Optimizer.zero_grad,
        torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict,
    ):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)  # where torch keeps what it has marked
    with ExitStack() as stack:
        for owner, name in (
            (torch, "compile"),
            (torch, "_disable_dynamo"),
            (torch.compiler, "disable"),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, _as_it_is)
        yield
