"""experts.npz: what the experts did, per round, client, layer and expert, for plots and reports.

| array | shape | content |
|---|---|---|
| rounds | int64 [N] | which rounds, in order |
| clients | int64 [C] | every client that took part so far, in order |
| num_experts | int64 [L] | experts of each MoE layer; E = max over layers |
| usage, importance | float32 [N, C, L, E] | NaN where a client took no part, or a layer has fewer experts |
| resident, trained | bool [N, C, L, E] | False there |
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe.errors import UserError
from hfedmoe.runs.disk import replacing

FIELDS = {"usage": np.float32, "importance": np.float32, "resident": np.bool_, "trained": np.bool_}


@dataclass(frozen=True)
class ExpertHistory:
    """The arrays of experts.npz (shapes in the docstring of this module)."""

    rounds: np.ndarray
    clients: np.ndarray
    num_experts: np.ndarray
    usage: np.ndarray
    importance: np.ndarray
    resident: np.ndarray
    trained: np.ndarray

    @classmethod
    def empty(cls, num_experts: Sequence[int]) -> "ExpertHistory":
        """No round yet."""
        shape = (0, 0, len(num_experts), max(num_experts))
        none = np.zeros(0, np.int64)
        arrays: dict[str, np.ndarray] = {name: np.zeros(shape, dtype) for name, dtype in FIELDS.items()}
        return cls(none, none, np.asarray(num_experts, np.int64), **arrays)

    def with_round(self, round: int, clients: Sequence[int], rows: dict[str, Any]) -> "ExpertHistory":
        """Add (or replace) a round. `rows` has one [len(clients), sum E_l] array for each of FIELDS."""
        kept = self.only(self.rounds != round)
        rounds = np.sort(np.append(kept.rounds, round))
        everyone = np.union1d(kept.clients, np.asarray(clients, np.int64))
        layers, experts = len(self.num_experts), int(self.num_experts.max())
        exists = np.arange(experts) < self.num_experts[:, None]  # [L, E]
        old = np.ix_(np.searchsorted(rounds, kept.rounds), np.searchsorted(everyone, kept.clients))
        here = np.searchsorted(rounds, round)
        arrays = {}
        for name, dtype in FIELDS.items():
            nothing = np.nan if dtype is np.float32 else False
            grown: np.ndarray = np.full((len(rounds), len(everyone), layers, experts), nothing, dtype)
            grown[old] = getattr(kept, name)
            for client, row in zip(clients, np.asarray(rows[name], dtype), strict=True):
                grown[here, np.searchsorted(everyone, client)][exists] = row
            arrays[name] = grown
        return ExpertHistory(rounds, everyone, self.num_experts, **arrays)

    def only(self, keep: np.ndarray) -> "ExpertHistory":
        """The rounds where the mask `keep` [N] is true."""
        arrays = {name: getattr(self, name)[keep] for name in FIELDS}
        return ExpertHistory(self.rounds[keep], self.clients, self.num_experts, **arrays)


def write(path: Path, history: ExpertHistory) -> None:
    """Replace experts.npz in one step."""
    with replacing(path) as file:
        np.savez(file, **vars(history))


def read(path: Path) -> ExpertHistory | None:
    """Read experts.npz; None if there is none yet. Raises UserError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ExpertHistory(**{name: arrays[name] for name in ExpertHistory.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, the run does not need it to go on") from None
