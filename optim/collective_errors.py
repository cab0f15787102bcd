"""What fails at one owner becomes an error on every rank, and leaves none waiting."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.collectives import Exchange
from optim.errors import OptimizerError
from optim.zero_layout import Slot


class Guard:
    """Calls functions at the owners of matrices; remembers what failed until all ranks know.

    Args:
        exchange: Among the ranks.
        device: Of the tensors that it exchanges.
    """

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device
        self._failure: str | None = None

    def call(
        self, slots: Sequence[Slot], fn: Callable[..., Tensor], *sources: list[Tensor]
    ) -> list[Tensor]:
        """Call `fn(*wholes, slot)` for each of this rank's slots in a round.

        An exception is kept for `raise_together`: raising here, on one rank, would leave the
        others waiting in their next collective. The result of a failed slot is zero.
        """
        results = []
        for number, slot in enumerate(slots):
            try:
                result = fn(*(wholes[number] for wholes in sources), slot)
                if tuple(result.shape) != slot.shape:
                    raise OptimizerError(f"result has shape {tuple(result.shape)}")
            # Whatever it is: an owner that stops here leaves the others in their collective.
            except Exception as error:
                text = f"parameter {slot.name!r}: {type(error).__name__}: {error}"
                self._failure = self._failure or text
                result = torch.zeros(slot.shape)
            results.append(result)
        return results

    def raise_together(self) -> None:
        """Raise OptimizerError on every rank if a function failed on any. Collective."""
        # One number first: texts are long, and travel only if there is one.
        failed = torch.tensor([self._failure is not None], device=self._device).float()
        if self._exchange.all_gather(failed).any():
            messages = self._exchange.all_gather_text(self._failure or "", self._device)
            self._failure = None
            raise OptimizerError("; ".join(filter(None, messages)))
