"""Merge trained LoRA terms into the weights, which gives a plain transformers model.

    W = W + c B A        per expert and projection, c = alpha / rank; the same for attention LoRA

The sum is computed in float32 and rounded once, to the dtype of the result.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.model import MoEModel

SHARD_SIZE = "5GB"
"""Maximum size of one file."""


@torch.no_grad()
def merge(model: MoEModel, dtype: torch.dtype) -> None:
    """Merge in place: afterwards `model.model` has stock modules, parameters of `dtype`, and nothing to train.

    This needs memory for one more expert, or for the experts of one layer if their dtype changes or they are copies of
    one matrix. Tensors that transformers always keeps in float32 stay in float32.

    Raises:
        ValueError: a store holds the experts instead of the model.
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
    say_whether_tied(model.model)


def save(model: Any, folder: Path) -> None:
    """Write a stock model in the hub's layout, with its config and generation config.

    transformers copies the weights for this layout, so the model is in memory twice during the call.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # for example GGUF: the model in memory is dequantised
        model.is_quantized, model.hf_quantizer = False, None
    say_whether_tied(model)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def say_whether_tied(model: Any) -> None:
    """Set `tie_word_embeddings` to false in the config if the head is not the embedding.

    transformers compares the two when it loads a checkpoint, other software does not and would use the embedding.
    Encoder-decoders are left alone: the same setting scales their decoder's output.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if head is None or not tied or model.config.is_encoder_decoder:
        return
    a, b = head.weight, embedding.weight
    if a is not b and not (a.shape == b.shape and torch.equal(a, b)):
        for config in configs:
            config.tie_word_embeddings = False


def skeleton(model: Any, **changes: Any) -> Any:
    """An empty stock model of the same class (meta device); `changes` are new values of its text config."""
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
        # Experts that share one matrix (a new upcycled model) get a matrix each.
        reusable = stack.dtype == dtype and stack.stride(0) != 0
        own = stack if reusable else torch.empty(stack.shape, dtype=dtype, device=stack.device)
        for expert, row in enumerate(stack):
            own[expert] = _merged(row, trained, kind, expert, transposed)
        parameter.data = own


def _merged(base: Tensor, trained: Any, kind: str, expert: int, transposed: bool) -> Tensor:
    """One expert's tensor plus its low-rank term, in float32; unchanged if there is no term.

    In some families, more rows follow those of the experts, for zero experts: these have no term.
    """
    if trained is None or f"{kind}_a" not in trained.stacks or expert >= trained.num_experts:
        return base
    a, b = trained.stacks[f"{kind}_a"][expert], trained.stacks[f"{kind}_b"][expert]
    delta = a.t() @ b.t() if transposed else b @ a
    return base.float().add(delta.to(base.device), alpha=trained.scale)


def _merge_attention(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace PEFT's wrappers by their linear layers, with the low-rank term merged into the weights."""
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
