"""What an expert is worth to a client, measured and not scored; part of `python -m benchmarks.expert_scores`.

Of one client with rows of its own and held-out rows, and of every expert of a model:

    leave-one-out   rise of the loss on rows when the expert is masked; its tokens are routed to the rest
    gain            drop of the loss on held-out rows after one step of that expert alone, by the client's own gradient
    kept            loss on held-out rows when only some experts are there
    trained         loss on held-out rows after one step of some experts together

Losses are nats per token of the next token. Only rows that the router sends to an expert can change with it, so only
these are computed again: that is exact, because tokens of different rows do not meet.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hfedmoe.bases.texts import padded
from hfedmoe.method.running import RunningScore
from hfedmoe.method.scores import Evidence
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks

Layers = list[Tensor]
"""[E] of every layer."""
Scored = Callable[[Evidence], Tensor]
"""Evidence of one batch about one layer -> [E]."""


class Worth:
    """Measures one model, wrapped with trainable experts that still are what they were (LoRA with B = 0).

    Args:
        batch: rows per forward pass.
    """

    def __init__(self, model: MoEModel, batch: int = 32) -> None:
        self.model, self.batch = model, batch
        model.model.eval()

    @torch.no_grad()
    def losses(self, rows: Sequence[Tensor]) -> Tensor:
        """Float64 [N]: the sum of the losses of every row's tokens after the first."""
        found = torch.zeros(len(rows), dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            tokens, mask = self._padded([rows[place] for place in places])
            self.model.count(TokenMasks(mask))
            found[places] = self._by_row(tokens, mask).double().cpu()
        self.model.count(None)
        return found

    def hits(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Bool [N, E] per layer: whether any token of the row is routed to the expert."""
        seen: list[list[Tensor]] = [[] for _ in self.model.states]
        with _indices(self.model, seen), torch.no_grad():
            for row in rows:
                tokens, mask = self._padded([row])
                self.model.model(input_ids=tokens, attention_mask=mask.long())
        numbers = self.model.num_experts
        return [
            torch.stack([torch.zeros(number, dtype=torch.bool).index_fill_(0, own.unique().cpu(), True) for own in layer])
            for layer, number in zip(seen, numbers, strict=True)
        ]

    def leave_one_out(self, rows: Sequence[Tensor]) -> Layers:
        """The rise of the mean loss of `rows` without each expert."""
        everyone = [torch.ones(number, dtype=torch.bool) for number in self.model.num_experts]

        def without(layer: int, expert: int) -> Callable[[], None]:
            everyone[layer][expert] = False
            self.model.set_resident(everyone)

            def back() -> None:
                everyone[layer][expert] = True
                self.model.set_resident(None)

            return back

        return self._changes(rows, without)

    def gains(self, rows: Sequence[Tensor], steps: "Steps") -> Layers:
        """The drop of the mean loss of `rows` after the step of each expert alone."""
        return [-change for change in self._changes(rows, lambda layer, expert: steps.take([(layer, expert)]))]

    def _changes(self, rows: Sequence[Tensor], change: Callable[[int, int], Callable[[], None]]) -> Layers:
        before, hits, tokens = self.losses(rows), self.hits(rows), _tokens(rows)
        found = [torch.zeros(number, dtype=torch.float64) for number in self.model.num_experts]
        for layer, hit in enumerate(hits):
            for expert in hit.any(0).nonzero()[:, 0].tolist():
                changed = hit[:, expert].nonzero()[:, 0].tolist()
                back = change(layer, expert)
                after = self.losses([rows[place] for place in changed])
                back()
                found[layer][expert] = (after - before[changed]).sum() / tokens
        return found

    def mean_loss(self, rows: Sequence[Tensor]) -> float:
        """Nats per token."""
        return float(self.losses(rows).sum() / _tokens(rows))

    def kept(self, rows: Sequence[Tensor], resident: list[Tensor]) -> float:
        """Nats per token with only the experts of `resident` (bool [E] per layer)."""
        self.model.set_resident(resident)
        loss = self.mean_loss(rows)
        self.model.set_resident(None)
        return loss

    def trained(self, rows: Sequence[Tensor], steps: "Steps", chosen: list[Tensor]) -> float:
        """Nats per token after one step of the experts of `chosen` (bool [E] per layer) together."""
        places = [(layer, expert) for layer, keep in enumerate(chosen) for expert in keep.nonzero()[:, 0].tolist()]
        back = steps.take(places)
        loss = self.mean_loss(rows)
        back()
        return loss

    def scores(self, rows: Sequence[Tensor], batch: int, scored: dict[str, Scored]) -> dict[str, Layers]:
        """Scores by name, each the mean over the batches of the client's rows, as `ClientHistory` keeps it.

        The backward passes leave the mean gradient over all batches in the trained tensors.
        """
        numbers = self.model.num_experts
        running = {name: [RunningScore(number) for number in numbers] for name in scored}
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        for parameter in self.model.parameters():
            parameter.grad = None
        for own in batches:
            tokens, mask = self._padded(own)
            self.model.watch(TokenMasks(mask), "activation", "taylor", "ghost")
            loss = self._by_row(tokens, mask).sum() / _tokens(own)
            (loss / len(batches)).backward()
            for layer, routing in enumerate(self.model.routing):
                assert routing.evidence is not None
                for name, of in scored.items():
                    running[name][layer].update(of(routing.evidence).cpu())
        self.model.watch(None)
        return {name: [one.value() for one in layers] for name, layers in running.items()}

    def _padded(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        tokens, mask = padded(list(rows))
        return tokens.to(self.model.device), mask.to(self.model.device)

    def _by_row(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.model.model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1].float()
        wanted = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1)


class Steps:
    """One optimizer step of each expert, from the gradients that its trained tensors have now.

    Args:
        lr: of Adam.
        sgd: steps of plain gradient descent in place of Adam's. All experts together move as far as with Adam, but those
            with large gradients further than the others.
    """

    def __init__(self, model: MoEModel, lr: float, sgd: bool = False) -> None:
        self._leaves: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for layer, state in enumerate(model.states):
            assert state.trained is not None
            for expert in range(state.trained.num_experts):
                own = [state.trained.leaves[name][expert] for name in state.trained.travelling]
                self._leaves[layer, expert] = [(leaf, leaf.grad.clone()) for leaf in own if leaf.grad is not None]
        adam = {place: [(leaf, g / (g.abs() + 1e-8)) for leaf, g in own] for place, own in self._leaves.items()}
        if not sgd:
            self._leaves, self.lr = adam, lr
        else:
            self.lr = lr * float(_length(adam) / _length(self._leaves))

    @torch.no_grad()
    def take(self, places: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """Take the steps of some (layer, expert); returns what undoes them, bit for bit."""
        moved = [(leaf, leaf.clone(), g) for place in places for leaf, g in self._leaves[place]]
        for leaf, _, g in moved:
            leaf.sub_(self.lr * g)

        def back() -> None:
            with torch.no_grad():
                for leaf, before, _ in moved:
                    leaf.copy_(before)

        return back


def _length(leaves: dict[tuple[int, int], list[tuple[Tensor, Tensor]]]) -> Tensor:
    return torch.stack([g.norm() for own in leaves.values() for _, g in own]).norm()


def _tokens(rows: Sequence[Tensor]) -> int:
    return sum(len(row) - 1 for row in rows)


@contextmanager
def _indices(model: MoEModel, seen: list[list[Tensor]]) -> Iterator[None]:
    """Note the experts [T, K] of every pass, layer by layer."""
    before = [state.observer for state in model.states]
    for state, own in zip(model.states, seen, strict=True):

        def noted(index: Tensor, weights: Tensor, own: Any = own, number: int = state.layer.num_experts) -> None:
            own.append(index[index < number])

        state.observer = noted
    try:
        yield
    finally:
        for state, observer in zip(model.states, before, strict=True):
            state.observer = observer
