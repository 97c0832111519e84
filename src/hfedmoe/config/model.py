"""Sections `model` and `model.upcycle`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfedmoe.config.section import Section


class UpcycleConfig(Section):
    """Turn a dense model into a MoE before training: every feed-forward block is copied into experts."""

    experts: Annotated[int, Field(ge=2, description="experts per layer")] = 8
    top_k: Annotated[int, Field(ge=1, description="experts per token")] = 2
    router_std: Annotated[float, Field(gt=0, description="standard deviation of the fresh router rows")] = 0.02

    @model_validator(mode="after")
    def _top_k_fits(self) -> "UpcycleConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        return self


class ModelConfig(Section):
    """Which model, and in what precision."""

    name: Annotated[
        str, Field(description="`smollm2-domains`, `smollm2` or `tiny` (packaged), a hub id, or a local folder")
    ] = "smollm2-domains"
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model")] = None
    upcycle: UpcycleConfig | None = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Field(description="precision of the frozen weights in memory")
    ] = "float32"
    compute: Annotated[
        Literal["auto", "float32", "same"],
        Field(
            description="precision of the arithmetic with 16-bit weights: float32, the same as `dtype`, or auto: "
            "float32 with float16 weights or on processors without 16-bit products, else the same"
        ),
    ] = "auto"
    expert_dtype: Annotated[
        Literal["same", "float32", "bfloat16", "float16", "8bit", "4bit"],
        Field(
            description="how frozen experts are stored: as `dtype`, or smaller; 8bit and 4bit (NF4) need bitsandbytes"
        ),
    ] = "same"
    device: Annotated[str, Field(description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="run code shipped with the checkpoint")] = False

    @model_validator(mode="after")
    def _gradients_have_room(self) -> "ModelConfig":
        if self.dtype == "float16" and self.compute == "same":
            raise ValueError('compute="same": gradients vanish in float16; use compute="float32", or dtype="bfloat16"')
        return self
