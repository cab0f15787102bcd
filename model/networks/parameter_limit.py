"""A limit on what may be built from a configuration that somebody else has written."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from model.errors import ModelError

_MODULES_PER_TENSOR = 64
"""Far more than any family has: a network without tensors must end, too."""


@contextlib.contextmanager
def parameter_limit(values: int) -> Iterator[None]:
    """Refuse to build more than so many values in this thread.

    Args:
        values: parameters and statistics together.

    Raises:
        ModelError: from the constructor of the network, at the first tensor that is too many.
    """
    thread, left, modules = threading.get_ident(), values, _MODULES_PER_TENSOR * (values + 1)

    def tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal left
        if value is not None and threading.get_ident() == thread:
            left -= value.numel()
            if left < 0:
                raise ModelError(f"the network has more than the {values} values of its weights")

    def module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules -= threading.get_ident() == thread
        if modules < 0:
            raise ModelError(f"the network has more layers than its {values} weights can fill")

    hooks: list[Any] = [
        register_module_parameter_registration_hook(tensor),
        register_module_buffer_registration_hook(tensor),
        register_module_module_registration_hook(module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
