"""The tracker against hand-made functions, and the rehearsed step against the real one."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from hfedmoe.data.encoding import Batch
from hfedmoe.data.losses import answer_loss
from hfedmoe.device.rehearsal import rehearse
from hfedmoe.device.trace import Trace
from hfedmoe.device.workload import Workload
from hfedmoe.moe.model import MoEModel
from tests.families.table import config_of

KB = 1024


def _chain(x: torch.Tensor) -> torch.Tensor:
    a = x + 1  # 1 KB
    b = torch.cat([a, a])  # 2 KB
    del a
    c = b[:256] * 2  # 1 KB, while b is there; the slice is a view
    del b
    return c.view(16, 16)


@pytest.mark.parametrize("fake", [False, True])
def test_every_storage_counts_once_from_its_making_to_its_end(fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        x = torch.zeros(256)
        with Trace([x]) as trace:
            kept = _chain(x)
        timeline = trace.timeline()
        assert timeline.delta.tolist() == [KB, 2 * KB, -KB, KB, -2 * KB]
        assert timeline.peak() == {"activations": 3 * KB}
        del kept
        assert trace.timeline().delta.tolist()[-1] == -KB  # given back with its last view


def test_views_of_outside_tensors_are_free_and_updates_in_place_too() -> None:
    weight = torch.zeros(64, 4)
    with Trace([weight]) as trace:
        weight.t().reshape(4, 64)[1:3].add_(1)
    assert trace.timeline().peak() == {}


def test_kinds_weights_and_the_moment_of_the_peak() -> None:
    weight = torch.zeros(256, requires_grad=True)
    with Trace([weight]) as trace:
        big = torch.zeros(1024)
        del big
        (weight * 2).sum().backward()
        assert weight.grad is not None
        trace.tag(weight.grad, "gradients")
    timeline = trace.timeline()
    assert timeline.peak() == {"activations": 4 * KB, "gradients": 0}
    # Ten experts instead of one: their gradients now are what matters.
    later = timeline.peak({"gradients": 10.0})
    assert later["gradients"] == 10 * KB
    assert later["activations"] < 4 * KB


def test_flops_of_products_in_place_and_into_given_memory() -> None:
    a, b, out = torch.zeros(3, 5), torch.zeros(5, 7), torch.zeros(3, 7)
    with Trace([a, b, out]) as trace:
        torch.mm(a, b, out=out)
        out.addmm_(a, b)
        a @ b
    assert sum(segment.flops for segment in trace.segments) == 3 * 2 * 3 * 5 * 7


def _structure(family: str, layers: int = 2, **changes: Any) -> Any:
    config = config_of(family, **{"num_hidden_layers": layers, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


@pytest.mark.parametrize("experts", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsed_step_holds_and_computes_what_the_real_one_does(experts: str, checkpointing: bool) -> None:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 2, "vocab_size": 300}
    workload = Workload(batch_size=6, length=40, answer_tokens=2, experts=experts, gradient_checkpointing=checkpointing)
    rehearsed = rehearse(_structure("mixtral", **size), workload)

    config = config_of("mixtral", **size)
    model = AutoModelForCausalLM.from_config(config).train()
    moe = MoEModel(model, experts=experts)
    if checkpointing:
        moe.checkpoint_activations()
    stacks = [stack for state in moe.states if state.trained for stack in state.trained.stacks.values()]
    with Trace([*model.parameters(), *model.buffers(), *stacks]) as trace:
        mask = torch.ones(6, 41, dtype=torch.int64)
        mask[0, :3] = 0  # padding: without any the attention needs no mask
        batch = Batch(torch.randint(3, 300, (6, 41)), mask, torch.ones(6, 2, dtype=torch.int64), torch.zeros(6))
        loss = answer_loss(model(**batch.model_inputs()).logits, batch)
        loss.backward()
    real, said = sum(trace.timeline().peak().values()), sum(rehearsed.step.peak().values())
    assert said == pytest.approx(real, rel=0.02)  # sorting pairs by expert takes a few KB that are not rehearsed
    assert rehearsed.flops == sum(segment.flops for segment in trace.segments)
    assert rehearsed.step.peak()["logits"] <= 6 * 2 * 300 * 4 * 3
    assert sum(rehearsed.forward.peak().values()) < said


def test_repeating_alike_layers_gives_what_running_all_of_them_does() -> None:
    family = "qwen3_moe"  # begins with a dense layer
    workload = Workload(batch_size=2, length=9)
    short, whole = (rehearse(_structure(family, layers=7), workload, reduce) for reduce in (True, False))
    assert short.flops == whole.flops
    assert sum(short.step.peak().values()) == pytest.approx(sum(whole.step.peak().values()), rel=0.005)
    assert sum(short.forward.peak().values()) == pytest.approx(sum(whole.forward.peak().values()), rel=0.005)
    heavy = {"expert_gradients": 50.0}
    assert sum(short.step.peak(heavy).values()) == pytest.approx(sum(whole.step.peak(heavy).values()), rel=0.005)
