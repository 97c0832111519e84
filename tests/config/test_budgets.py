"""The five kinds of budget, told apart and converted."""

import pytest

from hfedmoe.config.budgets import AUTO, Budget, check_budget, in_bytes, in_experts, is_count, parse_bytes
from hfedmoe.config.presets import PRESETS


@pytest.mark.parametrize("budget", [1, 64, "25%", " 12.5 % ", "100%"])
def test_counts(budget: Budget) -> None:
    assert is_count(budget)
    check_budget(budget)
    assert in_bytes(budget) is None


@pytest.mark.parametrize("budget", ["4GiB", "500 MB", "1.5gib", "rtx-4090", AUTO])
def test_memory_is_no_count(budget: str) -> None:
    assert not is_count(budget)
    check_budget(budget)


@pytest.mark.parametrize("budget", [0, -3, True, 0.25, "0%", "101%", "0GiB", "4 Gb/s", "4", "", "rtx-9999", "-1GiB"])
def test_what_is_no_budget_is_refused(budget: Budget) -> None:
    with pytest.raises(ValueError, match=r"expected|a budget must be|write a share"):
        check_budget(budget)


def test_an_unknown_device_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"rtx-9999.*jetson-orin-nano-8gb"):
        check_budget("rtx-9999")


@pytest.mark.parametrize(
    ("budget", "total", "experts"), [(5, 64, 5), (100, 64, 64), ("25%", 64, 16), ("1%", 8, 1), ("60%", 8, 5)]
)
def test_experts_of_a_count_or_share(budget: Budget, total: int, experts: int) -> None:
    assert in_experts(budget, total) == experts


def test_experts_of_memory_are_for_the_planner() -> None:
    with pytest.raises(ValueError, match="4GiB"):
        in_experts("4GiB", 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 * 2**30), ("500MB", 500_000_000), ("1.5 kib", 1536), ("2TB", 2 * 10**12), ("7B", 7)],
)
def test_bytes_of_text(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert in_bytes(text) == expected


@pytest.mark.parametrize("text", ["4", "GiB", "4 giga", "1e9B", "-1GiB"])
def test_text_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        parse_bytes(text)


@pytest.mark.parametrize("name", PRESETS)
def test_a_device_is_worth_what_a_process_may_use(name: str) -> None:
    assert in_bytes(name) == PRESETS[name].memory_bytes < PRESETS[name].installed_bytes


def test_auto_is_measured_elsewhere() -> None:
    assert in_bytes(AUTO) is None
