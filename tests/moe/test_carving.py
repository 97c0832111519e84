"""Carving from a checkpoint: outputs, gradients and statistics of the whole model, and only what is resident."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hfedmoe.moe import payload
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.moe.weights.shards import CheckpointError, Shards
from hfedmoe.moe.weights.skeleton import empty_model, fill
from tests.families.table import CORE, FAMILIES, build, inputs

CPU = torch.device("cpu")


def saved(family, folder, hub_layout=True, **changes):
    """A tiny model, written in several shards."""
    model = build(family, **changes)
    model.save_pretrained(folder, save_original_format=hub_layout, max_shard_size="60KB")
    return model.eval()


def opened(folder, dtype=torch.float32, expert_dtype="same", **options):
    """The same model with its experts still on disk."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = empty_model(auto, config, dtype, attn_implementation="eager")
    return MoEModel(model, store=fill(model, Shards(folder), dtype, expert_dtype, CPU), **options)


def some_experts(model, extra, seed):
    """bool [E] per layer: top-k experts and `extra` more in the first layer, `extra + 1` in the next, ..."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for layer in model.layers:
        mask = torch.zeros(layer.num_experts, dtype=torch.bool)
        mask[torch.randperm(layer.num_experts, generator=generator)[: layer.top_k + extra + layer.index % 2]] = True
        masks.append(mask)
    return masks


def gradients(model, batch):
    """The loss, and the gradient of everything that has one."""
    loss = model.model(**batch).logits.float().pow(2).mean()
    parameters = model.parameters()
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize(
    ("family", "experts", "hub_layout"),
    [(family, "lora", True) for family in FAMILIES]
    + [
        (family, experts, hub) for family in CORE for experts, hub in (("full", True), ("lora", False), ("full", False))
    ],
)
def test_a_carved_model_is_the_masked_one(family, experts, hub_layout, tmp_path):
    whole = MoEModel(saved(family, tmp_path, hub_layout), experts=experts)
    carved = opened(tmp_path, experts=experts)
    batch = inputs(whole.model)
    for round in range(2):
        resident = some_experts(whole, extra=1 - round, seed=round)
        whole.set_resident(resident)
        carved.set_resident(resident)
        assert len(carved.store) == sum(int(mask.sum()) for mask in resident)
        sent = payload.extract(whole, resident)
        if experts == "lora":
            generator = torch.Generator().manual_seed(round)
            for name, tensor in sent.items():
                if name.startswith("experts"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        payload.load(whole, sent, resident)
        payload.load(carved, sent, resident)
        (loss, expected), (carved_loss, found) = gradients(whole, batch), gradients(carved, batch)
        assert torch.equal(loss, carved_loss)
        assert len(expected) == len(found) > len(whole.layers)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        update, carved_update = payload.extract(whole, resident), payload.extract(carved, resident)
        assert update.keys() == carved_update.keys()
        assert all(torch.equal(update[name], carved_update[name]) for name in update)
        live = payload.extract(carved, resident, live=True)
        assert all(torch.equal(update[name], live[name]) for name in update)
        own = {tensor.data_ptr() for state in carved.states for tensor in state.trained.stacks.values()}
        assert all(live[name].data_ptr() in own for name in live if name.startswith("experts"))  # no copy
        assert not any(carved_update[name].data_ptr() in own for name in live)


@pytest.mark.parametrize("family", CORE)
def test_streaming_shows_what_the_whole_model_shows(family, tmp_path):
    """Statistics of every layer are equal to the last bit, though at most three experts are in memory."""
    whole = MoEModel(saved(family, tmp_path))
    carved = opened(tmp_path)
    batch = inputs(whole.model)
    watched = TokenMasks(batch["attention_mask"])
    if whole.config.is_encoder_decoder:
        watched = TokenMasks(torch.ones_like(batch["decoder_input_ids"]), batch["attention_mask"])
    held = []
    read = carved.store.source.read
    carved.store.source.read = lambda *key: (held.append(len(carved.store)), read(*key))[1]
    whole.watch(watched)
    carved.watch(watched)
    with torch.no_grad():
        expected = whole.model(**batch).logits
        with carved.streaming(3):
            assert torch.equal(carved.model(**batch).logits, expected)
    assert max(held) <= 2  # before one more is read
    for ours, theirs in zip(carved.routing, whole.routing, strict=True):
        assert torch.equal(ours.evidence.g, theirs.evidence.g)
        assert torch.equal(ours.evidence.routed, theirs.evidence.routed)
        assert torch.equal(ours.tokens, theirs.tokens)


def test_only_the_difference_is_read(tmp_path):
    saved("olmoe", tmp_path)
    model = opened(tmp_path)
    first = some_experts(model, extra=1, seed=0)
    second = [mask.clone() for mask in first]
    new, old = int((~first[1]).nonzero()[0]), int(first[1].nonzero()[0])
    second[1][new], second[1][old] = True, False
    model.set_resident(first)
    kept = {key: id(tensors) for key, tensors in model.store._held.items()}
    reads = model.store.reads
    model.set_resident(second)
    assert model.store.reads == reads + 1
    assert {key: id(tensors) for key, tensors in model.store._held.items() if key != (1, new)} == {
        key: value for key, value in kept.items() if key != (1, old)
    }
    with model.streaming(2):
        model.model(**inputs(model.model))
        assert len(model.store) == 2
    assert model.store.present == [mask.nonzero()[:, 0].tolist() for mask in second]
    assert len(model.store) == sum(int(mask.sum()) for mask in second)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precisions_are_those_of_transformers(family, dtype, tmp_path):
    """Some families keep some tensors in float32 whatever the rest is."""
    saved(family, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    carved = opened(tmp_path, dtype=dtype, router=False)  # trained routers become float32
    ours = carved.model.state_dict()
    layers = [f"{layer.name}." for layer in carved.layers]
    for name, tensor in expected.state_dict().items():
        if ".experts." in name and any(name.startswith(layer) for layer in layers):
            continue
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    buffers = dict(carved.model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())


@pytest.mark.parametrize("expert_dtype", ["bfloat16", "8bit", "4bit"])
def test_experts_may_be_held_smaller_than_the_rest(expert_dtype, tmp_path):
    model = saved("olmoe", tmp_path)
    plain, small = opened(tmp_path), opened(tmp_path, expert_dtype=expert_dtype)
    everything = [torch.ones(layer.num_experts, dtype=torch.bool) for layer in plain.layers]
    plain.set_resident(everything)
    small.set_resident(everything)
    assert small.store.nbytes < plain.store.nbytes * {"bfloat16": 0.51, "8bit": 0.28, "4bit": 0.16}[expert_dtype]
    batch = inputs(model)
    with torch.no_grad():
        expected, found = plain.model(**batch).logits, small.model(**batch).logits
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < {"bfloat16": 0.01, "8bit": 0.05, "4bit": 0.5}[expert_dtype]
    _, grads = gradients(small, batch)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_routers_learn_in_a_carved_model(tmp_path):
    saved("mixtral", tmp_path)
    assert opened(tmp_path).router_gradient_problem() is None


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda folder: next(iter(folder.glob("*-00002-*"))).unlink(), "no such file, though the checkpoint's index"),
        (lambda folder: cut(next(iter(folder.glob("*-00002-*")))), "it is damaged or cut off"),
        (lambda folder: next(iter(folder.glob("*-00002-*"))).write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda folder: point_outside(folder), "names files outside its folder"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not an index"),
    ],
)
def test_damaged_checkpoints_are_named(damage, complaint, tmp_path):
    saved("mixtral", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=complaint):
        Shards(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    saved("mixtral", tmp_path, num_hidden_layers=1)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.layer_types = None
    model = empty_model(AutoModelForCausalLM, config, torch.float32)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no model\.layers\.1\..* and \d+ more"):
        fill(model, Shards(tmp_path), torch.float32, "same", CPU)


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def point_outside(folder):
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"] = {name: f"../{file}" for name, file in tree["weight_map"].items()}
    index.write_text(json.dumps(tree))


PEAK = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.weights.shards import Shards
from hfedmoe.moe.weights.skeleton import empty_model, fill

def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024

folder = Path(sys.argv[1])
torch.set_num_threads(1)
shards = Shards(folder)
config = AutoConfig.from_pretrained(folder)
empty_model(AutoModelForCausalLM, config, torch.float32)  # imports the family
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
model = empty_model(AutoModelForCausalLM, config, torch.float32)
moe = MoEModel(model, experts="frozen", store=fill(model, shards, torch.float32, "same", torch.device("cpu")))
moe.set_resident([torch.arange(layer.num_experts) < 4 for layer in moe.layers])
held = sum(p.nbytes for p in model.parameters() if not p.is_meta) + moe.store.nbytes
print(json.dumps({"grown": status("VmHWM") - before, "held": held,
                  "largest": max(entry.nbytes for entry in shards.entries.values()),
                  "all": sum(entry.nbytes for entry in shards.entries.values())}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_the_sub_model_and_one_tensor(tmp_path):
    """Measured by the operating system, in a process of its own."""
    model = build("mixtral", vocab_size=20_000, hidden_size=256, intermediate_size=1024, num_local_experts=16)
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    del model
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["all"] > 1.9 * seen["held"] > 100_000_000
    assert seen["grown"] < seen["held"] + seen["largest"] + 8_000_000  # the rest: Python's own objects, stacks
