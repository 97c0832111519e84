"""A model with everything in memory except its experts, read tensor by tensor from a checkpoint."""

import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.core_model_loading import build_glob_alternation

from hfedmoe.moe.anatomy import find_moe_layers
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.weights.checkpoint import CheckpointExperts, StoredModel
from hfedmoe.moe.weights.shards import CheckpointError, Shards


def empty_model(auto: Any, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The model that `config` describes; parameters have no contents, computed buffers (rotary tables) have.

    Args:
        auto: transformers' AutoModelForCausalLM or AutoModelForSeq2SeqLM.
    """
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model.eval()


def fill(model: Any, shards: Shards, dtype: torch.dtype, expert_dtype: str, device: torch.device) -> ExpertStore:
    """Read everything except the experts into an empty model; the returned store reads experts when needed.

    The peak memory is that of the finished model plus one tensor.

    Args:
        expert_dtype: how experts are held, see `ExpertStore`.

    Raises:
        UnsupportedModelError: the model has no MoE layers.
        CheckpointError: the checkpoint is damaged, or lacks something that the model needs.
    """
    layers = find_moe_layers(model)
    experts = {id(parameter) for layer in layers for parameter in layer.experts.parameters()}
    checkpoint = StoredModel(shards, model)
    tied = _untie(model, checkpoint)
    wanted = {name: p for name, p in model.named_parameters() if id(p) not in experts and name not in tied}
    # Also buffers that belong into a checkpoint (correction biases); tied weights appear once.
    persistent = model.state_dict().keys()
    wanted |= {name: b for name, b in model.named_buffers() if name in persistent}
    source = CheckpointExperts(checkpoint, layers)
    absent = {name for name in wanted if checkpoint.missing(name)}
    _require(shards, model, [*absent, *source.missing()])
    # What the family leaves out on purpose keeps the value that the model computed.
    wanted = {name: like for name, like in wanted.items() if name not in absent or like.is_meta}
    dtypes = _Dtypes(model, dtype)
    while wanted:
        name = next(iter(wanted))
        for made, tensor in checkpoint.read(name).items():
            like = wanted.pop(made, None)
            if like is None:
                continue
            if tensor.shape != like.shape:
                raise CheckpointError(
                    f"{shards.folder}: {made} has shape {list(tensor.shape)}, but the model's is {list(like.shape)}"
                )
            _put(model, made, tensor.to(dtypes.of(made, like), copy=False).to(device))
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            _put(model, name, buffer.to(device))
    model.tie_weights(missing_keys=tied, recompute_mapping=False)  # ties what is equal, as from_pretrained does
    return ExpertStore(source, [layer.num_experts for layer in layers], expert_dtype, dtype, device)


def _untie(model: Any, checkpoint: StoredModel) -> set[str]:
    """Untie tied tensors (embedding and head) that are stored; returns the names of those that are not stored.

    transformers ties them only if the stored values are equal, or if one is not stored; the config does not matter.
    """
    pairs = dict(model.all_tied_weights_keys)
    for target in pairs:
        if target in checkpoint.sources:
            _put(model, target, torch.empty_like(model.get_parameter(target), device="meta"))
    return {name for pair in pairs.items() for name in pair if name not in checkpoint.sources}


def _require(shards: Shards, model: Any, missing: list[str]) -> None:
    """Raise CheckpointError for missing tensors, except those that the family leaves out on purpose."""
    left_out = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unknown = [name for name in missing if not any(re.search(pattern, name) for pattern in left_out)]
    if unknown:
        raise CheckpointError(missing_tensors(str(shards.folder), unknown))


def missing_tensors(where: str, names: list[str]) -> str:
    """One line about a checkpoint that lacks tensors of its model."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{where}: the checkpoint has no {', '.join(sorted(names)[:3])}{more}, which would be random numbers; "
        "download or convert it again"
    )


class _Dtypes:
    """The precision of each tensor: some families keep some tensors in float32 in a model of any precision."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self._plan = plan
        self._pattern: Any = None
        if plan:
            self._pattern, self._keys, _ = build_glob_alternation(list(plan))

    def of(self, name: str, like: torch.Tensor) -> torch.dtype:
        match = None if self._pattern is None else self._pattern.search(name)
        if match is None or match.lastgroup is None:
            return like.dtype
        return self._plan[self._keys[match.lastgroup]]


def _put(model: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
