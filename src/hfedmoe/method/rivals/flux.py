"""Flux (arXiv 2508.19078), its choice of experts: a growing share of the budget exploits, the rest explores.

A client holds and trains the experts of the highest utility, tokens times root mean square of the gradient, and others
that are drawn at random, so that it also learns what they are worth.

Missing: the paper merges the experts that a client does not tune into a few for each layer, and profiles them in 4 bit.
Here, as for every method, tokens go to the best of the experts that the client holds.

Decision: the share grows linearly over the rounds. A token's gradient is that of the expert's down projection (score
`utility`), which needs no other pass. Utilities of different layers are made comparable.
"""

from hfedmoe.method.holding import gate_by_examples, hold_best_and_random, over_trainers
from hfedmoe.method.row import Method, Option, Outlook, Residents, Settings

FIRST = Option("exploit_first", 0.5, "share of the budget for experts of highest utility in the first round", high=1)
LAST = Option("exploit_last", 0.9, "the same in the last round", high=1)


def explore(outlook: Outlook, settings: Settings) -> Residents:
    """The experts of the highest utility, and others at random."""
    first, last = FIRST.of(settings), LAST.of(settings)
    return hold_best_and_random(outlook, first + (last - first) * outlook.progress)


FLUX = Method(
    holds="the experts of the highest utility for a growing share of its budget, and others at random",
    trains="what its tokens are routed to among them",
    travels="what it trained",
    server="mean over those that trained the expert, weighted by the clients' rows",
    source="arXiv 2508.19078",
    status="secondary",
    hold=explore,
    score=lambda settings: "utility",
    expert_weight=over_trainers,
    gate_weight=gate_by_examples,
    options=(FIRST, LAST),
)
