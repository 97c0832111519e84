"""The parts of `hfedmoe init`: columns, sizes, label words and the TOML."""

import tomllib

import pytest

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.rows import Rows
from hfedmoe.errors import UserError
from hfedmoe.models.tiny import tiny_tokenizer
from hfedmoe.starting import sizes
from hfedmoe.starting.columns import roles_of
from hfedmoe.starting.draft import Draft
from hfedmoe.starting.words import words_for

PROMPT = "News: {text}\nTopic:"


def table(**columns: list) -> Rows:
    return Rows("rows.csv", list(columns), columns, len(next(iter(columns.values()))))


LONG = [f"a longer text of some words, number {n}" for n in range(12)]


def test_columns_are_found_by_name_or_content():
    named = roles_of(table(title=["a"] * 12, text=LONG, Category=["x", "y"] * 6), {})
    assert named.columns == {"text": "text", "label": "Category"}
    assert named.why["label"] == "its name"
    found = roles_of(table(id=[str(n) for n in range(12)], words=LONG, kind_of_it=["x", "y", "z"] * 4), {})
    assert found.columns == {"text": "words", "label": "kind_of_it"}
    assert found.why == {"text": "the longest texts", "label": "no other column has values that repeat"}


def test_the_user_has_the_last_word():
    rows = table(text=LONG, other=[text[::-1] for text in LONG], label=["x", "y"] * 6, stars=[1, 2, 3] * 4)
    assert roles_of(rows, {"label": "stars", "text": "other"}).columns == {"text": "other", "label": "stars"}
    asked = roles_of(rows, {"completion": "other", "text": "text"})
    assert (asked.format, asked.columns) == ("completion", {"text": "text", "completion": "other"})
    with pytest.raises(UserError, match='no column "gone"'):
        roles_of(rows, {"label": "gone"})


def test_real_numbers_and_texts_of_their_own_are_no_labels():
    with pytest.raises(UserError, match="no column has labels"):
        roles_of(table(text=LONG, score=[n + 0.5 for n in range(12)], serial=[f"t{n}" for n in range(12)]), {})


def test_known_rows_have_their_format():
    rows = table(goal=LONG, sol1=LONG, sol2=LONG, label=[0, 1] * 6)
    assert roles_of(rows, {}).format == "piqa"


def test_numbers_follow_the_rows():
    assert [sizes.clients_for(rows) for rows in (30, 350, 5000)] == [2, 3, 8]
    few, some, many = (sizes.rounds_and_steps(rows) for rows in (20, 100, 5000))
    assert few == (5, 4)
    assert some == (5, 8)
    assert many == (10, 20)
    lengths = sizes.lengths_of([10] * 90 + [100] * 10, "classification", at_least=3, positions=512)
    assert (lengths.half, lengths.most, lengths.max_tokens) == (10, 100, 104)
    assert sizes.lengths_of([5000], "completion", at_least=1, positions=64).max_tokens == 32
    assert sizes.lengths_of([10], "choices", at_least=900, positions=None).max_tokens == 900
    assert sizes.least_rows(1000, 8) == 16
    assert sizes.least_rows(20, 4) == 2


@pytest.mark.parametrize(
    "labels", [["0", "1", "2"], ["crude-oil", "crude-gas", "earn"], ["nobody", "knows", "zzzz"], ["money-fx", "x", "y"]]
)
def test_label_words_begin_with_tokens_of_their_own(labels):
    tokenizer = tiny_tokenizer()
    words = words_for(labels, tokenizer, PROMPT)
    assert words is not None
    used = tuple(words.get(label, label) for label in labels)
    encoder = Encoder(tokenizer, PROMPT, max_tokens=64)
    assert encoder.distinct_first_tokens([Example("a", used, 0)])
    assert tokenizer.unk_token_id not in encoder.first_tokens(Example("a", used, 0))


def test_labels_that_are_told_apart_keep_their_words():
    assert words_for(["earn", "grain"], tiny_tokenizer(), PROMPT) == {}
    tokenizer = tiny_tokenizer()
    assert words_for(["earn", "grain", "3"], tokenizer, PROMPT).keys() == {"3"}
    assert words_for(["oil price", "oil ship", "grain"], tokenizer, PROMPT) == {
        "oil price": "price",
        "oil ship": "ship",
    }
    assert words_for(["Grain", "earn"], tokenizer, PROMPT) == {"Grain": "grain"}


def test_a_draft_is_toml_whatever_is_in_it():
    odd = 'a "b"\\ \n\x7f é 🙂'
    draft = Draft({"train": {"lr": 1e-5}, "seed": 3})
    draft.put("data.label", odd, "two\nlines")
    draft.put("data.label_words", {odd: "x", "plain": "y"})
    draft.put("train.lr", 1.0, "mine")
    tree = tomllib.loads(draft.text(["first", "second"]))
    assert tree["data"] == {"label": odd, "label_words": {odd: "x", "plain": "y"}}
    assert (tree["train"]["lr"], tree["seed"]) == (1e-5, 3)
    assert draft.has("train.lr")
    draft.drop("train.lr")  # the user's stays
    assert draft.config().train.lr == 1e-5
