"""Layers for multi-token prediction. transformers does not train them, and neither does this project.

A checkpoint may have them (`mtp.*`, or a layer after the last one), but a loaded model has none. Its config still
gives their number, so tools for speculative decoding would look for their tensors.
"""

from typing import Any

KEYS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Config keys for the number of these layers; some are aliases of others."""


def promised(config: Any) -> int:
    """The number of these layers in a config."""
    text = config.get_text_config()
    return max((int(getattr(text, key, 0) or 0) for key in KEYS), default=0)


def withdraw(config: Any) -> int:
    """Set the number of these layers to 0, in place; returns the number before."""
    number = promised(config)
    text = config.get_text_config()
    for key in KEYS:
        if getattr(text, key, None):
            setattr(text, key, 0)
    return number
