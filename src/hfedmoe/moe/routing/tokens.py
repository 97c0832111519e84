"""Which tokens of a batch count."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hfedmoe.moe.anatomy import MoELayer


@dataclass
class TokenMasks:
    """Which tokens of a batch count, for decoder (or only) and encoder layers."""

    mask: Tensor
    """[B, S]: 1 for tokens, 0 for padding."""
    encoder_mask: Tensor | None = None
    """[B, S'] of the encoder, in encoder-decoder models."""

    def of(self, layer: MoELayer) -> "Tokens":
        """The tokens that pass through a layer."""
        return self._decoder if layer.in_decoder or self.encoder_mask is None else self._encoder

    @cached_property
    def _decoder(self) -> "Tokens":
        return Tokens(self.mask.bool())

    @cached_property
    def _encoder(self) -> "Tokens":
        assert self.encoder_mask is not None
        return Tokens(self.encoder_mask.bool())


@dataclass
class Tokens:
    """Which tokens count, computed once per batch and not once per layer, because it waits for the GPU."""

    keep: Tensor
    """bool [B, S]."""

    @cached_property
    def kept(self) -> Tensor:
        """int64: indices of the tokens that count, among all B * S."""
        return self.keep.reshape(-1).nonzero()[:, 0]

    @cached_property
    def observed(self) -> Tensor:
        """int64: indices of the samples with a token that counts."""
        return self.keep.any(1).nonzero()[:, 0]
