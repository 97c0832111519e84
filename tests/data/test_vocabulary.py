"""Tokens that a model has no row for, labels that become one token, and ends that a tokenizer adds by itself."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.fits import Room, check_task
from hfedmoe.data.pairs import encode_pairs
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError

WORDS = ["<pad>", "<unk>", "</s>", "News", ":", "Topic", "good", "bad", "film", "yes", "no", "Q", "A"]


def tokenizer(ends: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if ends:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)


def task(texts: list[str], words: tuple[str, ...], kind: Any = "classification") -> Task:
    rows = [Example(text, words, n % len(words), origin=f"rows.csv line {n + 2}") for n, text in enumerate(texts)]
    return Task("rows.csv", kind, "News: {text}\nTopic:", words, rows, rows[:1])


def check(made: Any, own: Task, vocabulary: int | None = len(WORDS)) -> Encoder:
    encoder = Encoder.for_task(made, own, 16)
    check_task(own, [], encoder, Room(64, 64, vocabulary))
    return encoder


def test_a_token_beyond_the_embedding_is_named_with_number_size_and_row() -> None:
    made = tokenizer()
    made.add_tokens(["sequel"])
    check(made, task(["good film", "bad film"], ("yes", "no")))  # no row uses it
    with pytest.raises(UserError, match=r'rows.csv line 3: has the token "sequel" with the number 13, .* has 13 rows'):
        check(made, task(["good film", "bad sequel"], ("yes", "no")))
    with pytest.raises(UserError, match=r'"sequel" with the number 13'):
        check(made, task(["good film", "bad film"], ("yes", "sequel")))
    check(made, task(["good film", "bad sequel"], ("yes", "no")), vocabulary=14)


def test_padding_beyond_the_embedding_gets_a_row_that_exists() -> None:
    made = tokenizer(pad_token="[PAD]")
    assert made.pad_token_id == 13
    encoder = check(made, task(["good", "bad film"], ("yes", "no")))
    batch = encoder.training_batch(task(["good", "bad film"], ("yes", "no")).train)
    assert int(batch.input_ids.max()) < 13
    assert batch.attention_mask.sum(1).tolist() == [5, 6]


def test_an_end_of_sequence_beyond_the_embedding_is_named() -> None:
    made = tokenizer(eos_token="[END]")
    rows = [Example("good", completion="film", origin="rows.csv line 2")]
    own = Task("rows.csv", "completion", "{text}", (), rows, rows)
    with pytest.raises(UserError, match=r'line 2: has the token "\[END\]" with the number 13'):
        check(made, own)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("yes", "perhaps"), 'does not know the label word "perhaps": it becomes <unk>'),
        (("yes film", "yes  film"), 'the label words "yes film" and "yes  film" become the same tokens'),
        (("film so", "film la"), 'the label words "film so" and "film la" become the same tokens'),
    ],
)
def test_labels_that_cannot_be_told_apart_are_named(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check(tokenizer(), task(["good film", "bad film"], words))


def test_choices_that_cannot_be_told_apart_are_named_with_their_row() -> None:
    with pytest.raises(UserError, match=r'line 2: the choices "film so" and "film la" become the same tokens'):
        check(tokenizer(), task(["good"], ("film so", "film la"), "choices"))
    check(tokenizer(), task(["good"], ("yes", "no"), "choices"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("film so", "film la"), 'line 3: the choices "film (so|la)" and "film (so|la)" become the same tokens'),
        (("zqx", "wvk"), 'line 3: the tokenizer does not know the choice "zqx": it becomes <unk>; change it or remove'),
        (("yes", "zqx wvk"), 'line 3: the tokenizer does not know the choice "zqx wvk": it becomes <unk>'),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_choices_are_compared_in_training_rows_and_in_held_out_rows(
    words: tuple[str, ...], complaint: str, trained: bool
) -> None:
    good = Example("good film", ("yes", "no"), 0, origin="rows.csv line 2")
    bad = [Example("bad film", words, 0, origin="rows.csv line 3"), Example("bad", words, 1, origin="rows.csv line 4")]
    rows, held = [good, *bad], [good]
    if not trained:
        rows, held = held, rows
    with pytest.raises(UserError, match=rf"^rows\.csv {complaint}"):
        check(tokenizer(), Task("rows.csv", "choices", "Q : {text} A :", (), rows, held))


def test_two_wrong_choices_may_become_the_same_tokens() -> None:
    rows = [Example("good film", ("yes", "film so", "film la", "yes"), 0, origin="rows.csv line 2")]
    check(tokenizer(), Task("rows.csv", "choices", "Q : {text} A :", (), rows, rows))


def test_an_end_that_the_tokenizer_adds_is_no_part_of_an_answer() -> None:
    """With it every choice would be `</s>`, and all would be equally likely."""
    plain, ends = tokenizer(), tokenizer(ends=True)
    assert ends("film")["input_ids"][-1] == 2
    asked = [("Q : film A :", " yes"), ("Q : film A :", " no"), ("Q : film A :", " good film")]
    assert encode_pairs(ends, asked) == encode_pairs(plain, asked)
    assert [answer for _, answer in encode_pairs(ends, asked)] == [[9], [10], [6, 8]]
    words = task(["good film"], ("yes", "no"))
    one, other = (Encoder.for_task(made, words, 16) for made in (ends, plain))
    assert one.encoded(words.train) == other.encoded(words.train)


def test_the_prompt_of_an_encoder_decoder_keeps_its_end() -> None:
    asked = [("Q : film A :", " yes")]
    ((prompt, answer),) = encode_pairs(tokenizer(ends=True), asked, encoder_decoder=True)
    assert (prompt[-1], answer) == (2, [9])
