"""The same layer by others: transformers, PEFT and experts4bit-qlora, each as its documentation says is fastest."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_layer import ALPHA, RANK, SMALL, Layer, Shape, stacks_of


class Holder(nn.Module):
    """Stands for the model around a layer: libraries look for modules to change inside it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        out: Tensor = self.experts(x, index, weights)
        return out


def stock(shape: Shape, device: torch.device, dtype: torch.dtype) -> Layer:
    """transformers' own experts with `grouped_mm`, frozen: the fastest that trains anything below them."""
    experts = _stock(shape, device, dtype)
    return Layer(experts, _bytes(experts))


def peft(shape: Shape, device: torch.device, dtype: torch.dtype) -> Layer:
    """PEFT's `target_parameters` on transformers' experts with `grouped_mm`; PEFT holds A and B in float32."""
    from peft import LoraConfig, get_peft_model

    holder = Holder(_stock(shape, device, dtype))
    weight_bytes = _bytes(holder)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    model: Any = get_peft_model(holder, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) != 4:
        raise RuntimeError(f"PEFT trains {len(trained)} tensors, not A and B of two projections")
    _fill(model, "lora_B")
    return Layer(model, weight_bytes, trained)


def experts4bit(
    shape: Shape, device: torch.device, dtype: torch.dtype, quant_type: str = "nf4", adapters: str = "same"
) -> Layer:
    """experts4bit-qlora with grouped-nf4-gemm and `enable_fast_train(model, dgrad=True)`, its fastest for training.

    Its own recipe has A and B in bfloat16, its command line in float32: `adapters` is "same" (as `dtype`) or "float32".
    Environment variables stay unset, so all its choices are its defaults. That call supports NF4 only: bfloat16 weights
    take its loop over experts. It needs a GPU: on a CPU, NF4 takes the loop too.
    """
    from experts4bit_qlora import ExpertsLoRA, ExpertsNbit
    from experts4bit_qlora.engines.fast import FAST_TRAIN_STATS, enable_fast_train

    base = ExpertsNbit.from_float(*stacks_of(shape, device, dtype), quant_type=quant_type, compute_dtype=dtype)
    experts = ExpertsLoRA(base, r=RANK, alpha=ALPHA, dtype=dtype if adapters == "same" else torch.float32).to(device)
    holder = Holder(experts)
    if device.type == "cuda" and quant_type == "nf4" and enable_fast_train(holder, dgrad=True) != 1:
        raise RuntimeError(f"experts4bit-qlora did not take its fast path: {FAST_TRAIN_STATS}")
    trained = [parameter for parameter in holder.parameters() if parameter.requires_grad]
    if len(trained) != 4:
        raise RuntimeError(f"experts4bit-qlora trains {len(trained)} tensors, not A and B of two projections")
    _fill(holder, "lora_B")
    return Layer(holder, _bytes(base), trained, _paths)


def _paths() -> dict[str, object]:
    import nf4_qlora
    import nf4_route

    return {
        "lora": dict(nf4_qlora.LORA_PATH_STATS),
        "dgrad": dict(nf4_qlora.DGRAD_STATS),
        "route": dict(nf4_route.ROUTE_STATS),
    }


def _stock(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import OlmoeConfig, Qwen3MoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if shape.name == "qwen3":
        config: Any = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.num_experts
        )
        kind: Any = Qwen3MoeExperts
    else:
        config = OlmoeConfig(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_experts=shape.num_experts
        )
        kind = OlmoeExperts
    config.num_experts_per_tok = shape.top_k
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts: nn.Module = kind(config)
    up, down = stacks_of(shape, device, dtype)
    experts.gate_up_proj = nn.Parameter(up, requires_grad=False)
    experts.down_proj = nn.Parameter(down, requires_grad=False)
    return experts


def _fill(model: nn.Module, name: str) -> None:
    """Small random values for the parameters with `name` in their names."""
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if name in own:
                parameter.normal_(0.0, SMALL)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
