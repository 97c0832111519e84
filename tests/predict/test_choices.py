"""`hfedmoe predict` of multiple choice: every row has choices of its own."""

import csv
import json
from pathlib import Path

import pytest

from hfedmoe.config import DataConfig
from hfedmoe.data.tasks import load_rows
from hfedmoe.data.unlabelled import load_unanswered
from hfedmoe.errors import UserError
from tests.commands import hfedmoe

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
WORDS = ("oil prices", "grain", "a merger of banks", "profit", "ships at sea")


def row(number: int) -> dict[str, object]:
    """Two to four choices, in another order in every row."""
    options = [WORDS[(number + shift) % 5] for shift in range(2 + number % 3)]
    return {"prompt": f"What rose in week {number}?", "choices": options, "answer": number % len(options)}


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions, its merged model, and rows without answers."""
    root = tmp_path_factory.mktemp("choices")
    source = written(root / "rows.jsonl", [row(number) for number in range(60)])
    settings = (f"data.source={source}", "partition.scheme=iid", "clients.count=2", "federation.rounds=1")
    more = ("data.template='Q: {text}\\nA:'", "evaluation.watch_rows=0", "train.lr=1e-2")
    assert hfedmoe("run", "tiny", "--out", root / "run", *(p for s in (*settings, *more) for p in ("--set", s))) == 0
    assert hfedmoe("export", root / "run", root / "merged") == 0
    source.unlink()
    known = [row(number) for number in range(100, 130)]
    written(root / "known.jsonl", known)
    written(
        root / "new.jsonl", [{"id": n, **{k: one[k] for k in ("prompt", "choices")}} for n, one in enumerate(known)]
    )
    return root


def test_the_card_says_what_to_do_with_a_file(place: Path) -> None:
    assert "`hfedmoe predict . FILE` names the most probable choice" in (place / "merged" / "README.md").read_text()


def test_every_row_gets_the_text_and_index_of_its_choice_and_probabilities(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = {}
    for form in ("run", "merged"):
        out = tmp_path / f"{form}.jsonl"
        assert hfedmoe("predict", place / form, place / "new.jsonl", "--out", out) == 0
        found[form] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert f"{tmp_path / 'merged.jsonl'}: 30 rows, each with the choice" in capsys.readouterr().out
    asked = [row(number) for number in range(100, 130)]
    for number, (own, other, question) in enumerate(zip(found["run"], found["merged"], asked, strict=True)):
        assert list(own) == ["id", "prompt", "choices", "predicted", "predicted_index", "probabilities"]
        assert (own["id"], own["prompt"], own["choices"]) == (number, question["prompt"], question["choices"])
        shares = own["probabilities"]
        assert len(shares) == len(own["choices"])
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert shares.index(max(shares)) == own["predicted_index"]
        assert own["choices"][own["predicted_index"]] == own["predicted"]
        assert own["predicted_index"] == other["predicted_index"]
        assert shares == pytest.approx(other["probabilities"], abs=1e-4)
    assert len({own["predicted_index"] for own in found["run"]}) > 1
    # `evaluate` counts the same choices as right.
    assert hfedmoe("evaluate", place / "run", "--rows", place / "known.jsonl", "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    hits = [own["predicted_index"] == one["answer"] for own, one in zip(found["run"], asked, strict=True)]
    assert accuracy == pytest.approx(sum(hits) / len(hits))


def test_a_csv_has_lists_of_json_and_columns_may_have_other_names(place: Path, tmp_path: Path) -> None:
    asked = [row(number) for number in range(100, 104)]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("question", "options", "answer"), *((one["prompt"], json.dumps(one["choices"]), "?") for one in asked)]
        )
    columns = ("--set", "data.text=question", "--set", "data.choices=options")
    assert hfedmoe("predict", place / "merged", tmp_path / "new.csv", *columns) == 0
    with (tmp_path / "new.predicted.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for cells, one in zip(table, asked, strict=True):
        assert cells["answer"] == "?"  # not looked at
        assert json.loads(cells["options"])[int(cells["predicted_index"])] == cells["predicted"]
        assert len(json.loads(cells["probabilities"])) == len(one["choices"])  # type: ignore[arg-type]


def test_what_cannot_be_asked_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = written(tmp_path / "taken.jsonl", [row(1) | {"probabilities": 1}])
    bad = written(tmp_path / "bad.jsonl", [row(1), row(2) | {"choices": ["one"]}])
    for file, more, message in (
        (place / "new.jsonl", ("--label-shares", "a=0.5,b=0.5"), "have choices of their own and no labels"),
        (place / "new.jsonl", ("--set", "data.choices=options"), 'no column "options"; columns present: id, prompt'),
        (taken, (), 'has a column "probabilities" already'),
        (bad, (), 'bad.jsonl line 2: column "choices" has 1 choices; at least two are needed'),
    ):
        assert hfedmoe("predict", place / "merged", file, "--out", tmp_path / "x.csv", *more) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge", "mmlu"])
def test_rows_of_known_sets_need_no_answer(name: str, tmp_path: Path) -> None:
    file = FIXTURES / f"{name}.jsonl"
    config = DataConfig(source=str(file), format=name)
    answered = load_rows(config).test
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    secret = [{k: v for k, v in one.items() if k not in ("answerKey", "answer")} for one in rows]
    table, task = load_unanswered(written(tmp_path / "secret.jsonl", secret), config)
    assert (task.kind, len(table)) == ("choices", len(answered))
    for one, other in zip(task.test, answered, strict=True):
        assert (one.text, one.choices, one.answer) == (other.text, other.choices, 0)
    with pytest.raises(UserError, match="no column"):
        load_rows(config.model_copy(update={"source": str(tmp_path / "secret.jsonl")}))
