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

from benchmarks.expert_steps import Steps
from hfedmoe.bases.texts import padded
from hfedmoe.moe.model import MoEModel

Layers = list[Tensor]
"""[E] of every layer."""


class Texts:
    """Rows of one client in batches, with what the unchanged model makes of them.

    Args:
        rows: tokens of each text.
        batch: rows per forward pass; those of similar length are together.
    """

    def __init__(self, model: MoEModel, rows: Sequence[Tensor], batch: int = 32) -> None:
        self.model = model
        ordered = sorted(rows, key=len)
        self._batches = [on_device(model, ordered[start : start + batch]) for start in range(0, len(ordered), batch)]
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
                total += float(losses(self.model, tokens, mask).double().sum())
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


def gains(texts: Texts, steps: Steps) -> Layers:
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


def trained(texts: Texts, steps: Steps, chosen: list[Tensor]) -> float:
    """The drop of the loss after one step of the experts of `chosen` (bool [E] per layer) together."""
    back = steps.take([(layer, e) for layer, keep in enumerate(chosen) for e in keep.nonzero()[:, 0].tolist()])
    loss = texts.loss()
    back()
    return texts.whole - loss


def on_device(model: MoEModel, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, S] of rows, where the model is."""
    tokens, mask = padded(list(rows))
    return tokens.to(model.device), mask.to(model.device)


def losses(model: MoEModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of every token after the first of its row, [N]."""
    logits = model.model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1][mask[:, 1:]]
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][mask[:, 1:]], reduction="none")


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
