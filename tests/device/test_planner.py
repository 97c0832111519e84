"""Forecasts against hand-computed bytes, and how they move with what is asked for."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from transformers import MixtralConfig

from hfedmoe.config import RunConfig, load_config
from hfedmoe.device.beside import JOIN_BYTES, SUPERNODE_BYTES
from hfedmoe.device.forecast import KINDS
from hfedmoe.device.planner import FRAMEWORK_BYTES, PARQUET_BYTES, Planner
from hfedmoe.device.rehearsal import Rehearsed
from hfedmoe.device.trace import Timeline
from hfedmoe.device.weights import Tensors, blob_bytes
from hfedmoe.device.workload import Workload
from hfedmoe.moe.experts.quantised import stored_bytes

H, I, E, L, V = 64, 96, 4, 2, 500  # noqa: E741
TOP_K, RANK = 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a config.json: nothing else is read."""
    folder = tmp_path_factory.mktemp("model")
    MixtralConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=False,
        architectures=["MixtralForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    return folder


def _config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"model.name={folder}", "model.device=cpu", *overrides])


@pytest.fixture(scope="module")
def planner(folder: Path) -> Planner:
    return Planner(_config(folder))


@pytest.fixture
def simple(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A planner whose rehearsals are a formula: 10 KB of activations per token, a quarter when checkpointing."""

    def rehearse(model: object, workload: Workload) -> Rehearsed:
        tokens = workload.batch_size * workload.length
        size = tokens * 10_000 // (4 if workload.gradient_checkpointing else 1)
        step = Timeline(["activations"], np.zeros(2, dtype=np.int64), np.array([size, -size]))
        forward = Timeline(["activations"], np.zeros(2, dtype=np.int64), np.array([tokens, -tokens]))
        return Rehearsed(step, forward, tokens)

    monkeypatch.setattr("hfedmoe.device.planner.rehearse", rehearse)
    return Planner(_config(folder))


def test_the_workload_is_the_configurations(folder: Path) -> None:
    overrides = ("train.batch_size=3", "data.max_tokens=40", 'train.lora="freeze_a"', "data.format=completion")
    workload = Workload.of(_config(folder, *overrides))
    assert (workload.batch_size, workload.length, workload.answer_tokens) == (3, 40, 40)
    assert workload.freeze_a
    assert Workload.of(_config(folder)).answer_tokens == 1


def test_bytes_of_a_tiny_model_are_what_its_shapes_say(planner: Planner) -> None:
    kinds = planner.forecast(6).kinds
    assert tuple(kinds) == KINDS
    assert kinds["framework"] == FRAMEWORK_BYTES["cpu"] + PARQUET_BYTES  # the packaged data
    assert kinds["embeddings_head"] == 2 * V * H * 4
    assert kinds["attention"] == L * (2 * H * H + 2 * H * H // 2) * 4
    assert kinds["routers"] == L * E * H * 4
    assert kinds["experts"] == 6 * 3 * H * I * 4
    lora = RANK * (H + 2 * I) + RANK * (I + H)
    assert kinds["adapters"] == 6 * lora * 4
    trained = (6 * lora + L * E * H) * 4
    assert kinds["optimizer"] == 2 * trained
    assert 0 <= kinds["gradients"] <= trained
    assert kinds["other_base"] > (2 * L + 1) * H * 4  # norms, and the rotary table


def test_full_training_holds_gradients_and_moments_of_every_resident_expert(folder: Path) -> None:
    planner = Planner(_config(folder, "train.experts=full"))
    kinds = planner.forecast(6, replace(planner.workload, batch_size=1, length=4)).kinds
    trained = (6 * 3 * H * I + L * E * H) * 4
    assert kinds["adapters"] == 0
    assert kinds["optimizer"] == 2 * trained
    # With so few tokens the peak is near the end of the backward pass: at most the first router's gradient is missing.
    assert trained - E * H * 4 <= kinds["gradients"] <= trained


def test_messages_have_the_size_that_they_will_have(simple: Planner) -> None:
    tensors = simple._weights.travelling([4, 2], simple.workload)
    blob = save({name: torch.zeros(shape, dtype=tensors.dtypes[name]) for name, shape in tensors.shapes.items()})
    assert blob_bytes(tensors) == len(blob)
    forecast = simple.forecast([4, 2])
    assert len(blob) < forecast.bytes_down < len(blob) + 2048
    assert forecast.bytes_up > forecast.bytes_down


def test_blobs_of_mixed_precision() -> None:
    shapes = {"b": (3, 5), "a": (2,), "c.d": (7,)}
    dtypes = {"b": torch.bfloat16, "a": torch.float32, "c.d": torch.bfloat16}
    blob = save({name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()})
    assert blob_bytes(Tensors(shapes, dtypes)) == len(blob)


def test_experts_are_spread_evenly(simple: Planner) -> None:
    assert (simple.num_experts, simple.top_k, simple.smallest) == ([E] * L, [TOP_K] * L, TOP_K * L)
    assert simple.spread(5) == [3, 2]
    assert simple.spread(99) == [4, 4]
    assert simple.forecast(5) == simple.forecast([3, 2])


def test_more_work_takes_more(planner: Planner) -> None:
    ladder = [{"rank": 1, "length": 32, "batch_size": 1}, {"length": 32, "batch_size": 1}, {"batch_size": 1}, {}]
    forecasts = [planner.forecast(4, replace(planner.workload, **changes)) for changes in ladder]  # type: ignore[arg-type]
    for less, more in pairwise(forecasts):
        assert less.peak < more.peak
        assert less.flops < more.flops


def test_more_experts_take_more_and_compute_the_same(planner: Planner) -> None:
    forecasts = [planner.forecast(number) for number in (4, 5, 8)]
    assert [f.peak for f in forecasts] == sorted({f.peak for f in forecasts})
    assert len({f.flops for f in forecasts}) == 1
    assert forecasts[0].seconds_per_step(1e9) == forecasts[0].flops / 1e9


def test_fewer_bits_take_less(simple: Planner) -> None:
    sizes = {
        dtype: simple.forecast(8, replace(simple.workload, expert_dtype=dtype)).kinds["experts"]
        for dtype in ("same", "bfloat16", "8bit", "4bit")
    }
    assert sizes["same"] == 2 * sizes["bfloat16"]
    assert sizes["bfloat16"] > sizes["8bit"] > sizes["4bit"]
    shapes = ((2 * I, H), (H, I))
    assert sizes["4bit"] == 8 * sum(stored_bytes(shape, "4bit", torch.float32) for shape in shapes)


def test_sixteen_bits_computed_in_float32(planner: Planner) -> None:
    half = replace(planner.workload, dtype="bfloat16")
    plain, cast = planner.forecast(4, half), planner.forecast(4, replace(half, compute_float32=True))
    assert plain.kinds["embeddings_head"] == cast.kinds["embeddings_head"] == 2 * V * H * 2
    assert cast.kinds["activations"] > 1.25 * plain.kinds["activations"]  # LoRA's products are float32 in both
    assert cast.kinds["routers"] == plain.kinds["routers"] == L * E * H * 4  # what is trained is float32


def test_checkpointing_trades_activations_for_work(planner: Planner) -> None:
    plain = planner.forecast(4)
    checkpointed = planner.forecast(4, replace(planner.workload, gradient_checkpointing=True))
    assert checkpointed.kinds["activations"] < plain.kinds["activations"]
    assert checkpointed.flops > plain.flops


def test_one_step_needs_no_moments_while_it_goes_backward(planner: Planner) -> None:
    once = planner.forecast(4, replace(planner.workload, steps=1))
    assert once.peak < planner.forecast(4).peak


def test_attention_lora_counts_as_adapters(simple: Planner) -> None:
    rank, projections = simple.workload.rank, [(H, H), (H, H // 2), (H, H // 2), (H, H)]
    added = L * sum(rank * (first + second) * 4 for first, second in projections)
    plain, more = simple.forecast(4), simple.forecast(4, replace(simple.workload, attention=True))
    assert more.kinds["adapters"] - plain.kinds["adapters"] == added
    assert more.kinds["attention"] == plain.kinds["attention"]
    assert more.bytes_down > plain.bytes_down + added


def test_the_most_experts_that_fit(simple: Planner) -> None:
    six = simple.forecast(6)
    assert six.beside == JOIN_BYTES + SUPERNODE_BYTES + six.bytes_down + six.bytes_up
    exact = math.ceil(six.highest * 1.05) + 1 + six.beside
    fit = simple.fit(exact)
    assert (fit.fits, fit.residents, fit.forecast) == (True, 6, simple.forecast(6))
    assert fit.needed_bytes <= exact
    assert simple.fit(exact, margin=1.0).residents >= 6
    assert simple.fit(1 << 40).residents == E * L


def test_where_nothing_fits_it_says_what_would_be_needed(simple: Planner) -> None:
    fit = simple.fit(1 << 20)
    assert (fit.fits, fit.residents) == (False, 0)
    assert fit.forecast == simple.forecast(simple.smallest)
    assert fit.needed_bytes == round(fit.forecast.highest * 1.05) + fit.forecast.beside
    assert simple.smallest_change(1 << 20) is None


def test_the_smallest_change_is_shorter_text_if_that_is_enough(simple: Planner) -> None:
    shorter = simple.forecast(simple.smallest, replace(simple.workload, length=32))
    change = simple.smallest_change(shorter.needed(1.05) + 1)
    assert change is not None
    assert change.settings == {"data.max_tokens": 32}
    assert str(change) == "data.max_tokens = 32"


def test_two_changes_where_one_is_not_enough(simple: Planner) -> None:
    # 8 x 64 tokens: the shortest text leaves a quarter of the activations, one row an eighth, checkpointing a quarter.
    changed = replace(simple.workload, length=24, batch_size=1)
    change = simple.smallest_change(simple.forecast(4, changed).needed(1.05) + 1)
    assert change is not None
    assert change.settings == {"data.max_tokens": 24, "train.batch_size": 1}
    assert str(change) == "data.max_tokens = 24, train.batch_size = 1"


def test_loading_and_bootstrap_are_within_the_budget_too(planner: Planner) -> None:
    forecast = planner.forecast(4)
    assert forecast.highest == max(forecast.peak, forecast.loading_peak, forecast.bootstrap_peak)
    assert forecast.bootstrap_peak < forecast.peak
