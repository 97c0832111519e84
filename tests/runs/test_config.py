"""The settings of a run come back as they were."""

import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.config import ClientsConfig, DataConfig, RunConfig, TrainConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import START
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.settings import END, read_run_config
from tests.runs.conftest import CONFIG


def test_config_round_trip_with_versions_and_seed(run):
    assert RunFolder.open(run.path).config == CONFIG
    tree = tomllib.loads((run.path / "config.toml").read_text())
    assert tree["seed"] == 0
    assert set(tree["versions"]) == {"python", "torch", "transformers", "peft", "flwr", "hfedmoe"}


def test_none_is_kept_where_the_default_is_not_none(tmp_path):
    config = RunConfig(data=DataConfig(test_rows=None), train=TrainConfig(max_grad_norm=None))
    RunFolder.create(tmp_path / "run", config).close()
    assert (
        'unset = [\n    "data.test_rows",\n    "train.max_grad_norm",\n]' in (tmp_path / "run/config.toml").read_text()
    )
    assert read_run_config(tmp_path / "run/config.toml") == config


@given(
    words=st.none() | st.dictionaries(st.text(min_size=1), st.text(), max_size=3),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    budgets=st.lists(st.integers(1, 99) | st.sampled_from(["25%", "12.5 %"]), min_size=1, max_size=4),
    rows=st.none() | st.integers(1, 10**9),
)
@settings(max_examples=30, deadline=None)
def test_any_config_comes_back(words, lr, budgets, rows):
    config = RunConfig(
        data=DataConfig(label_words=words, test_rows=rows, train_rows=rows),
        train=TrainConfig(lr=lr),
        clients=ClientsConfig(budgets=budgets),
    )
    with tempfile.TemporaryDirectory() as folder:
        RunFolder.create(Path(folder, "run"), config).close()
        assert RunFolder.open(Path(folder, "run")).config == config


def test_a_config_that_was_cut_anywhere_is_noticed(run):
    path = run.path / "config.toml"
    whole = path.read_text()
    for cut in range(0, len(whole) - len(END) // 2, 97):
        path.write_text(whole[:cut])
        with pytest.raises(UserError, match=r"cut off|not valid TOML"):
            read_run_config(path)


def test_other_versions_are_a_warning(run, caplog):
    path = run.path / "config.toml"
    path.write_text(
        path.read_text().replace("[versions]\n", '[versions]\nold = "1"\n').replace("flwr = ", 'flwr = "0"#')
    )
    assert read_run_config(path) == CONFIG
    assert "old 1 (here none), flwr 0 (here" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run folder"),
        ("a = = 1", "not valid TOML"),
        (f"{START.decode()}\noid sha256:0\nsize 9\n", "config.toml: is a Git LFS pointer.*run `git lfs pull`"),
        ("", "is empty or cut off"),
        ('seed = 1\n[versions]\npython = "3"\n', "is empty or cut off"),
        ("\xff", "not valid TOML"),
        (f"seed = -1\n{END}", "seed: "),
        (f"sead = 1\n{END}\n", "sead: unknown key; did you mean seed?"),
        (f'unset = ["seed.x"]\nseed = 1\n{END}', "seed is not a section"),
    ],
)
def test_open_refuses_what_is_not_a_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_open_refuses_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.open(tmp_path / "none")
