"""Turn some feed-forward blocks of a Llama model into Mixture-of-Experts layers, and leave the others dense.

The result is a Qwen2-MoE model, the family of transformers whose layers may be of both kinds. It computes what the
dense model computes, whatever its routers choose: the experts are copies, the weights of the chosen ones sum to 1, and
the shared expert that the family always has is zero. `with_changes` makes the experts differ.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.upcycle import copied_weights, settings_of

KINDS = ("gate", "up", "down")
"""The matrices of a feed-forward block."""
SHARED = 8
"""Width of the shared expert: small, because it is zero."""


def branched(dense: Any, moe_layers: Collection[int], experts: int, top_k: int = 2) -> Any:
    """A Qwen2-MoE model with a dense model's function; routers are zero, and experts share memory with each other.

    Args:
        dense: a Llama model without biases.
        moe_layers: the numbers of the layers that become MoE layers, from 0.
        experts: E, in each of them; top_k: experts per token.

    Raises:
        UnsupportedModelError: the model is not a Llama model, or has biases, which Qwen2-MoE's blocks have not.
        ValueError: a layer that the model does not have, or top_k or experts out of range.
    """
    source = dense.config
    if source.model_type != "llama":
        raise UnsupportedModelError(f"cannot branch a {source.model_type} model; only llama models")
    if source.attention_bias or source.mlp_bias:
        raise UnsupportedModelError("cannot branch this llama model: it has biases")
    layers = range(source.num_hidden_layers)
    if not moe_layers or not set(moe_layers) <= set(layers):
        raise ValueError(f"expected layers from 0 to {layers[-1]}, got {sorted(moe_layers)}")
    if not 1 <= top_k <= experts or experts < 2:
        raise ValueError(f"expected experts >= 2 and 1 <= top_k <= experts, got {experts} and {top_k}")
    config = Qwen2MoeConfig(
        **settings_of(dense),
        mlp_only_layers=[layer for layer in layers if layer not in moe_layers],
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=source.intermediate_size,
        shared_expert_intermediate_size=SHARED,
        qkv_bias=False,
        dtype=source.dtype,
    )
    with torch.device("meta"):
        model: Any = Qwen2MoeForCausalLM(config)
    # New are the routers and the shared expert.
    weights = copied_weights(
        dense, model, experts, lambda new: torch.zeros(new.shape, dtype=dense.dtype, device=dense.device)
    )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(dense.device)  # its tables are computed, not loaded
    model.generation_config = dense.generation_config
    return model.eval()


def with_changes(dense: Any, changes: Mapping[str, Tensor], top_k: int) -> Any:
    """A Qwen2-MoE model whose expert 0 is the dense block, and whose expert e is the block with the changes e - 1.

    Args:
        changes: `layers.{l}.{kind}.b` [E - 1, out, R] and `layers.{l}.{kind}.a` [E - 1, R, in] of each MoE layer and
            kind: W + b a. With `layers.{l}.router` [E, H] the layer has this router, otherwise one of zeros.

    Raises:
        UnsupportedModelError, ValueError: as `branched`.
    """
    layers = sorted({int(name.split(".")[1]) for name in changes})
    number = len(changes[f"layers.{layers[0]}.{KINDS[0]}.a"])
    model = branched(dense, layers, 1 + number, top_k)
    for layer in layers:
        block = model.model.layers[layer].mlp
        experts = block.experts
        for stack in ("gate_up_proj", "down_proj"):  # the experts' own memory
            setattr(experts, stack, torch.nn.Parameter(getattr(experts, stack).detach().clone()))
        pairs = [[changes[f"layers.{layer}.{kind}.{part}"].float() for part in ("b", "a")] for kind in KINDS]
        for expert in range(number):
            gate, up, down = ((b[expert] @ a[expert]).to(dense.device) for b, a in pairs)
            experts.gate_up_proj.data[1 + expert] += torch.cat([gate, up])
            experts.down_proj.data[1 + expert] += down
        if (router := changes.get(f"layers.{layer}.router")) is not None:
            block.gate.weight.data.copy_(router)
    return model
