"""LipNeXt (arXiv 2601.18513)."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import LipNeXtConfig
from model.contract import CertifiedNetwork, LipschitzBound
from model.head import Head
from model.layers import Block, Stem, l2_pool
from model.spectral import spectral_norm_bound, up


class LipNeXt(CertifiedNetwork):
    """Stem, blocks, l2 pool over the grid, linear head."""

    norm = "l2"

    def __init__(self, config: LipNeXtConfig) -> None:
        super().__init__()
        self.input_shape = config.input_shape
        self.num_classes = config.num_classes
        self.pool_tau = config.pool_tau
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config.width, config.num_classes)

    def tokens(self, images: Tensor) -> Tensor:
        """Output of the last block, shape (B, H, W, C); see logits_and_margin_factors."""
        self.check_images(images)
        x = self.stem(images)
        for block in self.blocks:
            if self.checkpoint_blocks:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def logits_and_margin_factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See CertifiedNetwork."""
        return self.head(l2_pool(self.tokens(images), self.pool_tau))

    def lipschitz_upper_bound(self) -> LipschitzBound:
        """sigma(stem) * product over blocks of sigma(M) sigma(R)^2, each factor proved.

        Translations, shift, beta-Abs and pool are 1-Lipschitz exactly.
        """

        def sigma(name: str) -> float:
            return spectral_norm_bound(self.get_parameter(name), name)

        parts = {"stem": sigma("stem.weight")}
        for i in range(len(self.blocks)):
            r = sigma(f"blocks.{i}.R")
            parts[f"blocks.{i}"] = up(up(r * r) * sigma(f"blocks.{i}.M"))
        value = 1.0
        for part in parts.values():
            value = up(value * part)
        return LipschitzBound(value, parts)
