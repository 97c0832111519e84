"""Sparsity-aware aggregation (equations 16-21), in one place to import from.

    usage.py      u_c(e), the threshold tau and the expert weights w_c(e)      16, 17
    gates.py      weights of the clients' gates (router rows)                  18-21
    averaging.py  streaming averages of rows and of whole tensors              17, 21
    products.py   the same for LoRA pairs, exact in the product B A

The server folds in one client at a time and keeps nothing of it (`ProductAverage` keeps factors). A round reads:

    experts = RowAverage(E)
    for every reply:    experts.add(rows, index, expert_weights(...)[index])
    at the end:         new = experts.result(previous)

Everything else that is trained (attention LoRA, norms, heads) is a `MeanAverage` with weights |D_c|.
"""

from hfedmoe.method.averaging import MeanAverage, RowAverage, StacksAverage
from hfedmoe.method.gates import (
    gate_alpha_numerator,
    gate_row_weights,
    gate_weights,
    raw_gate_alpha,
    routing_consistency,
)
from hfedmoe.method.products import ProductAverage
from hfedmoe.method.usage import EXPERT_RULES, expert_weights, passes, usage

__all__ = [
    "EXPERT_RULES",
    "MeanAverage",
    "ProductAverage",
    "RowAverage",
    "StacksAverage",
    "expert_weights",
    "gate_alpha_numerator",
    "gate_row_weights",
    "gate_weights",
    "passes",
    "raw_gate_alpha",
    "routing_consistency",
    "usage",
]
