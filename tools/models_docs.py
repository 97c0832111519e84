"""Write docs/models.md from the tiny models of tests/families/table.py and the refusals of `hfedmoe.moe.families`.

    python tools/models_docs.py [--check]

With `--check` nothing is written, and the exit code is 1 if the file is not up to date.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from tests.families.table import FAMILIES, build, inputs  # noqa: E402

from hfedmoe.moe.families import UNSUPPORTED  # noqa: E402
from hfedmoe.moe.model import MoEModel  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
HEAD = """# Models

<!-- Written by tools/models_docs.py from tests/families/table.py and src/hfedmoe/moe/families.py: change it there. -->

Any Mixture-of-Experts model that transformers loads for causal or sequence-to-sequence language modelling can be used
if its layers are built like those of the families below. `hfedmoe inspect MODEL` shows what is found in one.

Each of these {number} families is tested on a tiny random model, against the stock model: outputs; gradients of experts
(LoRA and full training), routers and embeddings; the same outputs, gradients and no stray training with absent experts
masked or gone from memory; statistics of the unmasked router; recomputed activations and bfloat16; and weights merged,
saved in the layout of the hub, loaded by stock transformers and read back one expert at a time.

LoRA on the attention (`train.attention`) is PEFT's; a test puts it on every family. `afmoe`, `beam` and `nemotron_h`
are refused: PEFT takes their attention's maps for parts of fused experts, or none is called an attention.

*Router*: how logits become scores, whether the choice is limited to groups of experts, and whether a correction bias
shifts it. *Experts*: one stack of matrices for all, `[E, out, in]` or transposed `[E, in, out]`, or a module for each.
"""
REFUSED = """
## Not supported

A model of these families is refused by name with this reason. Vision-language and audio families are used by their text
model only, where transformers has a model type for that.

| model type | what is missing |
|---|---|
"""
_MOE_CLASS = re.compile(r"(Experts?|MoE|MOE|Moe|SparseMLP|SparseMoe\w*|TopK\w*Router|TopKGating)$")


def moe_families() -> list[str]:
    """Model types of the installed transformers whose text model has experts, found by the classes it is made of."""
    types: dict[str, list[str]] = {}
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if not class_name.endswith("ForConditionalGeneration"):  # needs an image or audio configuration
            types.setdefault(class_name, []).append(model_type)
    for model_type, class_name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        types.setdefault(class_name, []).append(model_type)
    # Where a vision-language type shares the class of its text model, the text model's own type is the longer one.
    return sorted(max(names, key=len) for class_name, names in types.items() if _has_experts(class_name, names[0]))


def _has_experts(class_name: str, model_type: str) -> bool:
    package = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    assert package.__file__ is not None
    for file in Path(package.__file__).parent.glob("modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if f"class {class_name}(" in text:
            return any(_MOE_CLASS.search(name) for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE))
    return False


def page() -> str:
    """The whole page."""
    lines = ["| model type | class | router | experts | shared experts |", "|---|---|---|---|---|"]
    lines += [_row(family) for family in sorted(FAMILIES)]
    refused = [f"| `{family}` | {reason} |" for family, reason in sorted(UNSUPPORTED.items())]
    return HEAD.format(number=len(FAMILIES)) + "\n" + "\n".join(lines) + "\n" + REFUSED + "\n".join(refused) + "\n"


def _row(family: str) -> str:
    model = MoEModel(build(family), experts="frozen")
    with torch.no_grad():
        model.model(**inputs(model.model))
    routing, state = model.routing[0], model.states[0]
    layer = state.layer
    scoring = [routing.scoring]
    if any(one.fixed_routing for one in model.layers):
        scoring.append("some layers by token")
    if getattr(layer.router, "num_group", None):
        scoring.append("groups")
    if layer.correction_biases():
        scoring.append("correction bias")
    around = model.model.get_submodule(layer.name.rpartition(".")[0])
    names = [name for module in (layer.block, around) for name, _ in module.named_children()]
    # Where the block is the whole decoder layer, its dense network is what all tokens share.
    shared = any("shared" in name for name in names) or hasattr(layer.block, "mlp")
    cells = [f"`{family}`", f"`{type(model.model).__name__}`", ", ".join(scoring), _experts(state)]
    return "| " + " | ".join([*cells, "yes" if shared else ""]) + " |"


def _experts(state: Any) -> str:
    if not state.layout.stacked:
        return "a module each"
    words = ["transposed stack" if state.math().transposed else "stack"]
    if "up_bias" in state.tensors():
        words.append("biases")
    if not getattr(state.layer.experts, "has_gate", True):
        words.append("no gate")
    special = {"weights_on_input": "weights on the input", "identity": "identity experts"}
    return ", ".join(words + [special[way] for way in (state.layout.dispatch,) if way in special])


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(
            0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text else f"{TARGET} is not up to date"
        )
    TARGET.write_text(text, encoding="utf-8")
