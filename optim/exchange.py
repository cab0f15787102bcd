"""Collectives between the ranks that share a ZeRO partition: one all-to-all, and what it gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from optim.layout import Round, Slot


class Exchange(ABC):
    """One all-to-all among `world_size` ranks; counts the bytes this rank sends to others."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.bytes_sent = 0

    def all_to_all(self, buffer: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        """Send consecutive pieces of a 1-D buffer to the ranks and return what they sent here.

        Args:
            buffer: 1-D, contiguous, `sum(send_splits)` elements.
            send_splits: Elements for each rank.
            recv_splits: Elements from each rank.

        Returns:
            A new 1-D tensor: the pieces received, in the order of the ranks.
        """
        others = sum(send_splits) - send_splits[self.rank]
        self.bytes_sent += others * buffer.element_size()
        return self._all_to_all(buffer, send_splits, recv_splits)

    @abstractmethod
    def _all_to_all(self, buffer: Tensor, send: list[int], recv: list[int]) -> Tensor:
        """The collective itself."""

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

    def to_owner(self, piece: Tensor, plan: Round) -> list[Tensor]:
        """Assemble the whole parameters of a round at their owners.

        Args:
            piece: This rank's 1-D range `[plan.start, plan.stop)` of a flat tensor.
            plan: The round.

        Returns:
            The whole parameters that this rank owns, without padding, in their own shapes.
        """
        received = self.all_to_all(piece, plan.slice_lengths(), plan.whole_lengths(self.rank))
        return [
            columns.reshape(-1)[: slot.numel].view(slot.shape)
            for slot, columns in self._columns(received, plan)
        ]

    def to_partitions(self, wholes: list[Tensor], plan: Round, like: Tensor) -> Tensor:
        """Inverse of `to_owner`; padding becomes zero.

        Args:
            wholes: The owner's results in their parameters' shapes; none on ranks that own none.
            plan: The round.
            like: A tensor of the wanted dtype and device.

        Returns:
            This rank's 1-D range of the flat tensor, `plan.stop - plan.start` elements.
        """
        lengths = plan.whole_lengths(self.rank)
        buffer = like.new_zeros(sum(lengths))
        for whole, (slot, columns) in zip(wholes, self._columns(buffer, plan), strict=True):
            padded = like.new_zeros(columns.numel())
            padded[: slot.numel] = whole.reshape(-1)
            columns.copy_(padded.view_as(columns))
        return self.all_to_all(buffer, lengths, plan.slice_lengths())

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

    def _all_to_all(self, buffer: Tensor, send: list[int], recv: list[int]) -> Tensor:
        # A copy, as with several ranks: callers overwrite it, and products see the same alignment.
        return buffer.clone()


class ProcessGroupExchange(Exchange):
    """The exchange over a torch.distributed group (gloo or NCCL)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _all_to_all(self, buffer: Tensor, send: list[int], recv: list[int]) -> Tensor:
        received = torch.empty(sum(recv), dtype=buffer.dtype, device=buffer.device)
        dist.all_to_all_single(received, buffer, recv, send, group=self._group)
        return received
