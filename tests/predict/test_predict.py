"""`hfedmoe predict`, and that the same weights have the same score whether they are the run's or its export's."""

import csv
import json
import math
import os
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.tasks import load_task
from tests.commands import hfedmoe

LABELS = ("acq", "crude", "earn", "grain")
FORMS = ("run", "merged", "adapter", "client")
SETTINGS = [
    "data.clients=CLIENTS",
    "data.label_words={acq='merger', earn='profit'}",
    "data.template='Wire: {text}\\nIt is about'",
    "partition.min_rows=4",
    "data.test_share=0.2",
    "clients.count=2",
    "clients.budgets=['100%']",
    "federation.rounds=1",
    "train.steps=12",
    "train.loss=choices",
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two sites, everything exported of it, and rows of two of its four labels."""
    root = tmp_path_factory.mktemp("predict")
    task = load_task(DataConfig(train_rows=800), PartitionConfig(), seed=0)
    rows = [{"text": e.text, "label": task.labels[e.answer]} for e in task.train if task.labels[e.answer] in LABELS]
    sites = [written(root / f"{name}.jsonl", rows[n::3][:60]) for n, name in enumerate(("north", "south"))]
    few = [row for row in rows[2::3] if row["label"] in ("acq", "crude")][:40]
    written(root / "few.jsonl", few)
    written(root / "new.jsonl", [{"id": n, "text": row["text"]} for n, row in enumerate(few)])
    settings = [text.replace("CLIENTS", json.dumps([str(site) for site in sites])) for text in SETTINGS]
    assert hfedmoe("run", "tiny", "--out", root / "run", *(part for s in settings for part in ("--set", s))) == 0
    for form in FORMS[1:]:
        which = ("--client", 0) if form == "client" else ()
        assert hfedmoe("export", root / "run", root / form, "--as", form, *which) == 0
    for site in sites:
        site.unlink()  # what was found in them is in the run folder
    return root


def predicted(place, form, out, *options):
    assert hfedmoe("predict", place / form, place / "new.jsonl", "--out", out, *options) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_the_same_weights_have_the_same_score_from_the_run_and_from_its_exports(place, capsys):
    found = {}
    for form in FORMS:
        capsys.readouterr()
        assert hfedmoe("evaluate", place / form, "--rows", place / "few.jsonl", "--json") == 0
        found[form] = json.loads(capsys.readouterr().out)
    for form in FORMS[1:]:  # the client held every expert
        assert found[form]["accuracy"] == found["run"]["accuracy"]
        assert found[form]["macro_f1"] == found["run"]["macro_f1"]
        assert found[form]["loss"] == pytest.approx(found["run"]["loss"], abs=1e-4)
    # Among the two labels of these rows alone the score is another: that is what went wrong silently.
    few = ("evaluate", place / "merged", "--rows", place / "few.jsonl", "--json")
    two = ("--set", 'data.labels=["acq","crude"]', "--set", 'data.label_words={acq="merger"}')
    assert hfedmoe(*few, *two) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > found["run"]["accuracy"]
    # Another config's settings do not change the labels either.
    other = place / "other.toml"
    # A literal string, as that of the run: it has a backslash and an n, and no new line.
    other.write_text('[data]\nsource = "few.jsonl"\nmax_tokens = 48\n' + "template = 'Wire: {text}\\nIt is about'\n")
    assert hfedmoe(*few, "--config", other) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == found["run"]["accuracy"]
    tree = json.loads((place / "merged" / "hfedmoe.json").read_text())
    assert tree["data"]["labels"] == list(LABELS)
    assert str(place) not in (place / "adapter" / "hfedmoe.json").read_text()


def test_rows_get_labels_and_probabilities_in_every_format(place, tmp_path, capsys):
    of_run = predicted(place, "run", tmp_path / "run.jsonl")
    capsys.readouterr()
    for form in FORMS[1:]:
        for row, own in zip(predicted(place, form, tmp_path / f"{form}.jsonl"), of_run, strict=True):
            assert row["predicted"] == own["predicted"]
            assert row["p_grain"] == pytest.approx(own["p_grain"], abs=1e-5)
    assert f"{tmp_path / 'merged.jsonl'}: 40 rows (" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in (place / "new.jsonl").read_text().splitlines()]
    assert [row["text"] for row in of_run] == texts
    for number, row in enumerate(of_run):
        shares = {label: row[f"p_{label}"] for label in LABELS}
        assert row["id"] == number
        assert row["predicted"] == max(shares, key=shares.__getitem__)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert len({row["predicted"] for row in of_run}) > 1
    assert hfedmoe("predict", place / "run", tmp_path / "run.jsonl", "--out", tmp_path / "again.csv") == 2
    assert 'has a column "predicted" already' in capsys.readouterr().err
    # From CSV, and to CSV and Parquet.
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("body", "n"), *((text, n) for n, text in enumerate(texts[:5]))])
    assert hfedmoe("predict", place / "merged", tmp_path / "new.csv", "--set", "data.text=body") == 0
    with (tmp_path / "new.predicted.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["predicted"] for row in table] == [row["predicted"] for row in of_run[:5]]
    assert [row["n"] for row in table] == list("01234")
    again = tmp_path / "new.parquet"
    assert hfedmoe("predict", place / "run", tmp_path / "new.csv", "--set", "data.text=body", "--out", again) == 0
    columns = pyarrow.parquet.read_table(again).to_pydict()
    assert columns["predicted"] == [row["predicted"] for row in of_run[:5]]
    assert columns["p_acq"] == pytest.approx([row["p_acq"] for row in of_run[:5]], abs=1e-5)


def test_a_site_adds_its_own_label_shares(place, tmp_path):
    plain = predicted(place, "merged", tmp_path / "plain.jsonl")
    counts = {"acq": 5, "crude": 0, "earn": 1, "grain": 0}
    site = written(
        tmp_path / "site.jsonl", [{"text": "t", "label": label} for label, n in counts.items() for _ in range(n)]
    )
    own = predicted(place, "merged", tmp_path / "own.jsonl", "--label-shares", site)
    shares = ",".join(f"{label}={n + 1}" for label, n in counts.items())
    listed = predicted(place, "run", tmp_path / "listed.jsonl", "--label-shares", shares)
    for row, with_prior, same in zip(plain, own, listed, strict=True):
        weighted = {label: row[f"p_{label}"] * (counts[label] + 1) for label in LABELS}
        for label in LABELS:
            assert with_prior[f"p_{label}"] == pytest.approx(weighted[label] / sum(weighted.values()), abs=1e-4)
            assert same[f"p_{label}"] == pytest.approx(with_prior[f"p_{label}"], abs=1e-5)
    assert sum(row["predicted"] == "acq" for row in own) > sum(row["predicted"] == "acq" for row in plain)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_code_of_the_card_names_the_same_labels(place, tmp_path, monkeypatch, capsys, form):
    own = predicted(place, "run", tmp_path / "own.jsonl")
    monkeypatch.chdir(place / form)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert set(eval(capsys.readouterr().out.strip().splitlines()[-1])) == set(LABELS)
    for row in own[:8]:
        shares = names["classify"](row["text"])
        assert {label: shares[label] for label in LABELS} == pytest.approx(
            {label: row[f"p_{label}"] for label in LABELS}, abs=1e-4
        )


def test_whole_labels_are_compared_where_first_tokens_do_not_tell_them_apart(tmp_path, monkeypatch, capsys):
    rows = [{"text": f"the bank said oil {n}", "label": ("oil price", "oil ship")[n % 2]} for n in range(40)]
    source = written(tmp_path / "rows.jsonl", rows)
    settings = [f"data.source={source}", "federation.rounds=1", "partition.scheme=iid", "clients.count=2"]
    assert hfedmoe("run", "tiny", "--out", tmp_path / "run", *(p for s in settings for p in ("--set", s))) == 0
    assert hfedmoe("export", tmp_path / "run", tmp_path / "out") == 0
    assert hfedmoe("predict", tmp_path / "out", source, "--out", tmp_path / "p.jsonl") == 0
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["classify"](first["text"])["oil ship"] == pytest.approx(first["p_oil ship"], abs=1e-4)
    assert not math.isclose(first["p_oil ship"], 0.5, abs_tol=1e-6)


def test_wrong_requests_are_one_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, (empty, there) = place / "new.jsonl", (tmp_path / "empty", tmp_path / "there.csv")
    empty.mkdir()
    there.write_text("text\nx\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    for content, message in (("{", "is damaged"), ('{"format": 9}', "another version")):
        (broken / "hfedmoe.json").write_text(content)
        assert hfedmoe("predict", broken, new, "--out", "x.csv") == 2
        assert message in capsys.readouterr().err
    (broken / "hfedmoe.json").write_text('{"format": 1, "model": {"trust_remote_code": true}}')
    cases = [
        ([broken, new], "model.trust_remote_code has no place in it"),
        ([empty, new], "neither a run folder (no config.toml) nor an export (no hfedmoe.json)"),
        ([place / "merged", "gone.csv"], "gone.csv: no such file"),
        ([place / "merged", new, "--out", there], "exists already; choose another --out"),
        ([place / "merged", new, "--out", "x.xlsx"], "--out x.xlsx: unknown format; use one of .csv, .jsonl, .parquet"),
        ([place / "merged", new, "--out", "no/x.csv"], "there is no folder no"),
        ([place / "merged", new, "--checkpoint", "last"], "is an export, which has only one"),
        ([place / "run", new, "--checkpoint", "7"], "no checkpoint of round 7"),
        ([place / "merged", new, "--set", "train.lr=1"], "--set train.lr: a run keeps its own settings"),
        ([place / "merged", new, "--set", "data.text=body"], 'no column "body"; columns present: id, text'),
        ([place / "merged", new, "--label-shares", "gone.csv"], "--label-shares gone.csv: no such file, and no list"),
        ([place / "merged", new, "--label-shares", "acq=1"], "lacks crude, earn, grain; give every label a share"),
        ([place / "merged", new, "--label-shares", "acq=1,x=1"], '"x" is not a label of the model'),
        ([place / "merged", new, "--label-shares", "acq=0"], 'the share of "acq" is 0; it must be more than 0'),
        ([place / "merged", new, "--label-shares", "acq=a"], 'the share of "acq" is "a"; write a number'),
    ]
    for arguments, message in cases:
        assert hfedmoe("predict", *arguments) == 2, arguments
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line, line
    assert not list(place.glob("new.predicted*"))
    assert os.listdir(empty) == []
    assert hfedmoe("evaluate", place / "merged") == 2
    assert "an export has no rows; add --rows FILE" in capsys.readouterr().err
