"""The packaged model with experts by domain: what is shipped makes the model that was built, once."""

import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from hfedmoe.bases.branches import CHANGES
from hfedmoe.config import ModelConfig, RunConfig
from hfedmoe.errors import UserError
from hfedmoe.models import domains
from hfedmoe.models.digest import weights_digest
from hfedmoe.models.loading import load
from hfedmoe.models.tiny import tiny_tokenizer
from tests.bases.test_branches import build, dense

HERE = ModelConfig(name="smollm2-domains", device="cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A tiny dense model in place of SmolLM2; `built` from it, `shipped` is the file of its changes."""
    place = SimpleNamespace(
        built=tmp_path / "built",
        dense=tmp_path / "dense",
        shipped=tmp_path / "shipped.safetensors",
        cache=tmp_path / "c",
    )
    dense().save_pretrained(place.dense)
    tiny_tokenizer().save_pretrained(place.dense)
    build(place.built)
    shutil.copy(place.built / CHANGES, place.shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.cache))
    monkeypatch.setattr(domains, "smollm2_folder", lambda: place.dense)
    monkeypatch.setattr(domains, "SHIPPED", place.shipped)
    monkeypatch.setattr(domains, "SHA256", hashlib.sha256(place.shipped.read_bytes()).hexdigest())
    return place


def refused() -> str:
    with pytest.raises(UserError) as error:
        load(HERE, seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shipped_changes_make_the_model_that_was_built(place: SimpleNamespace) -> None:
    made, built = (load(ModelConfig(name=name, device="cpu"), seed=0) for name in (HERE.name, str(place.built)))
    state, wanted = made.model.state_dict(), built.model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert made.model.config.num_experts_per_tok == built.model.config.num_experts_per_tok
    assert made.tokenizer("oil")["input_ids"] == built.tokenizer("oil")["input_ids"]


def test_it_is_made_once_and_experts_can_be_read_alone(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(HERE, seed=0).model
    monkeypatch.setattr(domains, "_make", lambda *_: pytest.fail("made again"))
    store = load(HERE, seed=0, carve=True).store
    assert store is not None
    assert [path.name for path in (place.cache / "hfedmoe").glob("smollm2*")] == [domains.domains_folder().name]
    experts = whole.model.layers[2].mlp.experts
    assert torch.equal(store.source.read(0, 3)["down"], experts.down_proj[3])


def test_a_damaged_file_is_one_line_and_leaves_nothing_behind(place: SimpleNamespace) -> None:
    whole = place.shipped.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"version https://git-lfs.github.com/spec/v1"):
        place.shipped.write_bytes(damaged)
        assert refused() == f"{place.shipped}: is not the file that hfedmoe ships; install hfedmoe again"
    place.shipped.unlink()
    assert "cannot be read (No such file or directory); install hfedmoe again" in refused()
    assert list((place.cache / "hfedmoe").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, failure: OSError | str
) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_: object, **__: object) -> None:
        raise failure if isinstance(failure, OSError) else SafetensorError("I/O error: No space (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert refused() == (
        f"{place.cache / 'hfedmoe'}: cannot be written (No space left on device); free some space, then try again, or "
        "set XDG_CACHE_HOME to another folder"
    )
    assert list((place.cache / "hfedmoe").iterdir()) == []


def test_other_changes_are_another_base(place: SimpleNamespace) -> None:
    before = weights_digest(RunConfig(model=HERE))
    content = bytearray(place.shipped.read_bytes())
    content[-1] ^= 1
    place.shipped.write_bytes(content)
    assert weights_digest(RunConfig(model=HERE)) != before


def test_what_is_shipped_is_small_and_as_written_down() -> None:
    content = domains.SHIPPED.read_bytes()
    assert hashlib.sha256(content).hexdigest() == domains.SHA256
    assert domains.SHA256 in (domains.SHIPPED.parent / "README.md").read_text(encoding="utf-8")
    assert len(content) < 8e6
    with safe_open(domains.SHIPPED, "pt") as file:
        assert file.metadata() == {"top_k": "2"}
        assert file.get_slice("layers.20.gate.a").get_shape() == [7, 8, 576]
        assert file.get_slice("layers.29.router").get_shape() == [8, 576]
