"""A loaded model with its tokenizer, and the choice of its device."""

from dataclasses import dataclass
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.models.names import first_line


@dataclass
class Loaded:
    """A transformers model and its tokenizer; `store` (`moe.experts.store`) holds its experts if the model does not."""

    model: Any
    tokenizer: Any
    store: Any = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether it is a sequence-to-sequence model."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def decoder_start_token_id(self) -> int | None:
        """The first token of an encoder-decoder model's decoder input."""
        start: int | None = getattr(self.model.config, "decoder_start_token_id", None)
        return start


def device_of(name: str) -> Any:
    """The torch device for `model.device`; "auto": CUDA, else MPS, else CPU. Raises UserError if not available."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"model.device = {name}: not available here ({first_line(error)}); `hfedmoe doctor` lists devices"
        ) from None
    return device


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer; if it has no padding token, its end-of-sequence token becomes that."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
