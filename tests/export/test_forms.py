"""Every form of export, for families that keep experts and route differently: equal logits from stock libraries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.export import merged
from hfedmoe.export.adapter import save_adapter, shortest
from hfedmoe.export.merged import merge, save
from hfedmoe.export.personal import Scores, experts_per_layer, last_scores, most_valuable, shrink
from hfedmoe.moe.model import MoEModel
from tests.export.models import fresh, half_of, logits_of, plain, trained
from tests.export.stock import stock_logits
from tests.families.table import build

TOLERANCE = 1e-5
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"attention": True},
    "olmoe": {"freeze_a": True},
    "deepseek_v2": {},
    "deepseek_v3": {"attention": True},  # correction biases, groups, dense first layer
    "gpt_oss": {"attention": True},  # transposed stacks, biases of experts and routers
    "llama4_text": {},  # stacks that PEFT takes for their transpose
    "nemotron_h": {},  # layers of other kinds between
    "longcat_flash": {},  # entries for experts that compute nothing
    "switch_transformers": {"attention": True},  # a module per expert
    "upcycled": {},  # equal experts share memory
}
CHANGES = {
    family: {"n_routed_experts": 16} for family in ("deepseek_v3", "nemotron_h")
}  # two experts of each group remain
FULL = ("gpt_oss", "longcat_flash", "switch_transformers", "upcycled")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name -> (expected, stock) logits of every export; the stock libraries load all of them in one process."""
    root = tmp_path_factory.mktemp("forms")
    jobs, expected = {}, {}

    def add(name: str, logits: Tensor, folder: Path, base: Path | None, x: dict[str, Tensor]) -> None:
        jobs[name], expected[name] = (folder, base, x), logits

    for family, settings in FAMILIES.items():
        base = root / f"{family}-base"
        stock = fresh(family, **CHANGES.get(family, {}))
        if family == "upcycled":
            from hfedmoe.export.mixtral import write_mixtral

            base.mkdir()
            write_mixtral(stock, base)
        else:
            stock.save_pretrained(base)
        x = plain(stock)
        model = trained(fresh(family, **CHANGES.get(family, {})), **settings)
        after = logits_of(model.model, x)
        assert (after - logits_of(stock, x)).abs().max() > 0.01, family  # or the comparison would say nothing
        save_adapter(model, root / f"{family}-adapter", str(base))
        add(f"{family}-adapter", after, root / f"{family}-adapter", base, x)
        masked = None
        if family != "upcycled":
            keep = half_of(model)
            model.set_resident(keep)
            masked = logits_of(model.model, x)
            model.set_resident(None)
        merge(model, torch.float32)
        save(model.model, root / f"{family}-merged")
        add(f"{family}-merged", after, root / f"{family}-merged", None, x)
        if masked is not None:
            assert (after - masked).abs().max() > 0.01, family
            save(shrink(model, keep), root / f"{family}-client")
            add(f"{family}-client", masked, root / f"{family}-client", None, x)
    for family in FULL:
        model = trained(fresh(family), experts="full")
        x = plain(model.model)
        after = logits_of(model.model, x)
        merge(model, torch.float32)
        save(model.model, root / f"{family}-full")
        add(f"{family}-full", after, root / f"{family}-full", None, x)
    scratch = root / "stock"
    scratch.mkdir()
    found = stock_logits(jobs, scratch)
    return {name: (expected[name], found[name]) for name in jobs}


NAMES = [
    *(f"{family}-{form}" for family in FAMILIES for form in ("merged", "adapter", "client")),
    *(f"{family}-full" for family in FULL),
]
NAMES.remove("upcycled-client")  # a Mixtral like the other


@pytest.mark.parametrize("name", NAMES)
def test_stock_libraries_give_equal_logits(results, name):
    expected, found = results[name]
    assert expected.shape == found.shape
    assert (expected - found).abs().max() <= TOLERANCE


# precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_made_in_float32_and_rounded_once(dtype):
    model = MoEModel(build("deepseek_v3").bfloat16(), rank=3, alpha=5.0, attention=True)
    state = model.states[0]
    for side in ("up", "down"):
        state.trained.stacks[f"{side}_b"].normal_()
    projection = model.model.model.layers[0].self_attn.kv_b_proj
    projection.lora_B["default"].weight.normal_()
    a, b = (factor["default"].weight for factor in (projection.lora_A, projection.lora_B))
    attention = (projection.base_layer.weight.float() + 5 / 3 * b @ a).to(dtype)
    experts = state.tensors()["up"].float() + 5 / 3 * state.trained.stacks["up_b"] @ state.trained.stacks["up_a"]
    merge(model, dtype)
    # Sums in another order differ by rounding, which in bfloat16 matters only at the edge between two numbers.
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(state.tensors()["up"], experts.to(dtype), rtol=rounding, atol=1e-6)
    if dtype == torch.bfloat16:
        assert (state.tensors()["up"] != experts.to(dtype)).float().mean() < 0.001
    torch.testing.assert_close(model.model.model.layers[0].self_attn.kv_b_proj.weight, attention)
    assert {p.dtype for p in model.model.parameters()} == {dtype}


def test_what_a_family_keeps_in_float32_stays_so_in_16_bit():
    stock = dict(build("deepseek_v4").named_parameters())
    model = MoEModel(build("deepseek_v4"))
    merge(model, torch.bfloat16)
    found = dict(model.model.named_parameters())
    whole = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    for part in ("sinks", "attn_hc", "input_layernorm"):
        assert any(part in name for name in whole)
    assert all(torch.equal(found[name], stock[name]) for name in whole)
    assert {found[name].dtype for name in found if "experts" in name or "embed" in name} == {torch.bfloat16}


def test_merging_needs_the_experts_in_the_model():
    model = MoEModel(build("mixtral"))
    model.store = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="in a store"):
        merge(model, torch.float32)


# adapters


@torch.no_grad()
def test_an_adapter_of_a_16_bit_run_is_exact_on_its_base_in_float32(tmp_path):
    def stock(dtype: torch.dtype) -> Any:
        model = fresh("mixtral")
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        return model

    save_adapter(trained(stock(torch.bfloat16)), tmp_path, "base")
    exact = trained(stock(torch.float32))
    x = plain(exact.model)
    loaded = PeftModel.from_pretrained(stock(torch.float32), tmp_path)
    assert (logits_of(loaded, x) - logits_of(exact.model, x)).abs().max() <= TOLERANCE
    # What the card's code avoids: a 16-bit base rounds the adapter, and all that is computed.
    rounded = PeftModel.from_pretrained(stock(torch.bfloat16), tmp_path)
    assert (logits_of(rounded, x) - logits_of(exact.model, x)).abs().max() > 100 * TOLERANCE


def test_an_adapter_names_the_revision_of_its_base(tmp_path):
    save_adapter(trained(fresh("mixtral")), tmp_path, "who/what", revision="abc")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("who/what", "abc")


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"whole experts.*--as merged"):
        save_adapter(MoEModel(build("mixtral"), experts="full"), tmp_path, "base")
    with pytest.raises(UserError, match="trained only routers"):
        save_adapter(MoEModel(build("mixtral"), experts="frozen"), tmp_path, "base")
    assert not list(tmp_path.iterdir())


def test_targets_are_the_shortest_endings_that_are_exact():
    names = ["a.0.mlp.gate", "a.1.mlp.gate", "a.0.shared.gate", "a.1.mlp.up", "b.1.mlp.up", "mlp.gate_proj"]
    assert shortest({"a.0.mlp.gate", "a.1.mlp.gate"}, names) == ["mlp.gate"]
    assert shortest({"a.1.mlp.up"}, names) == ["a.1.mlp.up"]
    assert shortest({"a.0.mlp.gate", "a.0.shared.gate", "a.1.mlp.gate"}, names) == ["mlp.gate", "shared.gate"]
    assert shortest({"x.gate"}, ["x.gate", "max.gate"]) == ["x.gate"]  # nothing shorter, and PEFT takes whole names
    assert shortest(set(), names) == []


# sub-models


def rows_of(*rounds: tuple[int, int, Any, Any, Any]) -> np.ndarray:
    """Rows as experts.npy has them, of (round, client, resident, importance, usage) each [L, E]."""
    shape = np.shape(rounds[0][2])
    fields = [("resident", bool, shape), ("importance", np.float32, shape), ("usage", np.float32, shape)]
    rows = np.zeros(len(rounds), [("round", np.int64), ("client", np.int64), *fields])
    for row, values in zip(rows, rounds, strict=True):
        for name, value in zip(("round", "client", "resident", "importance", "usage"), values, strict=True):
            row[name] = value
    return rows


def scores(resident, importance, usage) -> Scores:
    return last_scores(rows_of((4, 2, resident, importance, usage)), 2)


def test_residents_come_first_then_importance_then_usage():
    found = scores([[1, 0, 0, 0], [0, 0, 1, 1]], [[0.1, 0.5, 0.9, 0.5], [9, 9, 1, 2]], [[0, 0.1, 0, 0.2], [1, 1, 1, 1]])
    assert (found.round, found.held) == (4, 3)
    assert [mask.nonzero()[:, 0].tolist() for mask in most_valuable(found, 3, [4, 4])] == [[0, 2, 3], [0, 2, 3]]
    assert [mask.nonzero()[:, 0].tolist() for mask in most_valuable(found, 1, [4, 4])] == [[0], [3]]
    assert [mask.nonzero()[:, 0].tolist() for mask in most_valuable(found, 2, [4, 4], groups=2)] == [[0, 2], [0, 3]]


def test_unmeasured_importance_comes_last():
    nan = float("nan")
    found = scores([[1, 0, 0]], [[nan, nan, -5.0]], [[nan, 1.0, 0.0]])
    assert [mask.nonzero()[:, 0].tolist() for mask in most_valuable(found, 2, [3])] == [[0, 2]]


def test_scores_are_of_the_last_round_of_the_client():
    here = [[True, False]]
    rows = rows_of((1, 0, here, [[1, 2]], [[0, 0]]), (2, 0, here, [[3, 4]], [[0, 0]]), (3, 1, here, [[5, 6]], [[0, 0]]))
    assert last_scores(rows, 0).round == 2
    assert last_scores(rows, 0).importance.tolist() == [[3.0, 4.0]]
    more = rows_of(*((1, client, here, [[1, 2]], [[0, 0]]) for client in (5, 3, 0, 1, 4)))
    with pytest.raises(UserError, match=r"--client 7: took part in no round yet.*; choose one that did: 0-1, 3-5$"):
        last_scores(more, 7)
    for nothing in (rows[:0], None):
        with pytest.raises(UserError, match=r"--client 7: the run has no experts.npy"):
            last_scores(nothing, 7)


def test_the_number_of_experts_is_the_mean_rounded_down_and_at_least_top_k():
    config = build("mixtral").config
    assert experts_per_layer(11, [6, 6], 2, config) == 5
    assert experts_per_layer(2, [6, 6], 2, config) == 2
    assert experts_per_layer(12, [6, 6], 2, config) == 6


def test_routers_that_choose_among_groups_need_some_of_each():
    config = build("deepseek_v3").config  # 4 groups, of which a token uses 2
    assert experts_per_layer(30, [16, 16], 2, config) == 12
    with pytest.raises(
        UserError, match=r"deepseek_v3 routes by 4 groups .* needs 2 experts of each group, 8 per layer"
    ):
        experts_per_layer(14, [16, 16], 2, config)
    greedy = build("deepseek_v2").config
    assert experts_per_layer(8, [8, 8], 2, greedy) == 4
    with pytest.raises(UserError, match="deepseek_v2 routes by 4 groups"):
        experts_per_layer(8, [8, 8], 4, greedy)
    greedy.topk_method = "greedy"  # groups are in the config, but not in use
    assert experts_per_layer(10, [8, 8], 4, greedy) == 5


@torch.no_grad()
def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "SHARD_SIZE", "100KB")
    model = trained(fresh("mixtral"))
    x = plain(model.model)
    expected = logits_of(model.model, x)
    merge(model, torch.float32)
    save(model.model, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    again = type(model.model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert (logits_of(again, x) - expected).abs().max() <= TOLERANCE


def test_a_sub_model_generates_as_the_whole_does():
    model = trained(fresh("mixtral"))
    keep = half_of(model)
    model.model.generation_config.top_k = 7
    merge(model, torch.float32)
    assert shrink(model, keep).generation_config.top_k == 7


def test_layers_of_unequal_size_have_no_standard_checkpoint(monkeypatch):
    model = MoEModel(build("mixtral"))
    model.layers[0].num_experts = 5
    with pytest.raises(UserError, match="mixtral: its config has no number of experts"):
        shrink(model, [torch.tensor([True] * 2 + [False] * 3), torch.tensor([True] * 2 + [False] * 4)])


def test_an_adapter_is_written_in_the_precision_that_is_asked_for(tmp_path):
    save_adapter(trained(fresh("mixtral")), tmp_path, "base", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
