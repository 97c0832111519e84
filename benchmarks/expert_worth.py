"""What an expert is worth to a client, measured and not scored; part of `python -m benchmarks.expert_scores`.

Of one client with rows of its own and held-out rows, and of every expert of a model:

    leave-one-out   rise of the loss on rows when the expert is masked; its tokens are routed to the rest
    gain            drop of the loss on held-out rows after one step of that expert alone, by the client's own gradient
    kept            loss on held-out rows when only some experts are there
    trained         loss on held-out rows after one step of some experts together

Losses are nats per token of the next token. What lies below a changed layer is computed once and kept, because it does
not change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.bases.texts import padded
from hfedmoe.method.running import RunningScore
from hfedmoe.method.scores import Evidence
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks

Layers = list[Tensor]
"""[E] of every layer."""
Scored = Callable[[Evidence], Tensor]
"""Evidence of one batch about one layer -> [E]."""


class Texts:
    """Rows of one client in batches, with what the unchanged model makes of them.

    Args:
        rows: tokens of each text.
        batch: rows per forward pass; those of similar length are together.
    """

    def __init__(self, model: MoEModel, rows: Sequence[Tensor], batch: int = 32) -> None:
        self.model = model
        ordered = sorted(rows, key=len)
        self._batches = [_on(model, ordered[start : start + batch]) for start in range(0, len(ordered), batch)]
        self.tokens = sum(len(row) - 1 for row in rows)
        # A decoder layer holds the block with the experts.
        self._layers: list[nn.Module] = [model.model.get_submodule(one.name.rpartition(".")[0]) for one in model.layers]
        self._kept: list[list[Any]] = []
        self.used = [torch.zeros(number, dtype=torch.bool) for number in model.num_experts]
        """Per layer bool [E]: whether any token is routed to the expert."""
        with _noted(self._layers, self._kept), _routed(model, self.used):
            self.whole = self.loss()
            """The loss of the unchanged model."""

    @torch.no_grad()
    def loss(self, changed: int | None = None) -> float:
        """The mean loss of the model as it is now; nothing changed in layers below `changed` (None: all may have)."""
        total = 0.0
        for place, (tokens, mask) in enumerate(self._batches):
            below = [] if changed is None else self._kept[place][:changed]
            with _replaced(self._layers[: len(below)], below):
                total += float(_losses(self.model, tokens, mask).double().sum())
        return total / self.tokens


def leave_one_out(texts: Texts) -> Layers:
    """The rise of the loss without each expert."""
    model, everyone = texts.model, [torch.ones(number, dtype=torch.bool) for number in texts.model.num_experts]

    def without(layer: int, expert: int) -> Callable[[], None]:
        some = [keep.clone() for keep in everyone]
        some[layer][expert] = False
        model.set_resident(some)
        return lambda: model.set_resident(None)

    return _changes(texts, without)


def gains(texts: Texts, steps: "Steps") -> Layers:
    """The drop of the loss after the step of each expert alone."""
    return [-change for change in _changes(texts, lambda layer, expert: steps.take([(layer, expert)]))]


def _changes(texts: Texts, change: Callable[[int, int], Callable[[], None]]) -> Layers:
    found = [torch.zeros(number, dtype=torch.float64) for number in texts.model.num_experts]
    for layer, used in enumerate(texts.used):
        for expert in used.nonzero()[:, 0].tolist():
            back = change(layer, expert)
            found[layer][expert] = texts.loss(layer) - texts.whole
            back()
    return found


def kept(texts: Texts, resident: list[Tensor]) -> float:
    """The rise of the loss with only the experts of `resident` (bool [E] per layer)."""
    texts.model.set_resident(resident)
    loss = texts.loss()
    texts.model.set_resident(None)
    return loss - texts.whole


def trained(texts: Texts, steps: "Steps", chosen: list[Tensor]) -> float:
    """The drop of the loss after one step of the experts of `chosen` (bool [E] per layer) together."""
    back = steps.take([(layer, e) for layer, keep in enumerate(chosen) for e in keep.nonzero()[:, 0].tolist()])
    loss = texts.loss()
    back()
    return texts.whole - loss


def scores(model: MoEModel, rows: Sequence[Tensor], batch: int, scored: dict[str, Scored]) -> dict[str, Layers]:
    """Scores by name, each the mean over the batches of the client's rows, as `ClientHistory` keeps it.

    The backward passes leave the mean gradient over all batches in the trained tensors.
    """
    running = {name: [RunningScore(number) for number in model.num_experts] for name in scored}
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    for parameter in model.parameters():
        parameter.grad = None
    for own in batches:
        tokens, mask = _on(model, own)
        model.watch(TokenMasks(mask), "activation", "taylor", "ghost")
        (_losses(model, tokens, mask).mean() / len(batches)).backward()
        for layer, routing in enumerate(model.routing):
            assert routing.evidence is not None
            for name, of in scored.items():
                running[name][layer].update(of(routing.evidence).cpu())
    model.watch(None)
    return {name: [one.value() for one in layers] for name, layers in running.items()}


def _on(model: MoEModel, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    tokens, mask = padded(list(rows))
    return tokens.to(model.device), mask.to(model.device)


def _losses(model: MoEModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of every token after the first of its row, [N]."""
    logits = model.model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1][mask[:, 1:]]
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][mask[:, 1:]], reduction="none")


class Steps:
    """One optimizer step of each expert, from the gradients that its trained tensors have now.

    Args:
        lr: of Adam.
        sgd: steps of plain gradient descent in place of Adam's. All experts together move as far as with Adam, but
            those with large gradients further than the others.
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


@contextmanager
def _noted(layers: list[nn.Module], passes: list[list[Any]]) -> Iterator[None]:
    """Note the outputs of all layers, in a list per pass."""

    def note(layer: int, output: Any) -> None:
        if layer == 0:
            passes.append([])
        passes[-1].append(output)

    handles = [
        module.register_forward_hook(lambda module, args, output, layer=layer: note(layer, output))
        for layer, module in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _routed(model: MoEModel, used: list[Tensor]) -> Iterator[None]:
    """Note the experts that anything is routed to, padding included."""
    before = [state.observer for state in model.states]
    for state, own in zip(model.states, used, strict=True):

        def note(index: Tensor, weights: Tensor, own: Tensor = own) -> None:
            own[index[index < len(own)].cpu()] = True

        state.observer = note
    try:
        yield
    finally:
        for state, observer in zip(model.states, before, strict=True):
            state.observer = observer


@contextmanager
def _replaced(layers: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Let layers give these outputs, whatever goes in."""
    for module, output in zip(layers, outputs, strict=True):
        object.__setattr__(module, "forward", lambda *args, output=output, **options: output)
    try:
        yield
    finally:
        for module in layers:
            object.__delattr__(module, "forward")
