"""Sparse upcycling: every feed-forward block of a dense model becomes E equal experts with a new router.

The model's function is unchanged, because the experts are copies and the top-k weights sum to 1 (Komatsuzaki et al.,
2022). In memory the copies are one tensor until they are trained or written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.families import DENSE

COPIED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sliding_window",
    "attention_dropout",
)


def upcycle(dense: Any, experts: int, top_k: int, router_std: float, seed: int) -> Any:
    """A Mixtral model with the dense model's weights; its experts share memory with each other.

    Args:
        dense: a Llama or Mistral model.
        router_std: standard deviation of the new router rows, drawn with `seed`.

    Raises:
        UnsupportedModelError: the family is not supported, or the model has biases, which Mixtral does not have.
        ValueError: top_k or experts out of range.
    """
    source = dense.config
    if source.model_type not in DENSE:
        raise UnsupportedModelError(
            f"cannot upcycle a {source.model_type} model yet; dense families that work: {', '.join(DENSE)}"
        )
    if getattr(source, "attention_bias", False) or getattr(source, "mlp_bias", False):
        raise UnsupportedModelError(f"cannot upcycle this {source.model_type} model: Mixtral has no biases")
    if not 1 <= top_k <= experts or experts < 2:
        raise ValueError(f"expected experts >= 2 and 1 <= top_k <= experts, got {experts} and {top_k}")
    config = MixtralConfig(
        **settings_of(dense),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        router_jitter_noise=0.0,
        dtype=source.dtype,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    like = next(iter(dense.state_dict().values()))
    weights = copied_weights(
        dense, model, experts, lambda router: (torch.randn(router.shape, generator=generator) * router_std).to(like)
    )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    _restore_buffers(model, dense)
    model.generation_config = dense.generation_config
    return model.eval()


def settings_of(dense: Any) -> dict[str, Any]:
    """The settings of a dense model that an MoE made of it keeps."""
    return {key: getattr(dense.config, key) for key in COPIED_SETTINGS if hasattr(dense.config, key)}


def copied_weights(dense: Any, model: Any, experts: int, new: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The weights of an MoE whose experts are copies of a dense model's blocks; copies share memory.

    Args:
        model: the MoE, whose parameters may be on the meta device; experts: E of its MoE layers.
        new: makes a parameter that the dense model has none for, from the model's own, of which only the shape counts.
    """
    have = dense.state_dict()
    weights: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        block = name.split(".mlp.")[0] + ".mlp."
        if name in have:
            weights[name] = have[name]
        elif name.endswith("experts.gate_up_proj"):
            one = torch.cat([have[f"{block}gate_proj.weight"], have[f"{block}up_proj.weight"]])
            weights[name] = one.expand(experts, *one.shape)
        elif name.endswith("experts.down_proj"):
            one = have[f"{block}down_proj.weight"]
            weights[name] = one.expand(experts, *one.shape)
        else:
            weights[name] = new(target)
    return weights


def _restore_buffers(model: nn.Module, dense: nn.Module) -> None:
    """Rotary tables are computed, not stored: take those of the dense model, which uses the same positions."""
    tables = dict(dense.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = tables[name].clone()
