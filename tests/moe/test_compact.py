"""16-bit weights with float32 arithmetic: exact outputs, half the memory; and what is trained is float32."""

import copy

import pytest
import torch
from pydantic import ValidationError

from hfedmoe.config import ModelConfig
from hfedmoe.moe import compact
from hfedmoe.moe.compact import compute_in_float32
from hfedmoe.moe.model import MoEModel
from tests.families.table import CORE, build, inputs


def rounded(family, dtype):
    """The same weights, in bfloat16 and as float32 with the same values."""
    model = build(family).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.float()
    model.config.dtype = dtype
    return model, exact


@pytest.mark.parametrize("family", CORE)
def test_outputs_and_gradients_are_those_of_float32(family):
    small, exact = rounded(family, torch.bfloat16)
    compute_in_float32(small)
    held = sum(p.nbytes for p in small.parameters())
    assert held < 0.6 * sum(p.nbytes for p in exact.parameters())
    ours, reference = MoEModel(small), MoEModel(exact)
    batch = inputs(small)
    found, expected = ours.model(**batch).logits, reference.model(**batch).logits
    assert found.dtype == torch.float32
    # T5's feed-forward block casts what it passes on to the precision of its weights.
    tolerance = 5e-3 if family == "switch_transformers" else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    found.pow(2).mean().backward()
    expected.pow(2).mean().backward()
    assert sum(p.nbytes for p in small.parameters() if p.dtype == torch.bfloat16) > 0.8 * held
    for ours_now, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert (ours_now.grad is None) == (theirs.grad is None)
        if ours_now.grad is not None:
            torch.testing.assert_close(ours_now.grad, theirs.grad, rtol=0.02, atol=tolerance)


def test_a_large_matrix_is_cast_in_blocks(monkeypatch):
    small, _ = rounded("olmoe", torch.bfloat16)
    compute_in_float32(small)
    small = MoEModel(small, router=False).model
    batch = inputs(small)
    embedded = small.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    whole = small(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(whole.sum(), embedded)
    monkeypatch.setattr(compact, "BLOCK_ELEMENTS", 7 * 32)  # seven rows of the head at a time
    blocks = small(inputs_embeds=embedded).logits
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.sum(), embedded)[0], gradient, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("family", CORE)
def test_what_is_trained_in_a_16_bit_model_is_float32(family):
    model, _ = rounded(family, torch.bfloat16)
    batch = inputs(model)
    expected = model(**batch).logits.float()
    moe = MoEModel(model, attention=True)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.float32}
    found = moe.model(**batch).logits
    assert found.dtype == torch.bfloat16
    # Experts of equal rank may swap places when routers no longer round: only the family with the flattest one does.
    assert (found.float() - expected).norm() < (0.2 if family == "gpt_oss" else 0.02) * expected.norm()
    found.float().pow(2).mean().backward()
    assert all(bool(router.grad.isfinite().all()) for router in moe.routers.values())
    with torch.no_grad():
        before = {name: router.clone() for name, router in moe.routers.items()}
        for router in moe.routers.values():
            router += 1e-6  # lost in bfloat16
    assert all(not torch.equal(router, before[name]) for name, router in moe.routers.items())


@pytest.mark.parametrize(
    ("machine", "flags", "dtype", "expected"),
    [
        ("x86_64", "flags\t: fpu avx2 avx512f", torch.bfloat16, False),
        ("x86_64", "flags\t: fpu avx512_bf16", torch.bfloat16, True),
        ("x86_64", "flags\t: fpu avx512_bf16", torch.float16, False),
        ("aarch64", "Features\t: fp asimd bf16", torch.bfloat16, True),
        ("aarch64", "Features\t: fp asimd", torch.bfloat16, False),
        ("x86_64", "flags\t: fpu", torch.float32, True),
    ],
)
def test_processors_say_what_they_multiply(machine, flags, dtype, expected, monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(compact, "CPUINFO", cpuinfo)
    monkeypatch.setattr(compact.platform, "machine", lambda: machine)
    assert compact.multiplies_16_bit(torch.device("cpu"), dtype) is expected


@pytest.mark.parametrize(("capability", "multiplies"), [(None, True), ((7, 5), False), ((8, 0), True)])
def test_accelerators_multiply_16_bit_from_ampere_on(capability, multiplies, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    here = capability is not None
    assert compact.multiplies_16_bit(torch.device("cuda"), torch.bfloat16, here) is multiplies
    assert compact.wants_float32("auto", torch.device("cuda"), torch.bfloat16, here) is not multiplies


def test_float16_is_for_storage():
    assert compact.wants_float32("auto", torch.device("cuda"), torch.float16)
    with pytest.raises(ValidationError, match="gradients vanish in float16"):
        ModelConfig(dtype="float16", compute="same")
    assert ModelConfig(dtype="float16").compute == "auto"
