"""Budgets: a number of experts, a share of them, memory, a device by name, or `auto`. Cheap to import."""

import re

from hfedmoe.config.presets import PRESETS

Budget = int | float | str
AUTO = "auto"
"""The free memory of the device, measured by the device itself."""
_SHARE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*%\s*$")
_MEMORY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*$", re.IGNORECASE)
_UNITS = {"b": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for kind, base in (("b", 1000), ("ib", 1024))
}


def is_count(budget: Budget) -> bool:
    """Whether the budget is a number of experts, at least 1, or a share of them in (0 %, 100 %]."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget >= 1
    match = _SHARE.match(budget) if isinstance(budget, str) else None
    return match is not None and 0 < float(match[1]) <= 100


def check_budget(budget: Budget) -> None:
    """Raise ValueError unless the budget is of one of the five kinds."""
    if isinstance(budget, bool | float):
        raise ValueError(
            f'{budget!r}: write a share as text ("25%"), memory with its unit ("4GiB") and a number of experts as a '
            "whole number"
        )
    if is_count(budget) or budget == AUTO:
        return
    if isinstance(budget, int):
        raise ValueError(f"{budget}: a budget must be at least one expert")
    if _MEMORY.match(budget):
        if parse_bytes(budget) <= 0:
            raise ValueError(f'"{budget}": a budget must be more than 0 bytes')
        return
    if budget not in PRESETS:
        raise ValueError(
            f'"{budget}": expected a share ("25%"), a whole number of experts, memory ("4GiB"), "auto" or a device: '
            f"{', '.join(PRESETS)}"
        )


def budget_of(text: str) -> Budget:
    """A budget from the command line; digits become a number of experts. Raises ValueError."""
    digits = text.strip()
    budget: Budget = int(digits) if digits.removeprefix("-").isdecimal() else text
    check_budget(budget)
    return budget


def in_experts(budget: Budget, total: int) -> int:
    """A count or share as experts out of `total`; a share is rounded to the nearest expert, at least one.

    Raises:
        ValueError: the budget is of another kind.
    """
    if isinstance(budget, int):
        return min(budget, total)
    match = _SHARE.match(budget) if isinstance(budget, str) else None
    if match is None:
        raise ValueError(f"not a number of experts or a share: {budget!r}")
    return max(1, round(float(match[1]) / 100 * total))


def parse_bytes(text: str) -> int:
    """Bytes of "4GiB", "500 MB" and the like. Raises ValueError."""
    match = _MEMORY.match(text)
    if match is None:
        raise ValueError(f'"{text}": expected memory with its unit, such as "4GiB" or "500MB"')
    size = float(match[1]) * _UNITS[match[2].lower()]
    if not size < 2**63:
        raise ValueError(f'"{text}": more memory than any device has')
    return int(size)


def in_bytes(budget: Budget) -> int | None:
    """Memory of a budget given as bytes or as a preset; None for experts, shares and `auto`."""
    if not isinstance(budget, str) or is_count(budget) or budget == AUTO:
        return None
    return PRESETS[budget].memory_bytes if budget in PRESETS else parse_bytes(budget)
