"""hfedmoe from Python: what `run` takes, and what a `Run` says and gives."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hfedmoe
from hfedmoe import api
from hfedmoe.events import Silent
from hfedmoe.measure import evaluate_run

SMALL = {
    "federation.rounds": 1,
    "train.steps": 2,
    "data.test_rows": 20,
    "data.train_rows": 120,
    "clients.count": 2,
    "train.loss": "choices",
    "threads": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> hfedmoe.Run:
    return hfedmoe.run("tiny", SMALL, out=tmp_path_factory.mktemp("api") / "run", progress=False)


def test_importing_is_cheap():
    code = """
import sys
import hfedmoe
assert {"run", "open_run", "Run"} <= set(dir(hfedmoe))
heavy = {"torch", "transformers", "flwr", "pydantic", "numpy", "rich"} & sys.modules.keys()
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_names_are_there_and_no_others():
    for name in hfedmoe.__all__:
        assert getattr(hfedmoe, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hfedmoe.nothing  # noqa: B018


def test_the_settings_may_have_any_form(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('seed = 3\n[data]\nsource = "rows.csv"\n[train]\nlr = 1e-2\n')
    of_file = api.settings_of(file, {"train.lr": 0.5, "data.test_rows": None})
    assert (of_file.seed, of_file.train.lr, of_file.data.test_rows) == (3, 0.5, None)
    tree = {"seed": 3, "data": {"source": Path("rows.csv")}}
    of_tree = api.settings_of(tree, {"train.lr": 0.5, "data.test_rows": None})
    assert of_tree == of_file
    assert tree == {"seed": 3, "data": {"source": Path("rows.csv")}}
    assert api.settings_of(of_file) == of_file
    assert api.settings_of("tiny").name == "tiny"


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("gone.toml", {}, "config gone.toml: no such file"),
        ({"train": {"learning_rate": 1}}, {}, "config: train.learning_rate: unknown key"),
        ({}, {"train.lr": "fast"}, "config: train.lr"),
        ({"seed": 1}, {"seed.more": 1}, "seed is a value, not a section"),
        ("tiny", {"data.source": "gone.csv"}, "gone.csv: no such file"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, monkeypatch, config, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hfedmoe.UserError, match=re.escape(message)):
        hfedmoe.run(config, overrides, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_run_says_what_happened(finished):
    assert [line["round"] for line in finished.metrics] == [0, 1]
    assert finished.metrics[-1]["accuracy"] is not None
    assert len(finished.metrics[-1]["clients"]) == 2
    assert finished.config.train.steps == 2
    experts = finished.experts
    assert (experts.rounds.tolist(), experts.clients.tolist()) == ([1, 1], [0, 1])
    for array, kind in ((experts.held, bool), (experts.trained, bool), (experts.usage, np.float32)):
        assert (array.shape, array.dtype) == ((2, 4, 8), kind)
    assert experts.held.sum(axis=(1, 2)).tolist() == [8, 16]  # 25 % and 50 % of 32
    assert not (experts.trained & ~experts.held).any()
    assert np.allclose(experts.usage.sum(axis=2), 1, atol=1e-4)
    assert finished.report.read_text(encoding="utf-8").startswith("<!")
    assert re.fullmatch(r"<Run .*run: 1 of 1 rounds, accuracy .* %, macro-F1 .*, loss .*>", repr(finished))
    assert hfedmoe.open_run(str(finished.path)).metrics == finished.metrics


def test_its_model_is_that_of_the_checkpoint(finished):
    model = finished.model()
    assert type(model).__module__.startswith("transformers.")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # The same accuracy as `hfedmoe evaluate`, from the merged weights and the probabilities of single texts.
    from hfedmoe.data.tasks import load_watched_task

    config = finished.config
    task, _ = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
    found = finished.predict([row.text for row in task.test])
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found)
    right = sum(next(iter(shares)) == task.labels[row.answer] for shares, row in zip(found, task.test, strict=True))
    assert right / len(task.test) == evaluate_run(finished.path, "best", Silent()).accuracy
    with pytest.raises(hfedmoe.UserError, match="no checkpoint of round 7"):
        finished.model(7)
    assert finished.predict([]) == []
    with pytest.raises(hfedmoe.UserError, match="a text is empty"):
        finished.predict([" "])


def test_a_run_that_ended_is_resumed_at_once(finished):
    again = hfedmoe.resume(finished.path, progress=False)
    assert again.metrics[-1]["accuracy"] == finished.metrics[-1]["accuracy"]


def test_wrong_folders_are_refused(tmp_path):
    for call in (hfedmoe.open_run, hfedmoe.resume):
        with pytest.raises(hfedmoe.UserError, match="no such run folder"):
            call(tmp_path / "gone")


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", str(hfedmoe.run.__doc__), re.DOTALL)
    exec("\n".join(line.strip() for line in code.splitlines()), {})
    accuracies, experts, report = capsys.readouterr().out.splitlines()
    assert all(0 <= float(share) <= 1 for share in accuracies.split(" ", 1))
    assert experts.endswith("experts trained by each client")
    assert Path(report).is_file()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, finished):
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(finished.path.parent)
    for code in shown:
        code = code.replace("runs/2026-11-22-r8-hfedmoe", str(finished.path))
        if "hfedmoe.run(" in code:  # a run takes too long here: only its settings are checked
            code = re.sub(r"hfedmoe\.run\(", "settings_of(", code).replace(', out="first"', "")
        exec(code, {"settings_of": api.settings_of, "hfedmoe": hfedmoe, "run": finished})
