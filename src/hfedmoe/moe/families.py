"""What cannot be told from a model's structure: families that differ from the rest, and families that are refused.

A family that is not named here is read by its structure alone (see `anatomy` and `layouts`). The families that are
tested are those with a tiny model in tests/families/table.py; docs/models.md lists both.
"""

from dataclasses import dataclass
from typing import Literal

Dispatch = Literal["one_hot", "weights_on_input", "identity"]
"""How a block hands tokens to its experts if not by experts(hidden, top_k_index, top_k_weights); see `dispatch`."""


@dataclass(frozen=True)
class Build:
    """How stacked experts are built that do not say so through transformers' experts interface."""

    dispatch: Dispatch
    transposed: bool = False
    """Matrices are stored [in, out]."""


WITHOUT_INTERFACE = {
    # The router's scores multiply the input of the experts, and the stock block runs every expert on every token.
    "Llama4TextExperts": Build(dispatch="weights_on_input", transposed=True),
    # Indices from E on are experts that return their input; the up projection has (unused) rows for them.
    "LongcatFlashExperts": Build(dispatch="identity"),
}
"""By class name of the experts."""

UNSUPPORTED = {
    "dbrx": "experts are flat matrices w1, v1, w2 of all experts together, which cannot be read or trained one by one",
    "doge": "experts are single embedding rows behind product keys, too small to be placed on devices one by one",
    "jetmoe": "its attention is a mixture of experts too, and experts run on sorted tokens without routed indices",
    "nllb-moe": "the forward of the installed transformers runs experts 0 and 1 only, whatever the router chooses",
    "zaya": "routers hand states from layer to layer and may choose to skip the experts",
}
"""Reason by model type; the error says both."""
