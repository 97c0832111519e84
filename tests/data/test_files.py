"""Files as people have them: read where it is safe, else one line that says what to do."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.config import load_config
from hfedmoe.data.decoding import DEVICE, OPTION, PLAIN, Form
from hfedmoe.data.files import read_file
from hfedmoe.data.normal import among, distinct, key_of, normal
from hfedmoe.data.tasks import load_task
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import START

LATIN = "text,label\nGr\u00fc\u00dfe,x\n".encode("latin-1")
ROWS = {"text": ["a b", "c"], "label": ["x", "y"]}


def read(path: Path, content: bytes | str, form: Form = PLAIN) -> dict[str, list[Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, {"text", "label"}, form).columns


@pytest.mark.parametrize(
    "content",
    [
        "text,label\na b,x\nc,y\n",
        "text;label\na b;x\nc;y\n",
        "text\tlabel\na b\tx\nc\ty\n",
        "sep=;\ntext;label\na b;x\nc;y\n",
        "\n\r\n  \ntext,label\na b,x\nc,y\n",
        'text, "label" \na b,x\nc,y\n',
        'text, label\na b, "x"\nc, y\n',
        '"text", "label"\n"a b", "x"\n\n"c",y\n',
        'text, label, \n"a b",  x, \nc, "y",\n',
        "te\u200bxt,\u00a0label\u2066\na b,x\nc,y\n",
        "text,label,\na b,x,\nc,y,\n",
        "text,label,,\na b,x\nc,y,,\n",
        "text,label\na b,x,,\n,\n\nc,y\n,,\n",
        "text,label\r\na b,x\r\nc,y\r\n",
        "text,label\ra b,x\rc,y\r",
        "\ufefftext,label\na b,x\nc,y\n",
        "text,label\na b,x\nc,y\n".encode("utf-16"),
        "text,label\na b,x\nc,y\n".encode("utf-32"),
        gzip.compress(b"text,label\na b,x\nc,y\n", mtime=0),
    ],
)
def test_tables_that_mean_the_same_read_the_same(content: str | bytes, tmp_path: Path) -> None:
    assert read(tmp_path / "rows.csv", content) == ROWS


def test_a_parquet_file_is_one_whatever_its_name_and_gz_is_unpacked(tmp_path: Path) -> None:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(ROWS), written)
    assert read(tmp_path / "rows.csv", written.getvalue()) == ROWS
    lines = b'{"text": "a b", "label": "x"}\n{"text": "c", "label": "y"}\n'
    assert read(tmp_path / "rows.jsonl.gz", gzip.compress(lines, mtime=0)) == ROWS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            "text,label\nGr\u00fc\u00dfe,x\n".encode("latin-1"),
            r'line 2: not UTF-8; .*data.encoding, for example "cp1252"',
        ),
        ("text,label\na,\u00fc\n".encode("utf-16-le"), r'UTF-16 without a mark: set data.encoding = "utf-16-le"'),
        (
            "text,label\nit\u2019s,x\n".encode("utf-16-le"),
            r'like UTF-16 without a mark: set data.encoding = "utf-16-le"',
        ),
        ("text,label\n\u4e2d,x\n".encode("utf-16-be"), r'like UTF-16 without a mark: set data.encoding = "utf-16-be"'),
        ("text,label\na,x\n".encode("utf-32-le"), r'like UTF-32 without a mark: set data.encoding = "utf-32-le"'),
        ("text,label\na,x\n".encode("utf-16-le")[:-1], r"line 1: holds a NUL.*such as UTF-16, set data.encoding"),
        ("text,label\na\x00b,x\n", r"line 2: holds a NUL character; .* set data.encoding .*, else remove"),
        (b"PK\x03\x04....", r"is a spreadsheet \(xlsx, ods\) or a zip archive; save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0....", "is an old Excel file"),
        (b"%PDF-1.7 ...", "is a PDF"),
        (b"<!doctype html><p>Sign in", "is a web page"),
        (gzip.compress(gzip.compress(b"text,label\na,x\n", mtime=0), mtime=0), "is compressed twice; unpack it first"),
        (b"text,label\n\x00\xff\x00,x\n", "line 2: not UTF-8; save the file"),
        (b"\x1f\x8b\x08broken", "looks like gzip, but cannot be unpacked"),
        (START + b"\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        ("text,label\na,b,c\n", 'line 2: 3 cells, but the first line names 2 columns; put cells that hold ","'),
        ("text,,label\na,stray,x\n", "line 2: a cell is in a column without a name"),
        ("text,text\na,b\n", "line 1: a column name occurs twice"),
        ("text\nhello, world\n", "set data.delimiter"),
        (",,\ntext,label,\na,x,\n", "line 1: the first line names no columns; write their names there, or remove it"),
        ("\n;;\ntext;label\n", "line 2: the first line names no columns"),
        ("text,te\u200bxt\na,b\n", "line 1: a column name occurs twice"),
        ("text, label\na, x\nb, x, y\n", "line 3: 3 cells, but the first line names 2 columns"),
        ('\n{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', "looks like JSON lines; name it .jsonl"),
        ('[\n{"text": "a",\n"label": "x"}]', "looks like JSON; name it .json$"),
    ],
)
def test_what_cannot_be_read_safely_is_named(content: str | bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read(tmp_path / "rows.csv", content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.jsonl", "text,label\na,x\n", "rows.jsonl: looks like CSV; name it .csv"),
        ("rows.json", '"text";"label"\na;x\n', "rows.json: looks like CSV; name it .csv"),
        ("rows.json", '{"text": "a"}\n{"text": "b"}\n', "rows.json: looks like JSON lines; name it .jsonl"),
        ("rows.jsonl", '[\n{"text": "a"}\n]\n', "rows.jsonl: looks like JSON; name it .json$"),
        ("rows.jsonl", '[{"text": "a"}]\n', "line 1: expected an object .* name a file that is one list .json"),
        ("rows.jsonl", '{"text": "a", \n', "rows.jsonl line 1: not valid JSON"),
        ("rows.jsonl", '{"text": "a", "\u200btext": "b"}\n', 'line 1: two keys look like "text"; keep one'),
        (
            "rows.tsv",
            "text,label\na,x\n",
            'first line has commas, but no tabs; name it .csv, or set data.delimiter = ","',
        ),
        ("rows.tab", "text;label\na;x\n", 'first line has semicolons, but no tabs; .* set data.delimiter = ";"'),
        (
            "rows.gz",
            gzip.compress(b"text,label\na,x\n", mtime=0),
            r"unknown format \(no suffix before .gz\); use one of .csv.gz, ",
        ),
        ("rows", "text,label\na,x\n", r"unknown format \(no suffix\); use one of .csv, .tsv, "),
        ("rows.doc", "text,label\na,x\n", r'unknown format ".doc"; use one of .csv, .tsv, '),
    ],
)
def test_a_file_with_the_wrong_name_is_told_its_own(
    name: str, content: str | bytes, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_columns_are_found_by_names_that_look_the_same(tmp_path: Path) -> None:
    names = {"\ufefftext": ["a b", "c"], " la\u00adbel ": ["x", "y"]}
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*names.values(), strict=True)]
    assert read(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))) == ROWS
    assert read(tmp_path / "rows.json", json.dumps(rows)) == ROWS
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(names), written)
    assert read(tmp_path / "rows.parquet", written.getvalue()) == ROWS
    (tmp_path / "rows.csv").write_text("my  text,x\u200b\na,b\n", encoding="utf-8")
    assert read_file(tmp_path / "rows.csv", {"my\u00a0text"}).columns == {"my\u00a0text": ["a"]}
    assert read_file(tmp_path / "rows.csv", {"label"}).names == ["my text", "x"]
    nested = '{"text": {"\u200bkey": 1}, "label": "x"}\n'
    assert read(tmp_path / "rows.jsonl", nested)["text"] == [{"\u200bkey": 1}]


def test_lines_of_json_in_utf_16_are_named_and_read(tmp_path: Path) -> None:
    lines = '{"text": "it\u2019s", "label": "x"}\n'.encode("utf-16-le")
    for name in ("rows.jsonl", "rows.json"):
        with pytest.raises(UserError, match=r'UTF-16 without a mark: set data.encoding = "utf-16-le"'):
            read(tmp_path / name, lines)
    assert read(tmp_path / "rows.jsonl", lines, Form("utf-16-le")) == {"text": ["it\u2019s"], "label": ["x"]}


def test_settings_say_what_a_file_cannot(tmp_path: Path) -> None:
    rows = "text,note;label\nGr\u00fc\u00dfe,x\n".encode("cp1252")
    assert read(tmp_path / "rows.csv", rows, Form("cp1252", ",")) == {"text": ["Gr\u00fc\u00dfe"]}
    assert read(tmp_path / "rows.csv", b"text|label\na,b|x\n", Form(None, "|")) == {"text": ["a,b"], "label": ["x"]}
    with pytest.raises(UserError, match="is not text in ascii"):
        read(tmp_path / "rows.csv", rows, Form("ascii"))
    # A device's owner has options, and no run's settings.
    for place, name in ((OPTION, "--encoding"), (DEVICE, "this device's encoding")):
        with pytest.raises(UserError, match=f"or set {name}, for example"):
            read(tmp_path / "rows.csv", rows, Form(place=place))
    with pytest.raises(UserError, match=r"or set --delimiter$"):
        read(tmp_path / "rows.csv", b"text\nhello, world\n", Form(place=OPTION))
    with pytest.raises(UserError, match='set --encoding "utf-16-le", or save'):
        read(tmp_path / "rows.csv", "text,label\na,x\n".encode("utf-16-le"), Form(place=OPTION))
    config = load_config(None, ["data.encoding=Windows-1252", "data.delimiter=;"]).data
    assert (config.encoding, config.delimiter) == ("cp1252", ";")
    for unknown in ("klingon", "hex", "rot13", "base64", "undefined"):
        with pytest.raises(UserError, match=r"data.encoding: not an encoding of Python"):
            load_config(None, [f"data.encoding={unknown}"])
    with pytest.raises(UserError, match=r"is not text in punycode \(.*\); check data.encoding"):
        read(tmp_path / "rows.csv", b"text,label\na-\xffb,x\n", Form("punycode"))


def test_a_config_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbfseed = 7\n")
    assert load_config(tmp_path / "my.toml").seed == 7


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("new york", "new\u00a0york"),
        ("new york", "new\u202fyork"),
        ("spam", "sp\u200bam\ufeff"),
        ("spam", " spam\t"),
        ("new york", "new  york"),
        ("new york", "new\u2009\u3000york"),
        ("\u2764", "\u2764\ufe0f"),
        *(("spam", f"sp{mark}am") for mark in "\u2061\u2066\u202a\u180e\u034f\ufe00\U000e0100\U000e01ef\u200c\u200d"),
        ("hy\u00adphen", "hyphen"),
    ],
)
def test_texts_that_look_the_same_are_the_same(one: str, other: str) -> None:
    assert normal(one) == normal(other)


VISIBLE = (
    set(range(0x600, 0x606)) | {0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD} | set(range(0x13430, 0x13440))
)
"""Formatting characters (Cf) that are drawn: signs above Arabic and Kaithi numbers, and joined hieroglyphs."""


@given(st.text(), st.text(), st.characters(categories=["Cf"]).filter(lambda mark: ord(mark) not in VISIBLE))
@settings(max_examples=100, deadline=None)
def test_no_formatting_character_that_is_invisible_tells_texts_apart(head: str, tail: str, mark: str) -> None:
    if "\U000e0020" <= mark <= "\U000e007f":  # inside a flag
        head, tail = head.replace("\U0001f3f4", ""), tail.replace("\U0001f3f4", "")
    assert normal(head + mark + tail) == normal(head + tail)


def test_flags_that_differ_only_in_tags_stay_apart() -> None:
    england, scotland = (
        "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in name) + "\U000e007f"
        for name in ("gbeng", "gbsct")
    )
    assert normal(england) == england != normal(scotland)


@given(st.text() | st.text(alphabet="a \u0301\u200d\ufe0f\U0001f3f4\U000e0067\U000e007f"))
@settings(max_examples=200, deadline=None)
def test_a_normal_form_is_its_own(text: str) -> None:
    assert normal(normal(text)) == normal(text)


def test_numbers_are_one_class_however_they_are_written() -> None:
    assert distinct(["1", "1.0", "2.0", "x"]) == ("1", "2.0", "x")
    assert distinct(["1.00", "1.0", "2.00", "1.50"]) == ("1.0", "1.50", "2.00")
    assert [among(label, ("1.0", "2")) for label in ("1.00", "1", "2.0")] == ["1.0", "1.0", "2"]
    known = ("1", "2.0", "x")
    assert [among(label, known) for label in ("1.0", "1", "2", "2.00", "y")] == ["1", "1", "2.0", "2.0", None]
    assert [key_of(cell) for cell in (1.0, 1, True, " a\u00a0b ")] == ["1", "1", "true", "a b"]


def test_labels_and_clients_that_differ_invisibly_are_one(tmp_path: Path) -> None:
    lines = ["text,label,ward"]
    wards = ("north", "nor\u200bth", "south")
    labels = ("caf\u00e9", "cafe\u0301", "1", "1.0")
    lines += [f"word {n},{labels[n % 4]},{wards[n % 3]}" for n in range(36)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = ["partition.scheme=natural", "partition.column=ward", f"data.source={tmp_path}/rows.csv"]
    config = load_config(None, [*settings, "clients.count=2", "partition.min_rows=1"])
    task = load_task(config.data, config.partition, 0)
    assert task.labels == ("1", "caf\u00e9")
    assert task.part_names == ["north", "south"]
    assert {example.choices[example.answer] for example in task.train} == set(task.labels)


@pytest.mark.parametrize(
    ("written", "kept"), [(("1.0", "1.00"), "1.0"), (("new york", "new  york"), "new york"), (("a\u2066b", "ab"), "ab")]
)
def test_one_class_written_in_two_ways_is_one(written: tuple[str, str], kept: str, tmp_path: Path) -> None:
    lines = [f"word {n},{[*written, 'other'][n % 3]},{['1', '1.0', '1.00', '2'][n % 4]}" for n in range(36)]
    (tmp_path / "rows.csv").write_text("text,label,ward\n" + "\n".join(lines) + "\n", encoding="utf-8")
    settings = ["partition.scheme=natural", "partition.column=ward", f"data.source={tmp_path}/rows.csv"]
    config = load_config(None, [*settings, "clients.count=2", "partition.min_rows=1"])
    task = load_task(config.data, config.partition, 0)
    assert task.labels == (kept, "other")
    assert task.part_names == ["1", "2"]


def test_an_answer_is_first_the_choice_that_equals_it(tmp_path: Path) -> None:
    row = '{"prompt": "q", "choices": ["if a:  b", "if a: b"], "answer": "if a: b"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 4)
    task = load_task(load_config(None, [f"data.source={tmp_path}/rows.jsonl"]).data, load_config(None).partition, 0)
    assert [example.answer for example in task.train + task.test] == [1] * 4


def test_labels_that_are_none_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "word,-1\n" * 8)
    config = load_config(None, [f"data.source={tmp_path}/rows.csv"])
    with pytest.raises(UserError, match=r"every label is -1.*data.split, data.test"):
        load_task(config.data, config.partition, 0)


def test_a_hub_split_without_labels_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    secret = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    known = datasets.Dataset.from_dict({"text": ["x", "y"] * 4, "label": [0, 1] * 4}, features=features)
    datasets.DatasetDict({"train": known, "test": secret}).save_to_disk(tmp_path / "set")
    config = load_config(None, [f"data.source={tmp_path}/set", "data.test=test"])
    with pytest.raises(UserError, match=r"\(test\): every label is -1.*usually train or validation"):
        load_task(config.data, config.partition, 0)
