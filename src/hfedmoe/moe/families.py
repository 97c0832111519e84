"""Families that need special code, and families that are refused: what a model's structure does not tell.

All other families are read by their structure alone (see `anatomy` and `layouts`). Tested families are those with a
tiny model in tests/families/table.py; docs/models.md lists tested and refused families.
"""

from dataclasses import dataclass
from typing import Literal

Dispatch = Literal["one_hot", "weights_on_input", "identity"]
"""How a block calls its experts, if not by experts(hidden, top_k_index, top_k_weights); see `dispatch`."""


@dataclass(frozen=True)
class Build:
    """How stacked experts without transformers' experts interface are built."""

    dispatch: Dispatch
    transposed: bool = False
    """Matrices are stored [in, out]."""


WITHOUT_INTERFACE = {
    # The router's scores multiply the input of the experts, and the stock block runs every expert on every token.
    "Llama4TextExperts": Build(dispatch="weights_on_input", transposed=True),
    # Indices from E on are experts that return their input; the up projection has (unused) rows for them.
    "LongcatFlashExperts": Build(dispatch="identity"),
}
"""Builds by the class name of the experts."""


def _text_only(text_type: str) -> str:
    return f"takes more than text; use a checkpoint of its text model alone, of type {text_type}"


_NO_CLASS = "takes more than text, and transformers has no causal language model class for its text model"
_NO_TEXT_CLASS = "transformers has no causal language model class for this text model, it is a part of another model"
_NO_LANGUAGE_MODEL = "is no causal language model"

UNSUPPORTED = {
    "aria": _text_only("aria_text"),
    "dbrx": "experts are flat matrices w1, v1, w2 of all experts together, which cannot be read or trained one by one",
    "deepseek_ocr2": _NO_CLASS,
    "deepseek_ocr2_text": _NO_TEXT_CLASS,
    "diffusion_gemma": "writes blocks of text by diffusion, not one token after another",
    "diffusion_gemma_text": "writes blocks of text by diffusion, not one token after another",
    "doge": "experts are single embedding rows behind product keys, too small to be placed on devices one by one",
    "dots3_note_vision_encoder": f"encodes images and {_NO_LANGUAGE_MODEL}",
    "ernie4_5_vl_moe": _NO_CLASS,
    "ernie4_5_vl_moe_text": _NO_TEXT_CLASS,
    "glm4v_moe": _NO_CLASS,
    "glm4v_moe_text": _NO_TEXT_CLASS,
    "glm5_next": _NO_CLASS,
    "glm5_next_text": _NO_TEXT_CLASS,
    "inkling2": _text_only("inkling2_text"),
    "inkling_mm_model": _text_only("inkling_text"),
    "jetmoe": "its attention is a mixture of experts too, and experts run on sorted tokens without routed indices",
    "minimax_m3_vl": _text_only("minimax_m3_vl_text"),
    "mistral4": "AutoModelForCausalLM of the installed transformers does not know it, so no export could be loaded",
    "mistral_large4": _NO_CLASS,
    "mistral_large4_text": _NO_TEXT_CLASS,
    "muse_spark": _NO_CLASS,
    "muse_spark_text": _NO_TEXT_CLASS,
    "nllb-moe": "the forward of the installed transformers runs experts 0 and 1 only, whatever the router chooses",
    "openai_privacy_filter": f"labels tokens and {_NO_LANGUAGE_MODEL}",
    "qwen3_omni_moe": _NO_CLASS,
    "qwen3_omni_moe_talker_text": _NO_TEXT_CLASS,
    "qwen3_omni_moe_text": _NO_TEXT_CLASS,
    "qwen3_omni_moe_thinker": _NO_CLASS,
    "qwen3_vl_moe": _NO_CLASS,
    "qwen3_vl_moe_text": _NO_TEXT_CLASS,
    "step3p5": _NO_TEXT_CLASS,
    "step3p7": _NO_CLASS,
    "unlimited_ocr": _NO_CLASS,
    "unlimited_ocr_text": _NO_TEXT_CLASS,
    "vitpose_backbone": f"finds poses in images and {_NO_LANGUAGE_MODEL}",
    "zaya": "routers hand states from layer to layer and may choose to skip the experts",
}
"""Reason by model type; the error names both."""

DENSE = ("llama", "mistral")
"""Dense families with Mixtral's blocks: RMS norm, rotary attention without biases, SwiGLU feed-forward."""


def why_dense(family: str) -> str:
    """Why a model without MoE layers is refused, and the way out."""
    if family in DENSE:
        way = "set model.upcycle = { experts = 8, top_k = 2 }, or another model.name, such as smollm2-domains"
    else:
        way = f"name a MoE model, or set model.upcycle for a dense model of the families {', '.join(DENSE)}"
    return f"{family} has no Mixture-of-Experts layers; {way}"
