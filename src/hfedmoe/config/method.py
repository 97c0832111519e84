"""Sections `method` and `train`: what distinguishes one method from another."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfedmoe.config.named import NamedIn
from hfedmoe.config.section import Section


class MethodConfig(Section):
    """The method and its constants (docs/method.md). `fedavg` uses only `level`."""

    name: Annotated[
        str,
        NamedIn("hfedmoe.method.methods", "METHODS", "hfedmoe"),
        Field(description="what clients hold, train and send, and how their copies are weighted"),
    ] = "hfedmoe"
    options: Annotated[
        dict[str, float], Field(description="numbers of the method's own (docs/methods.md), such as `{ mu = 0.1 }`")
    ] = Field(default_factory=dict)
    score: Annotated[
        str,
        NamedIn("hfedmoe.method.scores", "SCORES", "ib"),
        Field(description="what an expert is worth to a client"),
    ] = "ib"
    lam: Annotated[
        float, Field(ge=0, le=1, description="eq. 5: weight of cumulative importance, 1 - lam for specific importance")
    ] = 0.5
    beta: Annotated[float, Field(description="eq. 14: weight of redundancy")] = 0.5
    tau: Annotated[float, Field(ge=0, description="eq. 17: usage threshold as a multiple of 1/E")] = 0.1
    level: Annotated[Literal["sample", "token"], Field(description="what x_i is")] = "sample"
    residency: Annotated[Literal["budget", "all"], Field(description="`all`: every client holds every expert")] = (
        "budget"
    )
    layers: Annotated[
        str,
        NamedIn("hfedmoe.method.holding", "LAYERS", "together"),
        Field(
            description="how a budget is spent: on the best experts of all layers `together`, or in `even` shares on "
            "the best of every layer"
        ),
    ] = "together"
    expert_weight: Annotated[
        str,
        NamedIn("hfedmoe.method.usage", "EXPERT_WEIGHTS", "samples"),
        Field(description="w_c(e) of eq. 17"),
    ] = "samples"
    gate: Annotated[
        str,
        NamedIn("hfedmoe.method.hfedmoe", "GATES", "importance"),
        Field(description="rule for the gates, eq. 21"),
    ] = "importance"
    bootstrap: Annotated[
        Literal["forward", "stream", "prior", "none"],
        Field(
            description="source of the first scores: a forward pass over local data (a device that loads only its "
            "experts streams all of them from disk, within its budget); the federation's usage so far; or none (random)"
        ),
    ] = "forward"
    bootstrap_batches: Annotated[int, Field(ge=1, description="batches of that forward pass")] = 2

    @model_validator(mode="after")
    def _options_are_the_methods(self) -> "MethodConfig":
        if self.options:
            from hfedmoe.method.methods import METHODS  # imports torch

            known = {option.name: option for option in METHODS[self.name].options}
            for name, value in self.options.items():
                if name not in known:
                    raise ValueError(f"{self.name} has no option {name}; it has {', '.join(known) or 'none'}")
                if not known[name].low <= value <= known[name].high:
                    raise ValueError(f"{name} = {value:g} must be from {known[name].low:g} to {known[name].high:g}")
        return self


class TrainConfig(Section):
    """What one client does in one round."""

    experts: Annotated[Literal["lora", "full", "frozen"], Field(description="how the experts are trained")] = "lora"
    rank: Annotated[int, Field(ge=1, description="LoRA rank")] = 8
    alpha: Annotated[float, Field(gt=0, description="LoRA scale is alpha / rank")] = 16.0
    lora: Annotated[Literal["factors", "freeze_a", "exact"], Field(description="how LoRA pairs are averaged")] = (
        "factors"
    )
    router: Annotated[bool, Field(description="train the routers (gates)")] = True
    attention: Annotated[bool, Field(description="LoRA on the attention projections, averaged over all clients")] = (
        False
    )
    steps: Annotated[int, Field(ge=1, description="optimizer steps per client and round")] = 2
    batch_size: Annotated[int, Field(ge=1, description="rows per step")] = 8
    lr: Annotated[float, Field(gt=0, description="learning rate of AdamW")] = 2e-3
    lr_final_share: Annotated[
        float, Field(gt=0, le=1, description="lr falls linearly over the rounds to this share of lr; 1: constant")
    ] = 1.0
    weight_decay: Annotated[float, Field(ge=0, description="weight decay of AdamW")] = 0.0
    max_grad_norm: Annotated[
        float | None, Field(gt=0, description="larger gradients are scaled down to this norm; None: they are not")
    ] = 1.0
    loss: Annotated[
        Literal["vocabulary", "choices"],
        Field(description="compare the answer's first token with the whole vocabulary, or with the other choices only"),
    ] = "vocabulary"
    logit_adjustment: Annotated[
        float, Field(ge=0, description="strength of the correction for local label skew (choice tasks); 0: off")
    ] = 0.0
    gradient_checkpointing: Annotated[bool, Field(description="less memory for activations, more time")] = False
