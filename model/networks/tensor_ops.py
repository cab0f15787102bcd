"""Operations on tensors that several families use."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or widened to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def space_to_depth(images: Tensor, patch: int) -> Tensor:
    """Cut (B, C, H, W) into patches: (B, H/patch, W/patch, C * patch^2), a permutation."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h // patch, w // patch, c * patch**2)
