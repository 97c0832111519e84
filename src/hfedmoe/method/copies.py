"""What a server knows about a client's copies of the experts when it computes their weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """One client's copies of the experts of a layer, or of several layers with equally many experts.

    Raises:
        ValueError: a negative number of examples, or vectors of different shapes.
    """

    examples: int
    """|D_c|, the client's own rows."""
    usage: Tensor
    """[..., E], u_c of eq. 16."""
    importance: Tensor
    """[..., E], s_c of eq. 5, the mean over the round's batches."""
    tokens: Tensor
    """[..., E], tokens of the client that each expert processed."""
    held: Tensor
    """bool [..., E], the experts on the device in this round."""
    trained: Tensor
    """bool [..., E], those with at least one optimizer step."""
    federation: Tensor | None = None
    """[..., E], the federation's usage in the rounds before; None: in the first, or where the method needs it not."""
    size: Tensor | None = None
    """[..., E], Frobenius norm of the expert's LoRA products B A as received (the root of the sum of the squares of its
    pairs), 0 where it was not sent; None: where the method needs it not."""

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ValueError(f"examples={self.examples} must not be negative")
        shapes = {tuple(getattr(self, name).shape) for name in VECTORS}
        shapes |= {tuple(given.shape) for name in OPTIONAL if (given := getattr(self, name)) is not None}
        if len(shapes) > 1:
            raise ValueError(f"{', '.join(VECTORS)} must all be [..., E], got {sorted(shapes)}")


OPTIONAL = ("federation", "size")
VECTORS = tuple(field.name for field in fields(Copies) if field.name not in ("examples", *OPTIONAL))


def over_layers(rule: Callable[[Copies], Tensor], layers: Sequence[Copies]) -> list[Tensor]:
    """`rule` of each layer's copies [E]: one call for all layers if they have equally many experts.

    Args:
        rule: takes copies of [..., E].
        layers: of one client, at least one.
    """
    if len({copies.usage.shape for copies in layers}) > 1:
        return [rule(copies) for copies in layers]
    stacked = {name: torch.stack([getattr(copies, name) for copies in layers]) for name in VECTORS}
    for name in OPTIONAL:
        given = [value for copies in layers if (value := getattr(copies, name)) is not None]
        if given:
            stacked[name] = torch.stack(given)
    return list(rule(Copies(layers[0].examples, **stacked)).unbind(0))
