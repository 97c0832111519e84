"""Statistics of a client's experts in a round: usage (eq. 16), importance (eq. 5), tokens, and which were trained."""

import torch
from torch import Tensor

from hfedmoe.method.importance import importance
from hfedmoe.method.running import RunningMean
from hfedmoe.method.usage import ClientUsage
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.layer import LayerRouting


class RoundStatistics:
    """Sums and means over a round's batches, for each layer."""

    def __init__(self, model: MoEModel) -> None:
        numbers, device = model.num_experts, model.device
        self._usage = [ClientUsage(number, device) for number in numbers]
        self._importance = [RunningMean(number, device) for number in numbers]
        self._tokens = [torch.zeros(number, device=device) for number in numbers]
        self._num_experts = numbers
        self._trained: list[list[bool]] = [[] for _ in numbers]

    def add(self, routing: LayerRouting, lam: float) -> None:
        """Add the watched batch's values of one layer."""
        evidence, layer = routing.evidence, routing.layer.index
        assert evidence is not None
        assert routing.tokens is not None
        if len(evidence.g) == 0:  # a batch without a single token
            return
        self._usage[layer].add(evidence.g)
        self._importance[layer].update(importance(evidence.g, lam))
        self._tokens[layer] += routing.tokens

    def note_trained(self, model: MoEModel) -> None:
        """After a backward pass: remember which experts have a gradient. This does not wait for a GPU."""
        for layer, flags in enumerate(model.trained_now()):
            before = self._trained[layer] or [False] * len(flags)
            self._trained[layer] = [a or b for a, b in zip(before, flags, strict=True)]

    def usage(self) -> list[Tensor]:
        """float32 [E] per layer, u_c of eq. 16 over the round's samples."""
        return [mean.value().cpu() for mean in self._usage]

    def importance(self) -> list[Tensor]:
        """float32 [E] per layer, s_c of eq. 5, the mean over the round's batches."""
        return [mean.value().nan_to_num(0.0).cpu() for mean in self._importance]

    def tokens(self) -> list[Tensor]:
        """float32 [E] per layer, tokens that each expert processed."""
        return [tokens.cpu() for tokens in self._tokens]

    def trained(self, model: MoEModel) -> list[Tensor]:
        """bool [E] per layer: the experts that any step trained."""
        found = []
        for state, number, flags in zip(model.states, self._num_experts, self._trained, strict=True):
            trained = torch.zeros(number, dtype=torch.bool)
            if flags:
                trained[state.present.cpu()] = torch.tensor(flags)
            found.append(trained)
        return found
