"""Plans of a server: which experts each of a round's clients holds, by a linear programme."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def best_plan(
    value: npt.NDArray[np.float64],
    num_experts: Sequence[int],
    budgets: Sequence[int],
    floors: Sequence[Sequence[int]],
    least: int,
    most: int,
) -> list[list[Tensor]]:
    """max sum over c, e of value[c, e] x[c, e] with x in {0, 1}.

    The constraints form a network, so the solution of the programme with x in [0, 1] is whole numbers.

    Args:
        value: float [C, sum E_l], positive, so that budgets are filled.
        num_experts: E_l of every layer.
        budgets: experts over all layers, of each client.
        floors: experts that a client holds at least, [C][L].
        least: clients that hold an expert at least, and `most` at most. Where that is not possible, both are dropped.

    Returns:
        bool [E_l] per layer, for each client.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    clients, total = value.shape
    own, experts = np.arange(clients).repeat(total), np.tile(np.arange(total), clients)
    places, one = np.arange(clients * total), np.ones(clients * total)
    layer = np.repeat(np.arange(len(num_experts)), num_experts)[experts] + own * len(num_experts)
    by_client = csr_array((one, (own, places)))
    by_layer = csr_array((one, (layer, places)))
    by_expert = csr_array((one, (experts, places)))
    room = [np.minimum(np.array(budgets), total), -np.concatenate([np.array(floor) for floor in floors])]
    solved = linprog(
        -value.ravel(),
        A_ub=vstack([by_client, -by_layer, by_expert, -by_expert]),
        b_ub=np.concatenate([*room, np.full(total, most), np.full(total, -least)]),
        bounds=(0, 1),
        method="highs-ds",
    )
    if not solved.success:
        solved = linprog(
            -value.ravel(),
            A_ub=vstack([by_client, -by_layer]),
            b_ub=np.concatenate(room),
            bounds=(0, 1),
            method="highs-ds",
        )
    chosen = torch.from_numpy(solved.x.reshape(clients, total) > 0.5)
    return [list(row.split(list(num_experts))) for row in chosen]
