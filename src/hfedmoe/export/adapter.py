"""Write the trained tensors, including experts, as a PEFT adapter that stock `PeftModel.from_pretrained` loads.

| trained here | in PEFT |
|---|---|
| LoRA of experts in stacks [E, ., .] | `target_parameters`: A [E R, in] by expert, B [out, R E] by rank |
| LoRA of experts that are modules, and of attention | `target_modules` |
| routers | `modules_to_save` |

PEFT builds the adapter on an empty copy of the model (meta device) and writes it; only the values come from here.
"""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.export.merged import skeleton
from hfedmoe.moe.model import MoEModel

ADAPTER = "default"
_PREFIX = "base_model.model."


def save_adapter(
    model: MoEModel, folder: Path, base: str, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        model: has its trained tensors loaded.
        base: the value of `base_model_name_or_path`; `revision`: of a hub model.
        dtype: of the adapter's tensors.

    Raises:
        UserError: the trained tensors do not make an adapter: whole experts, or only routers.
    """
    from peft import LoraConfig, get_peft_model

    check_adaptable(model)
    rank, alpha = _rank_and_alpha(model)
    experts = dict(_expert_names(model))
    attention = {name.removeprefix("shared.").split(".lora_")[0] for name in model.attention}
    stock = skeleton(model.model)
    modules = [name for name, _ in stock.named_modules()]
    listed = {name.removesuffix(".weight") for name, (_, _, expert) in experts.items() if expert is not None}
    stacked = {name for name, (_, _, expert) in experts.items() if expert is None}
    settings: Any = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=shortest(attention | listed, modules),
        target_parameters=shortest(stacked, [name for name, _ in stock.named_parameters()]) or None,
        modules_to_save=shortest(set(_routers(model)), modules) or None,
        task_type="SEQ_2_SEQ_LM" if stock.config.is_encoder_decoder else "CAUSAL_LM",
        inference_mode=True,
    )
    with warnings.catch_warnings():
        # PEFT warns about experts and about the unknown base model: neither matters, the adapter is only written.
        warnings.simplefilter("ignore")
        peft: Any = get_peft_model(stock, settings)
        settings = peft.peft_config[ADAPTER]
        settings.base_model_name_or_path, settings.revision = base, revision
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in _values(model, peft, experts)
        }
        wanted = {n: t for n, t in peft.state_dict().items() if ".lora_" in n or f".modules_to_save.{ADAPTER}." in n}
        assert wanted.keys() == tensors.keys(), sorted(wanted.keys() ^ tensors.keys())[:4]
        assert all(wanted[name].shape == tensor.shape for name, tensor in tensors.items())
        peft.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)


def check_adaptable(model: MoEModel) -> None:
    """Raise UserError unless low-rank terms of experts or attention were trained."""
    low_rank = [state for state in model.states if state.trained is not None and "up_a" in state.trained.stacks]
    if not low_rank and any(state.trained is not None for state in model.states):
        raise UserError('this run trained whole experts (train.experts = "full"), not an adapter; use --as merged')
    if not low_rank and not model.attention:
        raise UserError("this run trained only routers, which PEFT does not accept as an adapter; use --as merged")


def shortest(wanted: set[str], names: Iterable[str]) -> list[str]:
    """The shortest name endings (at least two dotted parts) that match exactly `wanted` among `names`.

    PEFT matches any ending in one place and only whole parts in another; these endings work for both.
    """
    everything = set(names)
    for parts in range(2, max((name.count(".") + 1 for name in wanted), default=0) + 1):
        endings = tuple({".".join(name.split(".")[-parts:]) for name in wanted})
        if {name for name in everything if name.endswith(endings)} == wanted:
            return sorted(endings)
    return sorted(wanted)


def _values(
    model: MoEModel, peft: Any, experts: dict[str, tuple[Any, str, int | None]]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adapter under its name in `peft`."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    routers = _routers(model)
    for name, module in peft.named_modules():
        own = name.removeprefix(_PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            for leaf, tensor in routers[own].state_dict().items():
                yield f"{name}.modules_to_save.{ADAPTER}.{leaf}", tensor.detach()
            continue
        if isinstance(module, ParamWrapper):
            # Two parameters of one module: the wrapper of the first is the base layer of the second wrapper.
            state, side, _ = experts[f"{own.replace('.base_layer', '')}.{module.parameter_name}"]
            a, b = _flat_factors(state, side, module)
        elif isinstance(module, LoraLayer) and f"{own}.weight" in experts:
            state, side, expert = experts[f"{own}.weight"]
            a, b = state.trained.stacks[f"{side}_a"][expert], state.trained.stacks[f"{side}_b"][expert]
        elif isinstance(module, LoraLayer):
            a, b = (model.attention[f"shared.{own}.lora_{part}.{ADAPTER}.weight"].detach() for part in "AB")
        else:
            continue
        yield f"{name}.lora_A.{ADAPTER}.weight", a.contiguous()
        yield f"{name}.lora_B.{ADAPTER}.weight", b.contiguous()


def _flat_factors(state: Any, side: str, module: Any) -> tuple[Tensor, Tensor]:
    """A stack's factors in the layout of PEFT's `module`: A [E R, in] by expert, B [out, R E] by rank."""
    a, b = state.trained.stacks[f"{side}_a"], state.trained.stacks[f"{side}_b"]
    if state.math().transposed and not getattr(module.get_base_layer(), "is_transposed", False):
        # PEFT reads the stored [in, out] of Llama-4 as [out, in], so its term is the transpose of ours: A^T B^T.
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    missing = module.num_experts - len(a)  # zero experts (LongCat), which compute nothing, have no term
    if missing:
        a, b = (torch.cat([factor, factor.new_zeros(missing, *factor.shape[1:])]) for factor in (a, b))
    return a.reshape(-1, a.shape[2]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def _expert_names(model: MoEModel) -> Iterator[tuple[str, tuple[Any, str, int | None]]]:
    """Parameter with a low-rank term -> state, "up" or "down", and the expert (None: a stack of all experts)."""
    for state in model.states:
        if state.trained is None or "up_a" not in state.trained.stacks:
            continue
        for expert, names in enumerate(state.layout.names()):
            for side in ("up", "down"):
                yield names[side], (state, side, None if state.layout.stacked else expert)


def _routers(model: MoEModel) -> dict[str, Any]:
    """Name in the model -> trained router."""
    trained = {id(layer.router) for layer in model.layers} if model.routers else set()
    return {name: module for name, module in model.model.named_modules() if id(module) in trained}


def _rank_and_alpha(model: MoEModel) -> tuple[int, float]:
    for state in model.states:
        if state.trained is not None and "up_a" in state.trained.stacks:
            rank = state.trained.stacks["up_a"].shape[1]
            return rank, state.trained.scale * rank
    name = next(iter(model.attention)).removeprefix("shared.").split(".lora_")[0]
    layer = model.model.get_submodule(name)
    return layer.r[ADAPTER], float(layer.lora_alpha[ADAPTER])
