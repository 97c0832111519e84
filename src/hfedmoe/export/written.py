"""Read an export back and check that it equals the model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hfedmoe.errors import UserError
from hfedmoe.moe.weights.checkpoint import StoredModel
from hfedmoe.moe.weights.shards import CheckpointError, Shards

UNSTABLE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "_attn_implementation"}
"""Config keys that saving changes on purpose."""


def check_written(model: Any, folder: Path) -> None:
    """Compare a checkpoint folder, tensor by tensor as transformers would load it, with the model.

    Raises:
        UserError: a tensor is missing or has another value, or the configs differ.
    """
    written, meant = _plain(AutoConfig.from_pretrained(folder)), _plain(model.config)
    wrong = sorted(key for key in written.keys() | meant.keys() if written.get(key) != meant.get(key))
    if wrong:
        raise UserError(f"the export does not have the model's config: {', '.join(wrong[:3])} differ; nothing was kept")
    try:
        checkpoint = StoredModel(Shards(folder), model)
        for name, tensor in model.state_dict().items():
            if name in checkpoint.sources:
                _compare(name, checkpoint.read(name)[name], tensor)
            elif name not in _tied(model):
                raise UserError(f"the export does not have {name}; nothing was kept: check the disk and try again")
    except CheckpointError as error:
        raise UserError(f"the export cannot be read back ({error}); nothing was kept") from None


def _compare(name: str, written: torch.Tensor, meant: torch.Tensor) -> None:
    if written.shape != meant.shape or not torch.equal(written, meant.detach().cpu().to(written.dtype)):
        raise UserError(f"the export has wrong values in {name}; nothing was kept: check the disk and try again")


def _tied(model: Any) -> set[str]:
    return {name for pair in model.all_tied_weights_keys.items() for name in pair}


def _plain(config: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in tree.items() if key not in UNSTABLE}
