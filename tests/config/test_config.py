"""The configuration: ranges, overrides, suggestions, shipped files, and its page in the docs."""

import runpy
from pathlib import Path

import pytest

from hfedmoe.config import RunConfig, Section, config_from_tree, load_config
from hfedmoe.config.budgets import in_experts
from hfedmoe.config.builtin import load_named, shipped_config
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import START

ROOT = Path(__file__).parents[2]


def refused(tree) -> str:
    with pytest.raises(UserError) as error:
        config_from_tree(tree, "here")
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"train": {"lr": 0}}, "train.lr: "),
        ({"train": {"lr": "fast"}}, "train.lr: "),
        ({"train": {"rank": 1.5}}, "train.rank: "),
        ({"seed": -1}, "seed: "),
        ({"name": "a/b"}, "name: "),
        ({"train": 3}, "train: "),
        ({"model": {"dtype": "int8"}}, "model.dtype: "),
        ({"model": {"upcycle": {"experts": 4, "top_k": 5}}}, "top_k=5 is more than experts=4"),
        ({"data": {"template": "no place"}}, "must contain {text} exactly once"),
        ({"data": {"format": "pica"}}, "'piqa', 'hellaswag', 'mmlu'"),
        ({"method": {"expert_weight": "all"}, "train": {"lora": "exact"}}, 'set train.lora = "factors"'),
        ({"data": {"clients": ["a.csv"]}}, "data.clients names 1 files but clients.count is 8"),
        ({"clients": {"budgets": []}}, "clients.budgets: "),
        ({"clients": {"budgets": ["0%"]}}, '"0%"'),
        ({"clients": {"budgets": ["101%"]}}, '"101%"'),
        ({"clients": {"budgets": [0.25]}}, 'write a share as text ("25%")'),
        ({"clients": {"budgets": [0]}}, "at least one expert"),
        ({"clients": {"activation": "half"}}, '"half"'),
        ({"federation": {"clients_per_round": 9}}, "more than clients.count=8"),
        ({"federation": {"min_clients": 9}}, "more than the 8 clients of a round"),
        ({"train": {"lr": -1, "rank": 0}}, "(and 1 more)"),
    ],
)
def test_bad_values_are_named(tree, expected):
    text = refused(tree)
    assert text.startswith("here: ")
    assert expected in text


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(START + b"\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"^config .*my.toml: is a Git LFS pointer, .*; run `git lfs pull`"):
        load_config(path)


def test_unknown_keys_come_with_a_suggestion():
    assert "train.learning_rate: unknown key; known: experts, rank" in refused({"train": {"learning_rate": 1}})
    assert "did you mean batch_size?" in refused({"train": {"batchsize": 1}})
    assert "did you mean federation?" in refused({"federaton": {}})
    assert "did you mean top_k?" in refused({"model": {"upcycle": {"topk": 1}}})


def test_overrides():
    config = load_config(
        None,
        [
            "train.lr=1e-3",
            "model.name=smollm2",  # a bare word is text
            'clients.budgets=["25%", 16]',
            "model.upcycle.experts=4",
            "train.router = false",
            "train.lr=5e-4",  # the last one holds
        ],
    )
    assert (config.train.lr, config.model.name, config.train.router) == (5e-4, "smollm2", False)
    assert config.clients.budgets == ["25%", 16]
    assert config.model.upcycle.experts == 4


@pytest.mark.parametrize("override", ["train.lr", "=3", "train..lr=3"])
def test_overrides_need_a_key_and_a_value(override):
    with pytest.raises(UserError, match=r"expected section\.key=value"):
        load_config(None, [override])


def test_overrides_through_a_value():
    with pytest.raises(UserError, match="lr is a value, not a section"):
        load_config(None, ["train.lr=1", "train.lr.x=2"])


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("seed = 3\n[train]\nrank = 4\n")
    config = load_config(file, ["train.rank=2"])
    assert (config.seed, config.train.rank) == (3, 2)


def test_unset_and_versions(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('unset = ["data.test_rows", "train.max_grad_norm"]\n[versions]\npython = "1"\n')
    config = load_config(file)
    assert config.data.test_rows is None
    assert config.train.max_grad_norm is None
    with pytest.raises(UserError, match="seed is not a section"):
        load_config(None, ["seed=1", 'unset=["seed.x"]'])


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path, expected in ((tmp_path, "is a folder; name a"), (tmp_path / "binary.toml", "not text in UTF-8")):
        with pytest.raises(UserError, match=expected):
            load_config(path)


@pytest.mark.parametrize(
    ("budget", "total", "experts"),
    [("25%", 240, 60), ("100%", 7, 7), ("0.1%", 32, 1), ("33.3%", 32, 11), (12, 32, 12), (50, 32, 32)],
)
def test_budgets_in_experts(budget, total, experts):
    assert in_experts(budget, total) == experts


# the files that ship


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    assert load_config(path).clients.count >= 1


def test_a_folder_does_not_hide_a_shipped_config_but_a_file_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_named(Path("tiny"), None).model.name == "tiny"
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text('name = "mine"')
    assert load_named(Path("tiny"), None).name == "mine"


def test_the_demo_is_what_it_says():
    config = load_config(shipped_config("demo"))
    assert (config.model.name, config.model.upcycle) == ("smollm2-domains", None)
    assert config.clients.count == len(config.clients.budgets) == 8
    assert set(config.clients.budgets) == {"25%", "50%", "100%"}


# the docs


def test_every_setting_is_described():
    def check(model: type[Section], path: str) -> None:
        for name, field in model.model_fields.items():
            candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
            inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
            if inner is not None:
                check(inner, f"{path}{name}.")
            else:
                assert field.description, f"{path}{name} has no description"

    check(RunConfig, "")


def test_the_page_of_settings_is_up_to_date():
    tool = runpy.run_path(str(ROOT / "tools" / "config_docs.py"))
    assert tool["TARGET"].read_text(encoding="utf-8") == tool["page"](), "run tools/config_docs.py"
