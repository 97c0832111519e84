"""The plan: budgets in rows, hand-computed times and deadlines, changes that really fit, and a page that fits."""

import json
from dataclasses import replace

import pytest

from hfedmoe.config import load_config
from hfedmoe.config.builtin import shipped_config
from hfedmoe.config.presets import PRESETS
from hfedmoe.device.planner import FRAMEWORK_BYTES, MARGIN, PARQUET_BYTES
from hfedmoe.device.probe import Probe
from hfedmoe.errors import UserError
from hfedmoe.report import device_presets as presets
from hfedmoe.report import plan as report
from hfedmoe.report.plan import Deadline, plan_for, to_json
from hfedmoe.report.plan_text import as_text
from hfedmoe.report.table import WIDTH, table, tables

GIB = 1 << 30
PROBED = Probe(memory_bytes=2 * GIB, limit="limit of the control group /a", flops=5e9)


def config(*overrides):
    return load_config(shipped_config("tiny"), list(overrides))


@pytest.fixture(scope="module")
def plan():
    """Every kind of budget for the tiny model: 4 layers of 8 experts, top-2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "probe", lambda device: PROBED)
        settings = config("clients.deadlines_s=[1e-9,1e9]", "model.device=cpu")
        return plan_for(settings, ["7", "10", "25%", "16GiB", "1MB", "auto", *PRESETS])


@pytest.fixture(scope="module")
def devices(plan):
    return {device.name: device for device in plan.devices}


def test_numbers_of_experts_say_nothing_about_memory(devices):
    assert devices["10 experts"].fits is None
    assert devices["10 experts"].memory_bytes is None
    assert devices["10 experts"].forecast.residents == [3, 3, 2, 2]
    assert devices["25%"].fits is None
    assert devices["25%"].forecast.num_residents == 8


def test_fewer_than_top_k_are_refused_with_the_fewest_that_would_do(plan, devices):
    assert devices["7 experts"].fits is False
    assert devices["7 experts"].asked == 7
    assert devices["7 experts"].forecast.num_residents == plan.smallest == 8
    line = next(line for line in as_text(plan).splitlines() if line.startswith("7 experts: too few"))
    assert 'needs at least 8 ("25%")' in line


def test_memory_is_filled(devices):
    assert devices["16GiB"].fits
    assert devices["16GiB"].forecast.num_residents == 32
    assert devices["16GiB"].seconds_per_step is None
    assert devices["1MB"].fits is False
    assert devices["1MB"].change is None


def test_presets_bring_memory_speed_and_kind_of_device(devices):
    for name, preset in PRESETS.items():
        device = devices[name]
        assert device.memory_bytes == preset.memory_bytes
        assert device.device_type == preset.device
        data = 0 if preset.device == "cuda" else PARQUET_BYTES  # a card's memory holds none of the packaged data
        assert device.forecast.kinds["framework"] == FRAMEWORK_BYTES[preset.device] + data
        assert device.seconds_per_step == device.forecast.flops / preset.flops
        assert device.seconds_per_round == pytest.approx(4 * device.forecast.flops / preset.flops)  # train.steps


def test_auto_is_what_was_probed(plan, devices):
    auto = devices["auto"]
    assert (auto.memory_bytes, auto.limit, auto.flops_per_second) == (2 * GIB, PROBED.limit, 5e9)
    assert auto.seconds_per_step == auto.forecast.flops / 5e9
    assert f"auto: 2.0 GiB is the {PROBED.limit}; 5.0 GFLOP/s" in as_text(plan)


def test_steps_within_a_deadline(devices):
    assert devices["auto"].deadlines == [Deadline(1e-9, 1), Deadline(1e9, 4)]  # the first step is always done
    assert devices["16GiB"].deadlines == [Deadline(1e-9, None), Deadline(1e9, None)]
    assert [report._steps_in(10, 3.0, steps) for steps in (2, 3, 4)] == [2, 3, 3]


def test_the_budgets_of_the_clients_are_one_row_each():
    settings = config(
        "clients.count=5", 'clients.budgets=["25%", 16]', "clients.deadlines_s=[30, 20, 10]", "partition.min_rows=1"
    )
    rows = [(device.budget, device.clients, device.deadlines) for device in plan_for(settings).devices]
    # clients 0, 2 and 4 have the first budget and deadlines 30, 10 and 20; 1 and 3 the other, with 20 and 30
    assert rows == [
        ("25%", 3, [Deadline(10, None), Deadline(20, None), Deadline(30, None)]),
        (16, 2, [Deadline(20, None), Deadline(30, None)]),
    ]


def test_the_smallest_change_can_be_pasted_and_fits(devices):
    memory = devices["25%"].forecast.needed(MARGIN) - 1  # one byte too few for top-2 everywhere
    budget = f"{memory}B"
    refused = plan_for(config(), [budget])
    assert refused.devices[0].fits is False
    (line,) = [line for line in as_text(refused).splitlines() if line.startswith("  --set")]
    settings = line.split()[1::2]
    assert line.split()[::2] == ["--set"] * len(settings)
    (device,) = plan_for(config(*settings), [budget]).devices
    assert device.fits
    assert refused.devices[0].change.needed_bytes <= memory


def test_gradient_checkpointing_is_compared(plan, devices):
    device = devices["25%"]
    assert device.otherwise.peak < device.forecast.peak
    assert "activations with checkpointing" in as_text(plan)
    (turned,) = plan_for(config("train.gradient_checkpointing=true"), ["25%"]).devices
    assert turned.forecast == device.otherwise
    assert turned.otherwise == device.forecast


def test_a_page_for_people(plan):
    text = as_text(plan)
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "tiny: 4 MoE layers, 32 experts, top-2"
    for device in plan.devices:
        assert sum(line.startswith(device.name) for line in lines) >= 1
    row = next(line for line in lines if line.startswith("10 experts"))
    assert "2-3 of 8" in row
    assert "\x1b" not in text


def test_what_a_budget_does_not_say(plan):
    def told(**changes):
        model = plan.config.model.model_copy(update={"name": "/a/folder"} | changes.pop("model", {}))
        method = plan.config.method.model_copy(update=changes)
        return as_text(replace(plan, config=plan.config.model_copy(update={"method": method, "model": model})))

    assert "safetensors checkpoint" in as_text(plan)  # the tiny model is made in memory
    assert "safetensors checkpoint" not in told()
    assert "ignores budgets" in told(residency="all")
    assert "ignores budgets" not in told()


def test_what_comes_after_the_last_round(plan):
    def told(**changes):
        evaluation = plan.config.evaluation.model_copy(update=changes)
        return " ".join(
            as_text(replace(plan, config=plan.config.model_copy(update={"evaluation": evaluation}))).split()
        )

    steps = 2 * plan.config.train.steps
    assert "after the run" not in told()
    assert f"{steps} steps more for itself; this takes about as long as 2 rounds" in told(tune_steps=steps)
    assert f"the {plan.config.clients.count} sites train again, each by itself" in told(alone=True)


def test_json_holds_everything(plan):
    tree = json.loads(to_json(plan))
    assert (tree["num_experts"], tree["top_k"], tree["smallest"], tree["margin"]) == ([8] * 4, [2] * 4, 8, MARGIN)
    for device, told in zip(plan.devices, tree["devices"], strict=True):
        forecast = told["forecast"]
        assert (told["budget"], told["fits"]) == (device.budget, device.fits)
        assert sum(forecast["kinds"].values()) == forecast["peak"] == device.forecast.peak
        assert told["needed_bytes"] == round(forecast["highest"] * MARGIN) + forecast["beside"]
        assert told["deadlines"][1]["deadline_s"] == 1e9
    assert tree["devices"][4]["change"] is None


def test_what_is_no_budget():
    for text, expected in (("4 bananas", "4 bananas"), ("0", "at least one expert"), ("0.5", "expected a share")):
        with pytest.raises(UserError, match=expected):
            plan_for(config(), [text])


def test_presets_have_their_sources():
    text = presets.as_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    joined = " ".join(text.split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.title}. {preset.source}" in joined
    assert set(json.loads(presets.to_json())) == set(PRESETS)


def test_speeds_in_words():
    assert presets.human_flops(46.08e9) == "46.1 GFLOP/s"
    assert presets.human_flops(0.9996e12) == "1.0 TFLOP/s"
    assert presets.human_flops(24.774e12) == "24.8 TFLOP/s"


def test_tables_are_broken_between_columns():
    head, rows = ["kind", "first", "2nd", "3rd"], [["a", "1", "22", "333"]]
    assert table(head, rows) == ["kind  first  2nd  3rd", "a         1   22  333"]
    assert tables(head, rows, width=17) == [
        ["kind  first  2nd", "a         1   22"],
        ["kind  3rd", "a     333"],
    ]
    assert [len(part[0].split()) for part in tables(head, rows, width=1)] == [2, 2, 2]  # one column at least
