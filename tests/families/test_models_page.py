"""The list of models: complete, up to date, and what is refused is refused by name."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from hfedmoe.cli import main
from hfedmoe.moe.anatomy import find_moe_layers
from hfedmoe.moe.families import UNSUPPORTED
from tests.families.table import FAMILIES, config_of

SMALL: dict[str, dict[str, Any]] = {
    "dbrx": {"n_layers": 2, "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 4}},
    "doge": {"num_hidden_layers": 2, "is_moe": True},
    "jetmoe": {"num_hidden_layers": 2},
    "nllb-moe": {"encoder_layers": 2, "decoder_layers": 2},
    "zaya": {"num_hidden_layers": 2},
}
"""Settings that make a model with few layers, with experts where these are an option."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "models_docs.py"))


def test_every_moe_type_of_the_installed_transformers_is_tested_or_refused(tool: dict[str, Any]) -> None:
    assert sorted([*FAMILIES, *UNSUPPORTED, *tool["loaded_as"]()]) == tool["moe_types"]()


def test_types_with_more_than_text_are_loaded_as_the_tested_type_of_their_text(tool: dict[str, Any]) -> None:
    aliases = tool["loaded_as"]()
    assert aliases["llama4"] == "llama4_text"
    for family, text in aliases.items():
        small = config_of(text, hidden_size=CONFIG_MAPPING[text]().hidden_size)  # other parts are made for this width
        config = CONFIG_MAPPING[family](text_config=small.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            tested = AutoModelForCausalLM.from_config(small)
        ours, theirs = find_moe_layers(model), find_moe_layers(tested)
        assert ours
        assert [type(layer.block) for layer in ours] == [type(layer.block) for layer in theirs]


def test_docs_models_is_up_to_date(tool: dict[str, Any]) -> None:
    assert tool["TARGET"].read_text(encoding="utf-8") == tool["page"](), "run tools/models_docs.py"


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("family", UNSUPPORTED)
def test_an_unsupported_family_is_refused_by_name(
    family: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG_MAPPING[family](**SMALL.get(family, {}))
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([command, *(["--model"] if command == "plan" else []), str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{family}: {UNSUPPORTED[family]}" in " ".join(error.split())
    assert "upcycle" not in error


def test_nllb_is_refused_for_a_reason() -> None:
    """Its forward in transformers runs two experts only; when this fails, the family can be supported."""
    config = CONFIG_MAPPING["nllb-moe"](d_model=16, num_experts=4, moe_token_dropout=0.0)
    block = NllbMoeSparseMLP(config, 24)
    ran = set()
    for name, expert in block.experts.named_children():
        expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 16)
    block(hidden)
    chosen = block.router(hidden.view(-1, 16))[1].sum(0) > 0
    assert chosen.all()
    assert ran - {"token_dropout"} == {"expert_0", "expert_1"}
