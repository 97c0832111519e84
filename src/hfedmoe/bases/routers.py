"""Routers in closed form: ridge regression of a token's branch on the input of each MoE layer.

    R = (X'X / T + c I)^-1      W = R X'Y / T      v = R X'1 / T

X [T, H] are the layer's inputs, and Y [T, E - 1] is 1 for the branch of the token's text. The columns of W are divided
by their lengths over the mean length, so that no branch is preferred for its scale. x v is near 1 for all x, so
subtracting multiples of v from the columns of W moves their logits: each column's mean becomes zero. Expert 0 belongs
to no branch: its row is a multiple of v, the one that makes it one of the K experts for a wanted share of the tokens.
The router's logits are x W over a temperature. Layers are fitted from below, so that the inputs of each are those that
the routed layers before it give.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.bases.stages import batches, cut, fast, only, stacked, through

RIDGE = 0.01


class _Recorder(nn.Module):
    """In place of a feed-forward block: keeps its inputs and adds nothing to the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return torch.zeros_like(hidden)


@torch.no_grad()
def fit_routers(
    model: Any, layers: range, hidden: Sequence[Tensor], owners: Sequence[int], temperature: float, general: float
) -> dict[int, Tensor]:
    """Fit and set the routers of a model's last layers; returns them by layer, [E, H], in bfloat16.

    The model has the rounded numbers too, so that one made from a file of them is the same.

    Args:
        hidden: of each text, the states [S, H] that enter the first of these layers.
        owners: the expert, from 1, that each text belongs to.
        general: the share of tokens that have expert 0 among their K experts.
    """
    states, fitted = list(hidden), {}
    of_tokens = torch.tensor(owners).repeat_interleave(torch.tensor([len(row) for row in states]))
    for number in layers:
        layer = model.model.layers[number]
        block = layer.mlp
        before, inputs = _attended(model, number, states)
        x = torch.cat(inputs).float()
        gate = block.gate.weight
        exact = ridge_router(x, of_tokens.to(x.device), len(gate), block.gate.top_k, temperature, general)
        fitted[number] = exact.bfloat16()
        gate.copy_(fitted[number])
        with fast(x.device):  # all texts at once, so that the experts are converted once
            changes = block(x[None])[0].float().split([len(row) for row in states])
        states = [own + change for own, change in zip(before, changes, strict=True)]
    return fitted


def ridge_router(x: Tensor, owners: Tensor, experts: int, top_k: int, temperature: float, general: float) -> Tensor:
    """Router rows [E, H] of inputs [T, H] and the expert, from 1, of each token [T]."""
    inputs = x.double()
    wanted = nn.functional.one_hot(owners - 1, experts - 1).to(inputs)
    square = inputs.T @ inputs / len(x) + RIDGE * torch.eye(x.shape[1], dtype=inputs.dtype, device=x.device)
    targets = torch.cat([wanted, torch.ones_like(wanted[:, :1])], dim=1)
    solved = torch.linalg.solve(square, inputs.T @ targets / len(x))
    columns, constant = solved[:, :-1], solved[:, -1:]
    lengths = columns.norm(dim=0, keepdim=True)
    columns = columns * (lengths.mean() / lengths)
    mean = inputs.mean(0)
    columns = columns - constant * ((mean @ columns) / (mean @ constant))
    rivals = (inputs @ columns).topk(top_k, dim=1).values[:, -1]  # what expert 0 must exceed
    level = rivals.sort().values[min(len(x) - 1, round(general * len(x)))]
    rows = torch.cat([constant * level, columns], dim=1).T / temperature
    return rows.to(x.dtype)


def _attended(model: Any, number: int, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each text, the states after one layer's attention, and what its feed-forward block is given."""
    layer, recorder = model.model.layers[number], _Recorder()
    block = layer.mlp
    before: list[Tensor] = []
    inputs: list[Tensor] = []
    layer.mlp = recorder
    try:
        with only(model, range(number, number + 1)) as decoder, fast(model.device):
            for texts in batches(states):
                before += cut(through(decoder, inputs_embeds=stacked(texts).to(model.device)), texts)
                inputs += cut(recorder.seen.pop(), texts)
    finally:
        layer.mlp = block
    return before, inputs
