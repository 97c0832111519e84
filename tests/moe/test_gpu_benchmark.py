"""The GPU benchmark of the expert layer, on the CPU: its arms compute one function, and it says so if one does not."""

from typing import Any

import pytest
import torch
from benchmarks.gpu_arms import ARMS, measured
from benchmarks.gpu_layer import OLMOE, TINY, Shape, batch_of
from benchmarks.gpu_ours import ours
from benchmarks.gpu_process import rows_of
from benchmarks.gpu_profile import failures as profile_failures
from benchmarks.gpu_speed import failures, line, summary

CPU = torch.device("cpu")


def row_of(arm: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"arm": arm, "shape": "tiny", "tokens": 128, **measured(ARMS[arm], TINY, 128, CPU, torch.float32)}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row_of(arm) for arm in ("ours", "bare", "ours frozen", "stock frozen")]


def test_all_arms_compute_the_same(rows: list[dict[str, Any]]) -> None:
    assert failures(rows) == []
    _, _, frozen, stock = rows
    assert frozen["norm"] == pytest.approx(stock["norm"], rel=1e-5)
    assert frozen["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-5)


def test_ratios_compare_the_named_arms(rows: list[dict[str, Any]]) -> None:
    ratios = summary(rows)["tiny 128"]
    assert ratios["ours / stock frozen (<= 1.15)"] == rows[0]["ms"] / rows[3]["ms"]
    assert ratios["base and LoRA products / ours"] == rows[1]["all_ms"] / rows[0]["ms"]
    assert "ours / peft (<= 1)" not in ratios
    assert line(rows[0]).startswith("tiny   128 ours ")


def test_an_arm_that_computes_something_else_is_a_failure(rows: list[dict[str, Any]]) -> None:
    (found,) = failures([*rows, rows[3] | {"grad_norm": 1.1 * rows[3]["grad_norm"]}])
    assert found.startswith("stock frozen tiny 128: grad_norm")


def test_a_wait_too_many_is_a_failure() -> None:
    row = {"arm": "lora", "waits_per_step": 1.0, "waits_at": {}}
    assert profile_failures([row]) == []
    assert len(profile_failures([row | {"waits_per_step": 65.0}])) == 1


def test_operations_are_those_of_the_products() -> None:
    shape = Shape("any", hidden=3, intermediate=5, num_experts=2, top_k=2)
    pairs = 7 * 2
    up, down = 2 * pairs * 3 * 10, 2 * pairs * 5 * 3
    assert shape.base_flops(7) == 2 * (up + down)
    # x A', (x A') B', and for each of the two the gradients of both factors.
    assert shape.lora_flops(7) == 3 * 2 * pairs * 16 * (3 + 10 + 5 + 3)


def test_the_experts_of_every_storage_are_the_same() -> None:
    batch = batch_of(TINY, 32, CPU, torch.float32)
    stacked, held = (ours(TINY, CPU, torch.float32, how, lora=False) for how in ("stacked", "same"))
    out = [layer.forward(batch.x, batch.index, batch.weights) for layer in (stacked, held)]
    torch.testing.assert_close(*out)
    assert stacked.weight_bytes == held.weight_bytes == 4 * 8 * 64 * 64 * 3


def test_batches_are_reproducible_and_use_all_experts() -> None:
    first, second = (batch_of(OLMOE, 64, CPU, torch.float32, seed=3) for _ in range(2))
    assert torch.equal(first.index, second.index)
    assert len(first.index.unique()) == OLMOE.num_experts


def test_a_process_that_fails_keeps_what_it_printed() -> None:
    arguments = ["bare", "--cells", "tiny:32,unknown:32", "--seconds", "60", "--dry"]
    rows, failure = rows_of("benchmarks.gpu_arms", arguments, 120)
    assert [row["shape"] for row in rows] == ["tiny", "unknown"]
    assert rows[0]["all_ms"] > 0
    assert "KeyError: 'unknown'" in rows[1]["error"]
    assert failure is not None
    assert failure.startswith("exit status 1")
