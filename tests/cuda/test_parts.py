"""Models that are not whole: carved from a checkpoint, with merged experts, and with experts of a client's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hfedmoe.moe import payload
from hfedmoe.moe.experts.merged import Mixture
from hfedmoe.moe.experts.own import OwnKind
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.weights.shards import Shards
from hfedmoe.moe.weights.skeleton import empty_model, fill
from tests.cuda.comparing import FLOAT32, assert_near, assert_same_bits, is_nonzero
from tests.cuda.steps import ALPHA, CPU, RANK, batch_for, fill_adapters, stepped, wrapped
from tests.families.table import build


def carved(folder: Path, device: torch.device, **options: Any) -> MoEModel:
    """A model whose experts are read from a checkpoint when they are needed."""
    model = empty_model(
        AutoModelForCausalLM, AutoConfig.from_pretrained(folder), torch.float32, attn_implementation="eager"
    )
    return MoEModel(model, store=fill(model, Shards(folder), torch.float32, "same", device), rank=RANK, **options)


def some(model: MoEModel) -> list[Tensor]:
    """Top-k experts of every layer and one more."""
    return [torch.arange(layer.num_experts) >= layer.num_experts - layer.top_k - 1 for layer in model.layers]


def sent(folder: Path, resident: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """What a server would send for these experts: pairs that change the model, on the CPU."""
    whole = MoEModel(build("mixtral"), rank=RANK, **options)
    fill_adapters(whole)
    return payload.pack(payload.global_tensors(whole), resident)


@pytest.mark.parametrize("experts", ["lora", "full"])
def test_a_carved_model_with_tensors_from_the_wire(experts: str, tmp_path: Path, device: torch.device) -> None:
    build("mixtral").save_pretrained(tmp_path)
    results, updates = [], []
    for where in (device, CPU):
        model = carved(tmp_path, where, experts=experts)
        for _ in range(2):  # the second time, other experts are read and some dropped
            resident = some(model)
            model.set_resident([keep.roll(1) for keep in resident])
            model.set_resident(resident)
        received = sent(tmp_path, resident, experts=experts)
        payload.load(model, received, resident)
        assert_same_bits(payload.extract(model, resident), received)
        results.append(stepped(model, batch_for(model)))
        updates.append(payload.extract(model, resident))
    assert is_nonzero([value for name, value in results[1].items() if ".up" in name])
    assert_near(results[0], results[1], FLOAT32)
    assert {tensor.device for tensor in updates[0].values()} == {device}


def test_a_carved_model_streams_its_experts(tmp_path: Path, device: torch.device) -> None:
    build("mixtral").save_pretrained(tmp_path)
    logits = []
    for where in (device, CPU):
        model = carved(tmp_path, where)
        model.model.eval()
        with model.streaming(3):
            logits.append({"logits": model.model(**batch_for(model)).logits})
    assert_near(logits[0], logits[1], FLOAT32)


def test_merged_experts_stand_in_for_absent_ones(tmp_path: Path, device: torch.device) -> None:
    build("mixtral").save_pretrained(tmp_path)
    results = []
    for where in (device, CPU):
        model = carved(tmp_path, where)
        resident = some(model)
        everything = payload.global_tensors(wrapped("mixtral", CPU))
        model.set_resident(resident)
        payload.load(model, payload.pack(everything, resident), resident)
        absent = [(~keep).nonzero()[:, 0].tolist() for keep in resident]
        model.stand_in(
            [[Mixture(own[:1], [1.0]), Mixture(own[1:], [0.5] * len(own[1:]))] for own in absent], everything
        )
        results.append(stepped(model, batch_for(model)))
    assert_near(results[0], results[1], FLOAT32)


@pytest.mark.parametrize("kind", ["copy", "graft"])
def test_experts_of_a_clients_own(kind: OwnKind, device: torch.device) -> None:
    results = []
    for where in (device, CPU):
        model = MoEModel(build("mixtral").to(where), rank=RANK, alpha=ALPHA, own=kind, scales=True)
        fill_adapters(model)
        draws = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, tensor in model.own.items():
                if not name.endswith("expert"):
                    tensor.copy_(torch.randn(tensor.shape, generator=draws) * 0.2)
        for state in model.states:
            assert state.own is not None
            state.own.expert.fill_(2.0)  # begun, with expert 2
        found = stepped(model, batch_for(model))
        for layer, state in enumerate(model.states):
            assert state.own is not None
            found |= {f"grad own {layer} {n}": leaf.grad for n, leaf in enumerate(state.own.parameters())}
        found |= {f"grad {name}": scale.grad for name, scale in model.scales.items()}
        results.append(found)
    assert is_nonzero([value for name, value in results[1].items() if name.startswith("grad own")])
    assert is_nonzero([value for name, value in results[1].items() if name.startswith("grad scale")])
    assert_near(results[0], results[1], FLOAT32)
