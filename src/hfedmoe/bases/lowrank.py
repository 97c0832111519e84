"""Train one branch: low-rank changes of the feed-forward matrices of a dense model's upper layers.

y = W x + B A x        W [out, in] frozen, A [R, in] random, B [out, R] zero at first (Hu et al., 2022)
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence

from hfedmoe.bases.stages import only, stacked, through
from hfedmoe.errors import UserError
from hfedmoe.moe.branching import KINDS

Deltas = dict[str, Tensor]
"""`{layer}.{kind}.a` [R, in] and `{layer}.{kind}.b` [out, R]."""
IGNORED = -100


class LowRank(nn.Module):
    """A frozen matrix with a change of low rank; the change is kept in float32 and applied in the inputs' type."""

    def __init__(self, frozen: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = [frozen.weight]  # in a list, so that it is no parameter of this module
        out, into = frozen.weight.shape
        a = torch.randn(rank, into, generator=generator) * into**-0.5
        self.a = nn.Parameter(a.to(frozen.weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=frozen.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.frozen[0]) + linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def train_branch(
    model: Any,
    layers: range,
    hidden: Sequence[Tensor],
    rows: Sequence[Tensor],
    rank: int,
    batch: int,
    scored: int,
    steps: int,
    lr: float,
    seed: int,
    report: Callable[[int, float], None],
) -> Deltas:
    """Learn the next tokens of texts with AdamW; the model is the same afterwards.

    Args:
        layers: the model's last layers, whose feed-forward blocks change.
        hidden: of each text, the states [S, H] that enter the first of them; rows: its tokens [S].
        batch: texts in a step; every pass through all texts has an order of its own.
        scored: tokens of a step, drawn at random, whose loss is computed: the head costs as much as all the layers.
        report: called after each step with (steps done, loss).

    Raises:
        UserError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = {layer: model.model.layers[layer].mlp for layer in layers}
    frozen = {(layer, kind): getattr(blocks[layer], f"{kind}_proj") for layer in layers for kind in KINDS}
    changes = {place: LowRank(matrix, rank, generator) for place, matrix in frozen.items()}
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    model.requires_grad_(False)
    try:
        for (layer, kind), change in changes.items():
            setattr(blocks[layer], f"{kind}_proj", change)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, steps)
            taken = _batch(step, len(rows), batch, seed)
            loss = _loss(model, layers, [hidden[i] for i in taken], [rows[i] for i in taken], scored, generator)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} in step {step + 1}; choose a smaller learning rate")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report(step + 1, value)
    finally:
        for (layer, kind), matrix in frozen.items():
            setattr(blocks[layer], f"{kind}_proj", matrix)
    return {
        f"{layer}.{kind}.{name}": tensor.detach().cpu()
        for (layer, kind), change in changes.items()
        for name, tensor in (("a", change.a), ("b", change.b))
    }


def _loss(
    model: Any, layers: range, hidden: Sequence[Tensor], rows: Sequence[Tensor], scored: int, generator: torch.Generator
) -> Tensor:
    """Nats per token, the mean over at most `scored` of the batch's tokens."""
    weight = model.lm_head.weight
    wanted = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    real = (wanted != IGNORED).nonzero()
    text, place = real[torch.randperm(len(real), generator=generator)[:scored]].unbind(1)
    with only(model, layers, norm=True) as decoder:
        last = through(decoder, inputs_embeds=stacked(hidden).to(weight))
    return cross_entropy(linear(last[text, place], weight).float(), wanted[text, place].to(weight.device))


def _schedule(step: int, steps: int) -> float:
    """Five steps of linear warm-up, then linearly down to a tenth."""
    return min(1.0, (step + 1) / 5) * (1 - 0.9 * step / max(1, steps))


def _batch(step: int, number: int, size: int, seed: int) -> list[int]:
    """Which texts a step takes, from the seed and the step alone."""
    epoch, place = divmod(step, max(1, number // size))
    order = list(range(number))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * size : (place + 1) * size]
