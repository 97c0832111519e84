"""Tiny models with something trained in them, as exports find them."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hfedmoe.export.personal import Scores, experts_per_layer, most_valuable, router_groups
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.upcycle import upcycle
from tests.families.table import build, inputs

DENSE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def fresh(family: str, **changes: Any) -> Any:
    """A stock model, untrained; "upcycled" is one whose equal experts share memory."""
    if family != "upcycled":
        return build(family, **changes).eval()
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**DENSE))
    return upcycle(dense, experts=4, top_k=2, router_std=0.5, seed=0)


def plain(model: Any) -> dict[str, Tensor]:
    """Inputs without padding."""
    x = inputs(model)
    return x | {"attention_mask": torch.ones_like(x["attention_mask"])}


@torch.no_grad()
def logits_of(model: Any, x: dict[str, Tensor]) -> Tensor:
    return model(**x).logits.float()


@torch.no_grad()
def trained(stock: Any, **settings: Any) -> MoEModel:
    """A wrapped model whose every trained tensor is away from where it started."""
    model = MoEModel(stock, rank=3, alpha=5.0, **settings)
    generator = torch.Generator().manual_seed(3)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * 0.1

    for tensor in (*model.routers.values(), *model.shared.values()):
        tensor.add_(noise(tensor))
    for state in model.states:
        for name in state.trained.travelling:
            state.trained.stacks[name].add_(noise(state.trained.stacks[name]))
    return model


def half_of(model: MoEModel) -> list[Tensor]:
    """Half the experts, others in every layer, as a client's scores might have it."""
    generator = torch.Generator().manual_seed(7)
    total = max(model.num_experts)
    shape = (len(model.num_experts), total)
    scores = Scores(
        round=1,
        resident=(torch.rand(shape, generator=generator) < 0.3).numpy(),
        importance=torch.rand(shape, generator=generator).numpy(),
        usage=torch.rand(shape, generator=generator).numpy(),
    )
    top_k = max(layer.top_k for layer in model.layers)
    number = experts_per_layer(total // 2 * shape[0], model.num_experts, top_k, model.config)
    assert number == total // 2
    return most_valuable(scores, number, model.num_experts, router_groups(model.config)[0])
