"""HFedMoE, the method of the paper (docs/method.md), with the rules that its settings choose from."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.gates import gate_mass, gate_row_weights
from hfedmoe.method.holding import gate_by_examples, hold_best
from hfedmoe.method.row import Method, Settings
from hfedmoe.method.selection import activation
from hfedmoe.method.usage import expert_weights, kept_weights


@dataclass(frozen=True)
class GateRule:
    """One rule for the gates of `hfedmoe`."""

    weight: Callable[[Copies, Settings], Tensor]
    """(copies, settings) -> float32 [...]."""
    rows: Callable[[Copies, Settings], Tensor] | None = None
    """(copies, settings) -> float32 [..., E]; None: the whole gate counts the same."""
    printed: bool = False
    """Whether weights stay as printed in the paper, without being made to sum to 1."""


def _mass(copies: Copies, settings: Settings) -> Tensor:
    return gate_mass(copies, settings.tau)


GATES: dict[str, GateRule] = {
    "importance": GateRule(_mass),
    "rows": GateRule(_mass, lambda copies, settings: gate_row_weights(copies, settings.tau)),
    "fedavg": GateRule(gate_by_examples),
    "printed": GateRule(_mass, printed=True),
}
"""The rules for gates by name (eq. 21 and its alternatives)."""


def _rule_for_experts(copies: Copies, settings: Settings) -> Tensor:
    return expert_weights(settings.expert_weight, copies, settings.tau)


def _rule_for_rows(copies: Copies, settings: Settings) -> Tensor | None:
    rows = GATES[settings.gate].rows
    return None if rows is None else rows(copies, settings)


HFEDMOE = Method(
    holds="the experts that are worth most to it, within its budget",
    trains="those that its data reach, within its activation budget",
    travels="what it trained",
    server="mean over those that trained and used the expert; gates by importance",
    source="arXiv 2601.00583",
    status="full text",
    hold=hold_best,
    train=activation,
    score=lambda settings: settings.score,
    expert_weight=_rule_for_experts,
    kept_weight=lambda copies, settings: kept_weights(settings.expert_weight, copies),
    gate_weight=lambda copies, settings: GATES[settings.gate].weight(copies, settings),
    gate_as_printed=lambda settings: GATES[settings.gate].printed,
    gate_rows=_rule_for_rows,
)
