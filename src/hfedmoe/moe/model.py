"""A MoE model ready for federated fine-tuning: what is trained, what is resident, what travels.

Trainable tensors have three kinds, and the names under which they travel say so:

    router.{layer}.{name}    gates, whole
    experts.{layer}.{name}   trained tensors of the experts, one row per expert
    shared.{name}            everything else that is trained, whole
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from hfedmoe.moe.anatomy import MoELayer, UnsupportedModelError, find_moe_layers
from hfedmoe.moe.experts import ExpertState, attach
from hfedmoe.moe.residency import carve, mask
from hfedmoe.moe.routing import Batch, LayerRouting
from hfedmoe.moe.trained import full_experts, lora_experts


class MoEModel:
    """Wraps a transformers model in place; everything outside `parameters()` is frozen.

    Args:
        model: any transformers model with MoE layers.
        experts: "lora", "full" or "frozen".
        rank, alpha: of the LoRA pairs; the low-rank term is scaled by alpha / rank.
        freeze_a: LoRA's A stays at its seeded random value and does not travel.
        router: train the routers.
        attention: LoRA (same rank and alpha) on the attention projections, through PEFT.
        seed: of the LoRA initialisation; must be the same on all devices.
        off_budget: what resident experts over the activation budget do: "frozen" (forward only) or "skip".

    Raises:
        UnsupportedModelError: no MoE layers, or layers that the expert forward does not know.
    """

    def __init__(
        self,
        model: Any,
        experts: str = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        freeze_a: bool = False,
        router: bool = True,
        attention: bool = False,
        seed: int = 0,
        off_budget: str = "frozen",
    ) -> None:
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layers: list[MoELayer] = find_moe_layers(model)
        self.states: list[ExpertState] = attach(model, self.layers)
        self.routing = [LayerRouting(state) for state in self.states]
        self.shared = _add_attention_lora(model, rank, alpha, seed) if attention else {}
        for state in self.states:
            state.off_budget = off_budget
            self._train_experts(state, experts, rank, alpha, freeze_a, seed)
        self.routers: dict[str, Tensor] = {}
        if router:
            for layer in self.layers:
                for name, parameter in layer.router.named_parameters():
                    self.routers[f"router.{layer.index}.{name}"] = parameter.requires_grad_(True)

    def _train_experts(
        self, state: ExpertState, experts: str, rank: int, alpha: float, freeze_a: bool, seed: int
    ) -> None:
        tensors = state.tensors()
        device = tensors["up"].device
        if experts == "lora":
            up, down = tensors["up"].shape[1:], tensors["down"].shape[1:]
            if state.math().transposed:
                up, down = up[::-1], down[::-1]
            state.trained = lora_experts(
                state.layer.num_experts,
                (up[0], up[1]),
                (down[0], down[1]),
                rank,
                alpha,
                seed * 100_003 + state.layer.index,
                device,
                freeze_a,
            )
        elif experts == "full":
            own = {name: tensor.contiguous() for name, tensor in tensors.items()}  # shared copies become real ones
            state.set_tensors(own)
            state.trained = full_experts(state.tensors() if state.stacked else own)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def num_experts(self) -> list[int]:
        """Experts per MoE layer."""
        return [layer.num_experts for layer in self.layers]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> list[Tensor]:
        """Everything that is trained: routers, shared tensors, and one leaf per expert and kind."""
        leaves = [leaf for state in self.states if state.trained is not None for leaf in state.trained.parameters()]
        return [*self.routers.values(), *self.shared.values(), *leaves]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})

    def set_resident(self, resident: list[Tensor] | None) -> None:
        """Mask the model to the resident experts (bool [E] per layer); None: all. Raises ValueError below top-k."""
        mask(self.states, resident)

    def carve(self, resident: list[Tensor]) -> None:
        """Drop absent experts from memory for good. Raises ValueError below top-k."""
        carve(self.states, resident)

    def watch(self, batch: Batch | None, measure: str | None = None) -> None:
        """Gather routing evidence from the next pass in every layer; None stops."""
        for routing in self.routing:
            routing.watch(batch, measure)

    def trained_now(self) -> list[list[bool]]:
        """Per layer and local expert: did the last backward pass give it a gradient?"""
        return [[] if state.trained is None else state.trained.has_gradient() for state in self.states]

    def router_gradient_problem(self) -> str | None:
        """Why the routers cannot learn, if they cannot: with top-1 and renormalised weights every weight is 1."""
        for layer in self.layers:
            weight = next(p for p in layer.router.parameters() if p.dim() == 2)
            if weight.is_meta or not self.routers:
                return None
            if not _router_learns(layer, weight):
                return (
                    f"layer {layer.name} routes each token to {layer.top_k} expert(s) with weights that do not depend "
                    "on the router (top-1 weights renormalised to 1), so the router gets no gradient; "
                    "use top_k >= 2, a family that does not renormalise, or train.router = false"
                )
        return None


def _router_learns(layer: MoELayer, weight: Tensor) -> bool:
    """Run the router alone on random states and see whether its gate weights have a gradient."""
    generator = torch.Generator().manual_seed(982_451_653)  # no seed that weights are drawn with
    states = torch.randn(1, 8, weight.shape[1], generator=generator).to(weight)
    with torch.enable_grad():
        outputs = layer.router(states)
        if isinstance(outputs, Tensor):  # logits only: the weights are made by the block
            return layer.top_k > 1 or not getattr(layer.block, "norm_topk_prob", False)
        scores = [
            out for out in outputs if out.is_floating_point() and out.shape[-1] == layer.top_k and out.requires_grad
        ]
        if not scores:
            return False
        mix = torch.rand(scores[0].shape, generator=generator).to(scores[0])
        (gradient,) = torch.autograd.grad((scores[0] * mix).sum(), weight)
    # Renormalised top-1 weights are w / w: what is left is rounding, about 1e-7, where real gradients are 0.1 to 1.
    return bool(gradient.abs().max() > 1e-5)


def _add_attention_lora(model: Any, rank: int, alpha: float, seed: int) -> dict[str, Tensor]:
    """PEFT's LoRA on every linear map of the attention; the adapters' parameters under their travelling names."""
    targets = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and any("att" in part.lower() for part in name.split(".")[:-1])
        }
    )
    if not targets:
        raise UnsupportedModelError(f"{type(model).__name__}: no attention projections found to put LoRA on")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, model)
    torch.random.set_rng_state(state)
    return {
        f"shared.{name}": parameter.requires_grad_(True)
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
