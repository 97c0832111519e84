"""Settings that vary: every combination of their values is a point of the grid, with a configuration of its own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError

ELSEWHERE = {"seed": "--seeds", "method.name": "--methods"}


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    config: RunConfig
    settings: dict[str, str] = field(default_factory=dict)
    """The value of each key that varies, as it was written; empty if nothing varies."""

    @property
    def label(self) -> str:
        """For example "partition.alpha = 0.1, method.tau = 0"; empty if nothing varies."""
        return ", ".join(f"{key} = {value}" for key, value in self.settings.items())

    def number(self, key: str) -> float | None:
        """The value of a key as a number, for an axis (`number_of`)."""
        node: Any = self.config.model_dump(mode="json")
        for part in key.split("."):
            node = node[part]
        return number_of(node)


def seeds_of(text: str) -> list[int]:
    """The seeds of `--seeds`, such as 0-4 or 0,2,5. Raises UserError if they are none."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"--seeds {text}: expected numbers such as 0-4 or 0,2,5")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return list(dict.fromkeys(found))


def points_of(vary: Sequence[str], load: Callable[[list[str]], RunConfig]) -> list[Point]:
    """The points of a grid, the last key changing fastest; one point if nothing varies.

    Args:
        vary: such as `partition.alpha=0.1|1`: a key, and values as `--set` reads them.
        load: the configuration with `--set` overrides.

    Raises:
        UserError: an entry is malformed, a key is there twice, belongs to another option or has an invalid value, or
            two points are the same.
    """
    axes: dict[str, list[str]] = {}
    for text in vary:
        key, _, written = text.partition("=")
        key, found = key.strip(), [value.strip() for value in written.split("|")]
        if not key or not all(found):
            raise UserError(
                f"--vary {text}: expected section.key=value|value, for example "
                """--vary 'clients.budgets=["25%"]|["50%"]'"""
            )
        if key in ELSEWHERE:
            raise UserError(f"--vary {text}: {ELSEWHERE[key]} does that")
        if key in axes:
            raise UserError(f"--vary {text}: {key} is there twice; give all its values at once, with | between them")
        axes[key] = found
    points: dict[str, Point] = {}
    for values in product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        point = Point(load([f"{key}={value}" for key, value in settings.items()]), settings)
        same = points.setdefault(point.config.model_dump_json(), point)
        if same is not point:
            raise UserError(f"--vary: {point.label} is the same as {same.label}; leave one out")
    return list(points.values())


def number_of(value: Any) -> float | None:
    """A number, a share such as "25%" (as 25), or the mean of a list of these; None: it is something else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
        return None if share is None else float(share[1])
    if isinstance(value, list) and value and len({type(entry) for entry in value}) == 1:
        found = [number for entry in value if (number := number_of(entry)) is not None]
        return fmean(found) if len(found) == len(value) else None
    return None
