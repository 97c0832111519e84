"""Which client held and trained which expert, for each method, as one figure."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from hfedmoe.compare.cells import Result

KINDS = ("held", "trained")


def expert_maps(results: Sequence[Result], label: str = "") -> Any | None:
    """A row of panels for each method: the share of rounds in which each client held, and trained, each expert.

    Experts stand layer after layer, with lines between layers. Of each method the result of the lowest seed is drawn;
    results without counts are left out. None: no result has any.
    """
    first: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: result.seed):
        if result.held and result.trained:
            first.setdefault(result.method, result)
    if not first:
        return None
    from matplotlib import pyplot

    methods = [name for name in dict.fromkeys(result.method for result in results) if name in first]
    high = max(1.4, 0.7 + 0.12 * max(len(result.held) for result in first.values()))
    figure, grid = pyplot.subplots(
        len(methods), len(KINDS), figsize=(11, high * len(methods) + 0.6), layout="constrained", squeeze=False
    )
    for row, name in zip(grid, methods, strict=True):
        for axes, kind in zip(row, KINDS, strict=True):
            shown = axes.imshow(
                shares(first[name], kind), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="none"
            )
            for end in list(accumulate(first[name].layer_experts))[:-1]:
                axes.axvline(end - 0.5, color="white", linewidth=1)
            axes.set_title(f"{name}: {kind}", fontsize="small")
            axes.set_ylabel("client", fontsize="small")
            axes.tick_params(labelsize="x-small")
    for axes in grid[-1]:
        axes.set_xlabel("expert, layer after layer", fontsize="small")
    figure.colorbar(shown, ax=grid.ravel().tolist(), label="share of rounds", shrink=0.8)
    seeds = sorted({result.seed for result in first.values()})
    figure.suptitle(f"seed {', '.join(map(str, seeds))}{f'; {label}' if label else ''}", fontsize="small")
    return figure


def shares(result: Result, kind: str) -> list[list[float]]:
    """[C, sum E_l]: the share of rounds in which each client held, or trained, each expert."""
    rounds = len(result.rounds) - 1
    return [[count / rounds for count in counts] for counts in getattr(result, kind)]
