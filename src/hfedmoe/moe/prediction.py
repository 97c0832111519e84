"""Layers that predict further tokens (multi-token prediction). transformers does not train them, and so do not we.

A checkpoint may hold them (`mtp.*`, or a layer behind the last one); a model that is loaded has none. Its config still
promises them, and whoever reads that config for speculative decoding looks for their tensors.
"""

from typing import Any

KEYS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
"""What configs call the number of such layers; some names are others' aliases."""


def promised(config: Any) -> int:
    """How many such layers a config promises."""
    text = config.get_text_config()
    return max((int(getattr(text, key, 0) or 0) for key in KEYS), default=0)


def withdraw(config: Any) -> int:
    """Promise none any more, in place; returns how many it had promised."""
    number = promised(config)
    text = config.get_text_config()
    for key in KEYS:
        if getattr(text, key, None):
            setattr(text, key, 0)
    return number
