"""CUDA tensors without contents on a machine without CUDA, and what a pass over them makes wait.

Devices, types, shapes and strides are those of a GPU, so a tensor on the wrong device fails as it
would there. What the host does with values is counted: each of it waits for the device.
"""

import collections
import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - makes the backend known
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup

import optim.matrix_exp
import optim.retraction

CODE = ("/data_shards/", "/model/", "/optim/", "/pipeline/", "/jobs/")
CUDA = torch.device("cuda", 0)
_CUDA, _META = 1, 14
"""Of torch's enumeration of kinds of devices."""


def place() -> str:
    """File and function of the project that is executed, the innermost one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/" not in name and any(part in name for part in CODE):
            return f"{name.rsplit('/', 1)[1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class HostWaits(TorchDispatchMode):
    """Notes every operator for which the host waits for the device.

    Attributes:
        waits: how often, by place.
        operators: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.operators = 0
        self._pinned: set[int] = set()

    def pin(self, tensor: Tensor) -> Tensor:
        """In the place of `Tensor.pin_memory`, which needs a driver."""
        copy = tensor.clone()
        self._pinned.add(copy.untyped_storage()._cdata)
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            self.waits[place()] += args[0].device.type == "cuda"
            return args[0].dtype.is_floating_point or 1  # of no contents; True is 1.0
        out = func(*args, **(kwargs or {}))
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        made = [a for a in tree_leaves(out) if isinstance(a, Tensor)]
        if (kwargs or {}).get("pin_memory"):
            self._pinned.update(tensor.untyped_storage()._cdata for tensor in made)
        if name in ("nonzero", "masked_select", "equal", "_linalg_check_errors"):
            if given and given[0].device.type == "cuda":
                self.waits[place()] += 1
        elif name in ("_to_copy", "copy_") and given and made:
            source, target = given[-1], made[0]
            waits = source.device.type != target.device.type and not self._asynchronous(
                source, target, args, kwargs or {}
            )
            self.waits[place()] += waits
        return out

    def _asynchronous(self, source: Tensor, target: Tensor, args: Any, kwargs: Any) -> bool:
        host = source if target.device.type == "cuda" else target
        asked = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return bool(asked) and host.untyped_storage()._cdata in self._pinned


def _give_cuda_a_guard() -> None:
    """Let torch's table of device guards have one for CUDA: where a tensor is sliced it is asked.

    A torch with CUDA does this itself where there is no device, one without CUDA has no entry at
    all. The guard of meta tensors, which does nothing, takes its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    table = (ctypes.c_void_p * (_META + 1)).in_dll(library, name)
    table[_CUDA] = table[_CUDA] or table[_META]


def backward(loss: Tensor) -> None:
    """As `loss.backward()`, whose engine asks a driver for streams; gradients are added up."""
    node: Any
    nodes: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad(), GraphExecGroup():
        for node in _in_order(loss.grad_fn):
            given = nodes.pop(node, {})
            if hasattr(node, "variable"):
                for gradient in given.values():
                    leaf = node.variable
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            if not given:
                continue
            wanted = node._input_metadata
            inputs = [given.get(i) for i in range(len(wanted))]
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                # A function in Python takes zeros for what nothing was made of.
                inputs = [
                    torch.zeros(m.shape, dtype=m.dtype, device=m.device) if value is None else value
                    for value, m in zip(inputs, wanted, strict=True)
                ]
                results = node.apply(*inputs)
            else:
                results = node(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            for (after, number), gradient in zip(node.next_functions, results, strict=False):
                if after is not None and gradient is not None:
                    # Of what was broadcast, and of what was cast, as the engine itself does it.
                    m = after._input_metadata[number]
                    gradient = gradient.sum_to_size(m.shape).to(m.dtype)
                    sums = nodes.setdefault(after, {})
                    sums[number] = sums[number] + gradient if number in sums else gradient


def _in_order(root: Any) -> list[Any]:
    """Nodes of a graph, each before those that take what it makes."""
    order: list[Any] = []
    seen = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


class _Generator(torch.Generator):
    """One of the host in the place of the device's, which needs a driver."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def norms_of_powers(n: int) -> list[float]:
    """Frobenius norms of D, D^2 and D^3 for an increment whose n x n entries are 1e-3, as Adam's.

    Its eigenvalues are those of a random matrix, a semicircle of radius 2e-3 sqrt(n), whose moment
    2 j is radius^(2 j) times the j-th Catalan number over 4^j.
    """
    radius = 2e-3 * math.sqrt(n)
    return [radius**j * math.sqrt(catalan * n) / 2**j for j, catalan in ((1, 1), (2, 2), (3, 5))]


@contextlib.contextmanager
def fake_cuda() -> Iterator[HostWaits]:
    """Tensors may be made on CUDA; gives what is noted of them."""
    seen = HostWaits()
    _give_cuda_a_guard()

    values: dict[int, list[float]] = {}

    def norms_at(third: float) -> Callable[..., Tensor]:
        """Of D, D^2 and `third` times D^3, or of the last alone: they stay on the device."""

        def norms(*matrices: Tensor) -> Tensor:
            *powers, cube = norms_of_powers(matrices[0].shape[0])
            found = [*powers, third * cube]
            on_device = torch.empty(len(matrices), dtype=torch.float64, device=CUDA)
            values[id(on_device)] = found[2:] if len(matrices) == 1 else found[: len(matrices)]
            return on_device

        return norms

    def read(asked: Sequence[Tensor]) -> list[list[float]]:
        """Leaves the device with one wait, as the genuine one."""
        seen.waits["matrix_exp.py:read"] += 1
        return [values[id(on_device)] for on_device in asked]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(optim.matrix_exp, "read", read))
        for module, third in ((optim.matrix_exp, 1 / 6), (optim.retraction, 1.0)):
            stack.enter_context(mock.patch.object(module, "norms", norms_at(third)))
        stack.enter_context(
            mock.patch.object(Tensor, "pin_memory", lambda tensor: seen.pin(tensor))
        )
        # Of an allocation that is aligned, as CUDA's are.
        stack.enter_context(
            mock.patch.object(
                Tensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size()
            )
        )
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(seen)
        yield seen
        seen.waits = +seen.waits


@contextlib.contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
    """One of so many ranks whose peers never send; gives elements sent and received, by call.

    What NCCL refuses is refused: tensors on the host, of two types, not contiguous, of another size
    than was said.
    """
    calls: list[tuple[int, int]] = []

    class Arrived:
        def wait(self) -> None:
            """It has arrived."""

    def all_to_all_single(
        received: Tensor, sent: Tensor, recv: list[int], send: list[int], **_: Any
    ) -> Arrived:
        assert received.device == sent.device == CUDA
        assert received.dtype == sent.dtype
        assert received.is_contiguous()
        assert sent.is_contiguous()
        assert (sum(send), sum(recv)) == (sent.numel(), received.numel())
        assert len(recv) == len(send) == world_size
        calls.append((sent.numel(), received.numel()))
        return Arrived()

    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        with mock.patch.object(dist, "all_to_all_single", all_to_all_single):
            yield calls
    finally:
        dist.destroy_process_group()
