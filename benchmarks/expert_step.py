"""One training step of a small OLMoE under one way of computing and training its experts: the cells of expert_forward.

Four layers, hidden 576, intermediate 768, random weights; sequences of 64 tokens. The step is forward, backward and
AdamW, whose time is measured apart. What is trained:

* `ours`: LoRA on the experts with hfedmoe's expert forward, the model carved to the resident share;
* `ours frozen`: the same forward with frozen experts, and one attention matrix that is trained;
* `ours full`: the experts themselves;
* `peft X`: PEFT's LoRA with `target_parameters` on the stock model with the experts implementation X;
* `frozen X`: one attention matrix of the stock model; `full X`: the stock model's experts themselves.
"""

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.common import peak_bytes

LAYERS, HIDDEN, INTERMEDIATE, LENGTH, RANK, VOCABULARY = 4, 576, 768, 64, 8, 4096
STOCK = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    experts: int
    top_k: int
    tokens: int
    dtype: str = "float32"
    share: float = 1.0

    @property
    def resident(self) -> int:
        return round(self.experts * self.share)


def build(cell: Cell) -> Any:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        eos_token_id=2,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=cell.experts,
        num_experts_per_tok=cell.top_k,
        max_position_embeddings=256,
    )
    return OlmoeForCausalLM(config).to(getattr(torch, cell.dtype)).train()


def prepare(cell: Cell, variant: str) -> tuple[Any, list[Any]]:
    """The model, and what the optimizer trains."""
    kind, _, implementation = variant.partition(" ")
    model = build(cell)
    if kind == "ours":
        return _ours(model, cell, implementation)
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind == "frozen":
        return model, [model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)]
    if kind == "full":
        stacks = [
            getattr(layer.mlp.experts, name) for layer in model.model.layers for name in ("gate_up_proj", "down_proj")
        ]
        return model, [stack.requires_grad_(True) for stack in stacks]
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    wrapped = get_peft_model(model, config)
    return wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


def _ours(model: Any, cell: Cell, what: str) -> tuple[Any, list[Any]]:
    import torch

    from hfedmoe.moe.compact import compute_in_float32, wants_float32
    from hfedmoe.moe.model import MoEModel

    if wants_float32("auto", torch.device("cpu"), getattr(torch, cell.dtype)):
        compute_in_float32(model)
    ours = MoEModel(model, experts=what or "lora", rank=RANK, router=False)
    if cell.share < 1:
        keep = torch.arange(cell.experts) % round(1 / cell.share) == 0
        ours.carve([keep] * LAYERS)
    if what == "frozen":
        return model, [model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)]
    return model, ours.parameters()


def measure(
    experts: int, top_k: int, tokens: int, dtype: str, share: float, variant: str, seconds: float
) -> dict[str, Any]:
    """Step for at least so many seconds (3 to 20 steps, slow ones only twice) after a first one.

    Returns:
        The seconds of every forward and backward pass and of every update, peak memory and the last loss.
    """
    import torch

    from hfedmoe.device.allocator import keep_freed_memory

    keep_freed_memory()  # as `hfedmoe run` does; here for all variants alike
    cell = Cell(experts, top_k, tokens, dtype, share)
    model, parameters = prepare(cell, variant)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(1))
    passes: list[float] = []
    updates: list[float] = []
    started = time.perf_counter()
    while len(passes) < _enough(passes) or (time.perf_counter() - started < seconds and len(passes) < 21):
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        passes.append(middle - begin)
        updates.append(time.perf_counter() - middle)
        if len(passes) == 1:
            started = time.perf_counter()
    return {"passes": passes[1:], "updates": updates[1:], "peak_bytes": peak_bytes(), "loss": loss.item()}


def _enough(passes: list[float]) -> int:
    """Steps to be done, the first one included."""
    return 3 if passes and passes[0] > 5 else 4
