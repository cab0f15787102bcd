"""Collectives between the ranks that share a ZeRO partition: one all-to-all, and what it gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from optim.zero_layout import Round, Slot

ALIGNMENT = 64
"""Bytes: that of every tensor that torch allocates."""

TEXT_BYTES = 1000
"""Longest message of a rank that the others repeat."""


Result = TypeVar("Result")


class Transfer(Generic[Result]):
    """A collective that has begun; holds its buffers until it was waited for.

    Args:
        buffers: What will be received, and what is being sent.
        work: To be waited for; None where all has arrived. On CUDA the wait is that of the current
            stream, not of the host.
        unpack: Makes the result of what was received.
    """

    def __init__(
        self,
        buffers: tuple[Tensor, Tensor],
        work: dist.Work | None,
        unpack: Callable[[Tensor], Result],
    ) -> None:
        self._buffers: tuple[Tensor, ...] = buffers
        self._work = work
        self._unpack = unpack

    def wait(self) -> Result:
        """The result, once; what was sent is let go."""
        if self._work is not None:
            self._work.wait()
        # What was sent is freed before the result is unpacked, not after.
        received, self._buffers = self._buffers[0], ()
        self._work = None  # it holds the buffers too
        return self._unpack(received)


class Exchange(ABC):
    """One all-to-all among `world_size` ranks; counts the bytes this rank sends to others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.bytes_sent = 0

    def all_to_all(
        self,
        buffer: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        out: Tensor | None = None,
    ) -> Tensor:
        """Send consecutive pieces of a 1-D buffer to the ranks and return what they sent here.

        Args:
            buffer: 1-D, contiguous, `sum(send_splits)` elements.
            send_splits: Elements for each rank.
            recv_splits: Elements from each rank.
            out: Where to put them: 1-D, contiguous, of the buffer's type; default a new tensor.

        Returns:
            1-D: the pieces received, in the order of the ranks. Not to be written to: without
            `out` the only rank gets its own buffer back.
        """
        return self._begin(buffer, send_splits, recv_splits, out, lambda received: received).wait()

    def _begin(
        self,
        buffer: Tensor,
        send: list[int],
        recv: list[int],
        out: Tensor | None,
        unpack: Callable[[Tensor], Result],
    ) -> Transfer[Result]:
        # What a rank sends itself crosses no wire.
        others = sum(send) - send[self.rank]
        self.bytes_sent += others * buffer.element_size()
        received, work = self._all_to_all(buffer, send, recv, out)
        return Transfer((received, buffer), work, unpack)

    @abstractmethod
    def _all_to_all(
        self, buffer: Tensor, send: list[int], recv: list[int], out: Tensor | None
    ) -> tuple[Tensor, dist.Work | None]:
        """Begin the collective: where the pieces will be, and what to wait for."""

    def gather(self, piece: Tensor, dst: int = 0) -> Tensor | None:
        """Concatenate equally long 1-D pieces of all ranks on rank `dst`; None elsewhere."""
        send, recv = [0] * self.world_size, [0] * self.world_size
        send[dst] = piece.numel()
        if self.rank == dst:
            recv = [piece.numel()] * self.world_size
        received = self.all_to_all(piece, send, recv)
        return received if self.rank == dst else None

    def all_gather(self, piece: Tensor) -> Tensor:
        """Stack equally long 1-D pieces of all ranks: (world_size, length) on every rank."""
        splits = [piece.numel()] * self.world_size
        received = self.all_to_all(piece.repeat(self.world_size), splits, splits)
        return received.view(self.world_size, -1)

    def all_gather_text(self, text: str, device: torch.device) -> list[str]:
        """The texts of all ranks on every rank, each cut at TEXT_BYTES; for error messages."""
        # Of one length on all ranks, which do not know each other's texts.
        row = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        code = text.encode()[:TEXT_BYTES]
        row[: len(code)] = torch.tensor(list(code), dtype=torch.uint8)
        table = self.all_gather(row.to(device)).tolist()
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in table]

    def to_owner(self, piece: Tensor, plan: Round) -> Transfer[list[Tensor]]:
        """Begin to assemble the whole parameters of a round at their owners.

        Args:
            piece: This rank's 1-D range `[plan.start, plan.stop)` of a flat tensor; not to be
                changed before the end.
            plan: The round.

        Returns:
            The whole parameters that this rank owns, without padding, in their own shapes. Not to
            be written to: the only rank sees the flat tensor itself.
        """
        lengths = plan.slice_lengths(), plan.whole_lengths(self.rank)
        return self._begin(piece, *lengths, None, partial(self._wholes, plan))

    def _wholes(self, plan: Round, received: Tensor) -> list[Tensor]:
        wholes = []
        for slot, columns in self._columns(received, plan):
            whole = columns.reshape(-1)[: slot.numel].view(slot.shape)
            # Products may depend on the alignment, and alignment must not depend on W.
            wholes.append(whole if whole.data_ptr() % ALIGNMENT == 0 else whole.clone())
        return wholes

    def to_partitions(self, wholes: list[Tensor], plan: Round, out: Tensor) -> Transfer[Tensor]:
        """Begin the inverse of `to_owner`; padding becomes zero.

        Args:
            wholes: The owner's results in their parameters' shapes; none on ranks that own none.
            plan: The round.
            out: This rank's 1-D range of a flat tensor, `plan.stop - plan.start` elements; gets
                the results in its own type.

        Returns:
            `out`.
        """
        lengths = plan.whole_lengths(self.rank)
        # One rank writes its result in place: there is nobody to send it to.
        buffer = out if self.world_size == 1 else out.new_empty(sum(lengths))
        for whole, (slot, columns) in zip(wholes, self._columns(buffer, plan), strict=True):
            padding = columns.numel() - slot.numel
            flat = F.pad(whole.reshape(-1), (0, padding)) if padding else whole
            columns.copy_(flat.view_as(columns))
        return self._begin(buffer, lengths, plan.slice_lengths(), out, lambda received: received)

    def _columns(self, buffer: Tensor, plan: Round) -> Iterator[tuple[Slot, Tensor]]:
        """The owner's slots, each with its slices of all ranks as a view (world_size, length)."""
        slots = plan.owned[self.rank]
        table = buffer.view(self.world_size, sum(slot.length for slot in slots))
        column = 0
        for slot in slots:
            yield slot, table[:, column : column + slot.length]
            column += slot.length


class LocalExchange(Exchange):
    """The exchange of a single process."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1)

    def _all_to_all(
        self, buffer: Tensor, send: list[int], recv: list[int], out: Tensor | None
    ) -> tuple[Tensor, None]:
        return (buffer if out is None or out is buffer else out.copy_(buffer)), None


class ProcessGroupExchange(Exchange):
    """The exchange over a torch.distributed group (gloo or NCCL)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _all_to_all(
        self, buffer: Tensor, send: list[int], recv: list[int], out: Tensor | None
    ) -> tuple[Tensor, dist.Work | None]:
        # Not waited for here: products of another round run while this one travels.
        received = buffer.new_empty(sum(recv)) if out is None else out
        work = dist.all_to_all_single(
            received, buffer, recv, send, group=self._group, async_op=True
        )
        return received, work
