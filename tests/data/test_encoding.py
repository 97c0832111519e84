"""Prompts, answers and padding: exact tokens on tiny tokenizers, losses against unpadded single rows."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError
from hfedmoe.models.tiny import tiny_tokenizer

CORPUS = ["News: one two three four five six\nTopic: acq earn grain money-fx", "money market trade acquired (yes) 1 2"]
CHOICES = ("acq", "earn", "money-fx")
TEMPLATE = "News: {text}\nTopic:"


def byte_level():
    """GPT-2 style: a space belongs to the word behind it, no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece(suffix=False):
    """Llama style: a mark of a new word in front of every string, `<s>` in front (T5 style: `</s>` behind)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split(" ")] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if suffix else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def rows():
    return [
        Example("one", CHOICES, 2),
        Example("one two three four five six", CHOICES, 0),
        Example("two three (yes) money-fx", CHOICES, 1),
    ]


def tiny_llama(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tiny_t5(vocabulary):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_an_uncut_prompt_reads_as_the_template(make):
    tokenizer = make()
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=200)
    prompt = encoder.prompts([Example("one two", CHOICES, 1)])[0]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "News: one two\nTopic:"
    assert (prompt[0] == tokenizer.bos_token_id) == (make is sentencepiece)
    answer = encoder.choices(rows()[0])[1]
    assert tokenizer.decode([*prompt, *answer], skip_special_tokens=True) == "News: one two\nTopic: earn"


def test_sentencepiece_answers_do_not_begin_with_a_lone_mark():
    tokenizer = sentencepiece()
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=200)
    firsts = tokenizer.convert_ids_to_tokens(encoder.first_tokens(rows()[0]))
    assert all(token.startswith("▁") and token != "▁" for token in firsts)
    assert encoder.distinct_first_tokens(rows())


def test_the_text_is_cut_and_the_template_is_kept(tokenizer):
    whole = Encoder(tokenizer, TEMPLATE, max_tokens=1000).prompts(rows())
    head = tokenizer("News:")["input_ids"]
    tail = tokenizer("\nTopic:")["input_ids"]
    room = 3
    cut = Encoder(tokenizer, TEMPLATE, max_tokens=len(head) + len(tail) + room).prompts(rows())
    for long, short in zip(whole, cut, strict=True):
        text = long[len(head) : -len(tail)]
        assert short == head + text[:room] + tail
    with pytest.raises(UserError, match=r"data\.template takes \d+ tokens, which leaves none of data\.max_tokens=\d"):
        Encoder(tokenizer, TEMPLATE, max_tokens=len(head) + len(tail))


@pytest.mark.parametrize(
    ("template", "choice", "read"),
    [
        ("{text}\nA:", "earn", "one\nA: earn"),
        ("{text}\nA: ", "earn", "one\nA: earn"),
        ("{text}\nA:", " earn", "one\nA: earn"),
        ("{text}\nA:", "\nearn", "one\nA:\nearn"),
        ("{text}\n", "earn", "one\nearn"),
        ("({text})", "earn", "(one) earn"),
        ("Say {text}", "earn", "Say one earn"),
    ],
)
def test_where_the_answer_joins_the_prompt(tokenizer, template, choice, read):
    encoder = Encoder(tokenizer, template, max_tokens=200)
    example = Example("one", (choice, "acq"), 0)
    tokens = encoder.prompts([example])[0] + encoder.choices(example)[0]
    assert tokenizer.decode(tokens) == read


def test_a_completion_ends_with_end_of_sequence_and_a_choice_does_not(tokenizer):
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=200)
    assert encoder.encoded([Example("one", completion="two")])[0][1][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encoder.encoded([rows()[0]])[0][1]
    batch = encoder.training_batch([Example("one", completion="two")])
    assert batch.answers.tolist() == [-1]
    assert batch.choice_tokens is None


def test_a_long_choice_is_an_error_that_names_the_example(tokenizer):
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=20)
    with pytest.raises(UserError, match=r'^example "a question": an answer has \d+ tokens, .*; shorten it or raise'):
        encoder.training_batch([Example("a question", ("zq" * 20, "a"), 1)])


def test_a_long_completion_loses_its_end_and_the_prompt_in_front_of_it_its_beginning(tokenizer):
    long = Example("one two three four five six", completion="zq" * 20)
    task = Task("t", "completion", TEMPLATE, (), [long], [])
    whole, short = Encoder.for_task(tokenizer, task, 200), Encoder.for_task(tokenizer, task, 20)
    assert short.encoded([long])[0][1] == whole.encoded([long])[0][1][:20]
    assert tokenizer.eos_token_id not in short.encoded([long])[0][1]
    head, tail = (tokenizer(piece)["input_ids"] for piece in ("News:", "\nTopic:"))
    text = whole.prompts([long])[0][len(head) : -len(tail)]
    assert short.prompts([long])[0] == head + text[-(20 - len(head) - len(tail)) :] + tail


@pytest.mark.parametrize("first_token_only", [False, True])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_causal_batches_line_up_with_single_rows(make, first_token_only):
    tokenizer = make()
    model = tiny_llama(len(tokenizer))
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=24)
    batch = encoder.training_batch(rows(), first_token_only=first_token_only)
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert bool(batch.attention_mask[:, -1].all())  # padded on the left
    inputs = batch.model_inputs()
    logits = model(**inputs).logits
    assert logits.shape[:2] == batch.targets.shape
    if first_token_only:
        assert batch.targets.shape[1] == 1
    losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    for index, example in enumerate(rows()):
        ((prompt, answer),) = encoder.encoded([example])
        answer = answer[:1] if first_token_only else answer
        single = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = cross_entropy(single, torch.tensor(answer), reduction="sum")
        torch.testing.assert_close(losses[index].sum(), expected, rtol=1e-4, atol=1e-5)


def test_encoder_decoder_batches_line_up_with_single_rows():
    tokenizer = sentencepiece(suffix=True)
    model = tiny_t5(len(tokenizer))
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=24, encoder_decoder=True, decoder_start_token_id=0)
    prompts = encoder.prompts(rows())
    assert {prompt[-1] for prompt in prompts} == {tokenizer.eos_token_id}
    assert max(map(len, prompts)) <= 24
    batch = encoder.training_batch(rows())
    assert bool(batch.attention_mask[:, 0].all())  # padded on the right
    assert batch.decoder_input_ids[:, 0].tolist() == [0, 0, 0]
    logits = model(**batch.model_inputs()).logits
    losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)
    for index, (example, prompt) in enumerate(zip(rows(), prompts, strict=True)):
        single = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([encoder.encoded([example])[0][1]]))
        torch.testing.assert_close(
            losses[index].sum(), single.loss * len(encoder.encoded([example])[0][1]), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        Encoder(tokenizer, TEMPLATE, max_tokens=24, encoder_decoder=True)


def test_choice_tokens_only_where_they_tell_all_choices_apart(tokenizer):
    encoder = Encoder(tokenizer, TEMPLATE, max_tokens=64)
    batch = encoder.training_batch(rows())
    assert batch.answers.tolist() == [2, 0, 1]
    assert batch.choice_tokens.tolist() == [encoder.first_tokens(rows()[0])] * 3
    first = encoder.training_batch(rows(), first_token_only=True)
    assert torch.equal(first.choice_tokens.gather(1, first.answers[:, None]), first.targets)
    alike = [Example("one", ("money one", "money two"), 0)]
    assert encoder.training_batch(alike).choice_tokens is None
    with pytest.raises(UserError, match="two choices have the same first token"):
        encoder.training_batch(alike, first_token_only=True)
    unequal = [*rows(), Example("one", ("acq", "earn"), 0)]
    assert encoder.distinct_first_tokens(unequal)
    assert encoder.training_batch(unequal).choice_tokens is None
    assert not encoder.distinct_first_tokens([Example("one", completion="two")])


def test_classification_trains_on_first_tokens_by_default(tokenizer):
    def default(kind, choices):
        return Encoder.for_task(tokenizer, Task("t", kind, TEMPLATE, (), [Example("x", choices, 0)], []), 64)

    assert default("classification", CHOICES).training_batch(rows()).targets.shape[1] == 1
    assert not default("classification", ("money one", "money two")).first_token_only
    assert default("choices", CHOICES).training_batch(rows()).targets.shape[1] > 1


def test_a_batch_moves_as_a_whole(tokenizer):
    batch = Encoder(tokenizer, TEMPLATE, max_tokens=64).training_batch(rows()).to("meta")
    assert {value.device.type for value in vars(batch).values() if value is not None} == {"meta"}


def test_positions_do_not_count_padding():
    batch = Encoder(tiny_tokenizer(), "{text}", max_tokens=64).collate([[5, 6, 7], [5]], [[1], [2]])
    assert batch.model_inputs()["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
