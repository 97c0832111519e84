"""Fold what was trained into the weights, so that what remains is a plain transformers model.

    W = W + c B A        per expert and projection, c = alpha / rank; the same for attention LoRA

The sum is made in float32 and rounded once, to the precision of the result.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.model import MoEModel

SHARD_SIZE = "5GB"
"""Of a file at most."""


@torch.no_grad()
def merge(model: MoEModel, dtype: torch.dtype) -> None:
    """Merge in place: `model.model` has stock modules and parameters of `dtype` afterwards, and nothing is trained.

    Beside the model, one expert is in memory at a time; a layer's experts where they change precision or are copies
    of one matrix. Tensors that transformers keeps in float32 whatever the model's precision stay so.

    Raises:
        ValueError: a store holds the experts, so the model does not have them.
    """
    if model.store is not None:
        raise ValueError("the experts of this model are in a store; load it whole to merge")
    for state in model.states:
        _merge_experts(model.model, state, dtype)
    if model.attention:
        _merge_attention(model.model, dtype)
    kept = [name.split("*")[-1].strip(".") for name in model.model._get_dtype_plan(dtype)]
    for name, parameter in model.model.named_parameters():
        whole = any(part in name for part in kept)
        parameter.data = parameter.data.to(torch.float32 if whole else dtype)
        parameter.requires_grad_(False)
    model.routers, model.shared, model.attention = {}, {}, {}


def save(model: Any, folder: Path) -> None:
    """Write a stock model in the hub's layout, with its config and generation config.

    transformers' conversion to that layout copies the weights: twice the model is in memory meanwhile.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # GGUF and its like: what is in memory is dequantised
        model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def skeleton(model: Any, **changes: Any) -> Any:
    """A stock model of the same class without contents (meta device), with some values of its text config changed."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    with torch.device("meta"):
        empty = type(model)(config)
    empty.tie_weights()
    return empty


def _merge_experts(model: Any, state: ExpertState, dtype: torch.dtype) -> None:
    trained, transposed = state.trained, state.math().transposed
    state.trained = None  # fully trained experts are the model's own tensors already
    entries = state.layout.names()
    for kind in entries[0]:
        if not state.layout.stacked:
            for expert, names in enumerate(entries):
                parameter = model.get_parameter(names[kind])
                parameter.data = _merged(parameter.data, trained, kind, expert, transposed).to(dtype)
            continue
        parameter = model.get_parameter(entries[0][kind])
        stack = parameter.data
        # Copies of one matrix (a freshly upcycled model) become matrices of their own.
        reusable = stack.dtype == dtype and stack.stride(0) != 0
        own = stack if reusable else torch.empty(stack.shape, dtype=dtype, device=stack.device)
        for expert, row in enumerate(stack):
            own[expert] = _merged(row, trained, kind, expert, transposed)
        parameter.data = own


def _merged(base: Tensor, trained: Any, kind: str, expert: int, transposed: bool) -> Tensor:
    """One expert's tensor with its low-rank term, in float32 where there is one.

    Some families have rows behind those of the experts, for experts that compute nothing: these have none.
    """
    if trained is None or f"{kind}_a" not in trained.stacks or expert >= trained.num_experts:
        return base
    a, b = trained.stacks[f"{kind}_a"][expert], trained.stacks[f"{kind}_b"][expert]
    delta = a.t() @ b.t() if transposed else b @ a
    return base.float().add(delta.to(base.device), alpha=trained.scale)


def _merge_attention(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the linear maps that PEFT wrapped back in their places, with the low-rank term in their weights."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        linear: Any = module.get_base_layer()
        (adapter,) = module.lora_A
        factors: Any = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        a, b = factors
        merged = linear.weight.float().add(b.float() @ a.float(), alpha=module.scaling[adapter])
        linear.weight.data = merged.to(dtype)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, linear)
