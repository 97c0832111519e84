"""One training step of a small OLMoE, with one way to compute and train its experts: a cell of expert_forward.

Four layers, hidden 576, intermediate 768, random weights; sequences of 64 tokens. The step is forward, backward and
AdamW; the time of AdamW is measured separately. What is trained:

* `ours`: LoRA on the experts with hfedmoe's expert forward; below a resident share of 100 % the absent experts are
  never read, as on a device of a federation;
* `ours frozen`: the same forward with frozen experts; one attention matrix is trained;
* `ours full`: the experts themselves;
* `peft X`: PEFT's LoRA with `target_parameters` on the stock model with the experts implementation X;
* `frozen X`: one attention matrix of the stock model; `full X`: the stock model's experts themselves.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfedmoe.device.peak import peak_process_bytes

LAYERS, HIDDEN, INTERMEDIATE, LENGTH, RANK, VOCABULARY = 4, 576, 768, 64, 8, 4096
STOCK = ("grouped_mm", "batched_mm", "eager")
"""Ways to compute stock experts; the usually fastest is first."""


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    experts: int
    top_k: int
    tokens: int
    dtype: str = "float32"
    share: float = 1.0

    @property
    def resident(self) -> int:
        return round(self.experts * self.share)


def shape_of(experts: int) -> Any:
    """The configuration of the small OLMoE with `experts` experts per layer."""
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=VOCABULARY,
        eos_token_id=2,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )


def write(folder: str, experts: int, dtype: str) -> dict[str, Any]:
    """Write the small OLMoE with random weights; experts are stacked as in memory, so loading needs no extra memory."""
    import torch
    from transformers import OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(shape_of(experts)).to(getattr(torch, dtype))
    model.save_pretrained(folder, save_original_format=False)
    return {}


def prepare(folder: str, cell: Cell, variant: str) -> tuple[Any, list[Any]]:
    """The model of a checkpoint folder, and the parameters that the optimizer trains."""
    import torch
    from transformers import OlmoeForCausalLM

    kind, _, implementation = variant.partition(" ")
    if kind == "ours" and cell.share < 1:
        return _carved(folder, cell, implementation or "lora")
    model = OlmoeForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, cell.dtype), num_experts_per_tok=cell.top_k
    ).train()
    if kind == "ours":
        return _wrapped(model, cell, implementation or "lora", None)
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind == "frozen":
        return model, [model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)]
    if kind == "full":
        experts = [layer.mlp.experts for layer in model.model.layers]
        stacks = [stack for one in experts for stack in (one.gate_up_proj, one.down_proj)]
        return model, [stack.requires_grad_(True) for stack in stacks]
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    wrapped = get_peft_model(model, config)
    return wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]


def _carved(folder: str, cell: Cell, experts: str) -> tuple[Any, list[Any]]:
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from hfedmoe.moe.weights.shards import Shards
    from hfedmoe.moe.weights.skeleton import empty_model, fill

    dtype = getattr(torch, cell.dtype)
    config = OlmoeConfig.from_pretrained(folder, num_experts_per_tok=cell.top_k)
    model = empty_model(AutoModelForCausalLM, config, dtype).train()
    store = fill(model, Shards(Path(folder)), dtype, "same", torch.device("cpu"))
    return _wrapped(model, cell, experts, store)


def _wrapped(model: Any, cell: Cell, experts: str, store: Any) -> tuple[Any, list[Any]]:
    import torch

    from hfedmoe.moe.compact import compute_in_float32, wants_float32
    from hfedmoe.moe.model import MoEModel

    if wants_float32("auto", torch.device("cpu"), getattr(torch, cell.dtype)):
        compute_in_float32(model)
    ours = MoEModel(model, experts=experts, rank=RANK, router=False, store=store)
    if store is not None:
        keep = torch.arange(cell.experts) % round(1 / cell.share) == 0
        ours.set_resident([keep] * LAYERS)
    if experts == "frozen":
        return model, [model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)]
    return model, ours.parameters()


def measure(
    folder: str,
    experts: int,
    top_k: int,
    tokens: int,
    dtype: str,
    share: float,
    variant: str,
    seconds: float,
    hopeless_s: float,
) -> dict[str, Any]:
    """Take steps for at least `seconds` (3 to 20 steps, or one if steps are slow) after a first step.

    Args:
        hopeless_s: if the first step takes longer, it is the only one and is the result.

    Returns:
        The seconds of every forward and backward pass and of every update, peak memory and the last loss.
    """
    import torch
    import transformers

    from hfedmoe.device.allocator import keep_freed_memory

    if not variant.startswith("ours"):
        # hfedmoe limits the code that oneDNN keeps; the others use oneDNN's default limit.
        os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()  # as `hfedmoe run` does; here for all variants
    cell = Cell(experts, top_k, tokens, dtype, share)
    model, parameters = prepare(folder, cell, variant)
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
            if passes[0] > hopeless_s:
                break
            started = time.perf_counter()
    return {
        "passes": passes[1:] or passes,
        "updates": updates[1:] or updates,
        "peak_bytes": peak_process_bytes(),
        "loss": loss.item(),
    }


def _enough(passes: list[float]) -> int:
    """The fewest steps, with the first one."""
    return 2 if passes and passes[0] > 5 else 4
