"""Updates that began with an earlier model than the one that they change.

Decision: the change that a client made is what counts, scaled by (1 + s)^-a for an update that comes s rounds late, as
in FedBuff (Nguyen et al. 2022) and FedAsync (Xie et al. 2019). It is put on the model of now, and then the update is
averaged like any other: so a change that nobody else made counts less too, which a smaller weight in a mean would not
do.
"""

from collections.abc import Mapping

from torch import Tensor

from hfedmoe.method.row import Kind
from hfedmoe.moe.payload import pack, public
from hfedmoe.moe.ranks import cut
from hfedmoe.wire.messages import Update


def discount(rounds: int, exponent: float) -> float:
    """What a change counts that comes so many rounds late: (1 + s)^-a."""
    return float((1 + rounds) ** -exponent)


def on_the_model_of_now(
    update: Update,
    then: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    factor: float,
    rank: int | None = None,
    private: frozenset[Kind] = frozenset(),
) -> dict[str, Tensor]:
    """The update's tensors as if it had begun with the model of now: now + factor (update - then).

    Args:
        then, now: global tensors, experts as [E, ...].
        rank: of the LoRA pairs of this client's experts; None: that of the global tensors.
        private: kinds of tensors that clients do not send.
    """

    def rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return pack(cut(public(dict(tensors), private), rank), update.sent)

    before, after = rows(then), rows(now)
    return {name: after[name] + factor * (tensor - before[name]) for name, tensor in update.tensors.items()}
