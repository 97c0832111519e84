"""The settings of a client's training step that its memory and time depend on."""

from dataclasses import dataclass
from typing import Any

import torch

from hfedmoe.config import RunConfig
from hfedmoe.data.known import known_set
from hfedmoe.method.methods import METHODS
from hfedmoe.method.scores import SCORES


@dataclass(frozen=True)
class Workload:
    """A training step. Defaults are those of the configuration."""

    batch_size: int = 8
    length: int = 64
    """Tokens of the prompt, padded."""
    answer_tokens: int = 1
    """Tokens that are predicted, `A`."""
    steps: int = 2
    experts: str = "lora"
    rank: int = 8
    freeze_a: bool = False
    router: bool = True
    attention: bool = False
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    compute_float32: bool = False
    """Weights of 16 bit are cast to float32 for the arithmetic."""
    expert_dtype: str = "same"
    device: str = "cpu"
    """Device type."""
    measures_activation: bool = False
    """The score needs the norm of every expert's output."""

    @classmethod
    def of(cls, config: RunConfig, device: str = "cpu") -> "Workload":
        """The step of a configuration, with prompts of the maximum length.

        Answers are one token in classification, and also if the format is not known. Completions and choices may be as
        long as the prompt.

        Args:
            device: device type if the configuration says "auto".
        """
        from hfedmoe.moe.compact import wants_float32

        train, model = config.train, config.model
        score = METHODS[config.method.name].score(config.method)
        device = model.device.partition(":")[0] if model.device != "auto" else device
        compute = wants_float32(model.compute, torch.device(device), getattr(torch, model.dtype))
        named = known_set(config.data)
        long = (config.data.format if named is None else named.kind) in ("choices", "completion")
        return cls(
            batch_size=train.batch_size,
            length=config.data.max_tokens,
            answer_tokens=config.data.max_tokens if long else 1,
            steps=train.steps,
            experts=METHODS[config.method.name].trained_experts(train.experts),
            rank=train.rank,
            freeze_a=train.lora == "freeze_a",
            router=train.router,
            attention=train.attention,
            gradient_checkpointing=train.gradient_checkpointing,
            dtype=model.dtype,
            compute_float32=compute and model.dtype != "float32",
            expert_dtype=model.expert_dtype,
            device=device,
            measures_activation=score is not None and SCORES[score].needs == "activation",
        )

    @classmethod
    def on(cls, device: str, config: RunConfig) -> "Workload":
        """The configured step on a device of this type, not on the configured device."""
        model = config.model.model_copy(update={"device": device})
        return cls.of(config.model_copy(update={"model": model}))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision of the frozen weights."""
        dtype: Any = getattr(torch, self.dtype)
        return dtype
