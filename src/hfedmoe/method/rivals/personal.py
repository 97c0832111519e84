"""A client's own experts beside the federation's: PFL-MoE (arXiv 2012.15589) and FLEx (arXiv 2506.00965).

Decisions. PFL-MoE: the global part and the personal copy are mixed in every MoE layer and trained by one loss in one
pass, where the paper mixes the predictions of two whole models, trained one after the other. FLEx: the grafted expert
is a copy of the one expert per layer that the client's tokens use most, with a LoRA pair of its own; its gate begins
nearly closed. Both keep copy and gate on the client.
"""

from dataclasses import replace

from hfedmoe.method.holding import gate_by_examples, hold_all, over_holders
from hfedmoe.method.rivals.fedavg import FEDAVG
from hfedmoe.method.row import Method

PFL_MOE = replace(
    FEDAVG,
    holds="everything, and a copy of what is trained of the experts; a client without room takes no part",
    trains="everything, the copy, and a gate in every layer that mixes both",
    travels="everything but the copy and its gates, which it keeps",
    source="arXiv 2012.15589",
    private=frozenset(("own",)),
    own="copy",
)
FLEX = Method(
    holds="everything, and in every layer one expert of its own, grafted beside the others; a client without room for "
    "everything takes no part",
    trains="what is no expert, its own experts, and a gate for each of them; the pretrained experts are frozen",
    travels="what is no expert",
    server="mean of what is no expert, weighted by the clients' rows",
    source="arXiv 2506.00965",
    status="secondary",
    hold=hold_all,
    expert_weight=over_holders,
    gate_weight=gate_by_examples,
    score=lambda settings: "frequency",
    private=frozenset(("own",)),
    own="graft",
    frozen_experts=True,
)
