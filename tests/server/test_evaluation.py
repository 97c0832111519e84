"""Evaluation against naive loops, one sequence at a time and without padding."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.errors import UserError
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.report.metrics import as_text, to_json
from hfedmoe.server.evaluation import Metrics, evaluate, macro_f1

WORDS = ["<pad>", "</s>", "<unk>", "say", "so", "big", "small", "red", "green", "blue", "sky", "sea", "sun", "moon"]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def switch():
    torch.manual_seed(2)
    config = SwitchTransformersConfig(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=2,
        expert_capacity=64,
        decoder_start_token_id=0,
        dropout_rate=0.3,
    )
    return SwitchTransformersForConditionalGeneration(config)


def examples(choices, count=12, seed=0):
    draw = random.Random(seed)
    return [
        Example(" ".join(draw.choices(WORDS[3:], k=draw.randint(1, 6))), choices, draw.randrange(len(choices)))
        for _ in range(count)
    ]


FIRST = ("red sky", "blue sea", "green")
WHOLE = ("red sky", "red sea moon", "green")


def naive(model, encoder, rows, first_token):
    """Accuracy, predictions and loss per token, one continuation at a time."""
    model.eval()
    hits, predictions, loss, tokens = 0, [], 0.0, 0
    for row in rows:
        prompt, scores, chosen = encoder.prompts([row])[0], [], 0.0
        for number, choice in enumerate(encoder.choices(row)):
            choice = choice[:1] if first_token else choice
            with torch.no_grad():
                if encoder.encoder_decoder:
                    start = torch.tensor([[encoder.decoder_start_token_id, *choice[:-1]]])
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1]
            score = sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(choice))
            scores.append(score)
            if number == row.answer:
                chosen, tokens = -score, tokens + len(choice)
        loss += chosen
        predictions.append(scores.index(max(scores)))
        hits += predictions[-1] == row.answer
    return hits / len(rows), predictions, loss / tokens


def encoder_for(name, tokenizer, first_token_only=False):
    return Encoder(
        tokenizer,
        "say {text} so",
        max_tokens=6,
        encoder_decoder=name == "switch",
        decoder_start_token_id=0,
        first_token_only=first_token_only,
    )


@pytest.mark.parametrize("name", ["llama", "switch"])
@pytest.mark.parametrize(
    ("choices", "scoring", "first_token"),
    [
        (FIRST, "auto", True),
        (FIRST, "auto", False),
        (FIRST, "first_token", True),
        (FIRST, "loglikelihood", False),
        (WHOLE, "auto", False),
    ],
)
def test_choices_against_a_naive_loop(request, tokenizer, name, choices, scoring, first_token):
    # auto does what training does
    encoder = encoder_for(name, tokenizer, first_token_only=scoring == "auto" and first_token)
    model, rows = request.getfixturevalue(name), examples(choices)
    accuracy, predictions, loss = naive(model, encoder, rows, first_token)
    metrics = evaluate(model, rows, encoder, batch_size=5, scoring=scoring)
    assert metrics.accuracy == accuracy
    assert metrics.macro_f1 == macro_f1([row.answer for row in rows], predictions)
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics.examples == len(rows)
    assert (metrics.accuracy_norm is None) == first_token


def test_acc_norm_divides_by_characters_and_choices_share_a_forward_pass(llama, tokenizer):
    encoder = encoder_for("llama", tokenizer)
    rows = [
        Example("sun", choices, 1) for choices in (("red sky", "red sea"), ("red sky", "blue sea moon"), ("so",) * 2)
    ]
    sizes = []
    hook = llama.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    metrics = [evaluate(llama, [row], encoder, 4) for row in rows]
    hook.remove()
    assert sizes == [1, 2, 1]  # "red sky" and "red sea" differ in their last token only
    for row, measured in zip(rows, metrics, strict=True):
        scores = [-evaluate(llama, [Example(row.text, row.choices, j)], encoder, 1).loss for j in (0, 1)]
        totals = [score * len(tokens) for score, tokens in zip(scores, encoder.choices(row), strict=True)]
        shares = [total / len(choice) for total, choice in zip(totals, row.choices, strict=True)]
        assert measured.accuracy == (totals[1] > totals[0])
        assert measured.accuracy_norm == (shares[1] > shares[0])


def test_an_empty_choice_has_no_acc_norm_of_its_own():
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())  # knows a space by itself
    rows = [Example("one two", ("", "earn"), 0), Example("one two", ("", "earn"), 1)]
    encoder = Encoder(tokenizer, "{text}", max_tokens=64, whole_prompts=True)
    metrics = evaluate(tiny_model(len(tokenizer), seed=3), rows, encoder, 4, "loglikelihood")
    assert metrics.accuracy_norm == 0.5  # never the empty one
    assert metrics.macro_f1 is None  # choices are not labels


def test_the_order_of_examples_does_not_matter(llama, tokenizer):
    encoder, rows = encoder_for("llama", tokenizer), examples(WHOLE, 20)
    other = rows[::-1]
    assert evaluate(llama, rows, encoder, 4) == evaluate(llama, other, encoder, 4)


def test_completions_have_loss_and_perplexity_per_token(llama, tokenizer):
    encoder = encoder_for("llama", tokenizer)
    rows = [Example("sun", completion="moon red"), Example("big blue sky", completion="sea")]
    llama.eval()
    total, tokens = 0.0, 0
    for row in rows:
        ((prompt, answer),) = encoder.encoded([row])
        assert answer[-1] == tokenizer.eos_token_id
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += llama(input_ids=ids, labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    metrics = evaluate(llama, rows, encoder, 2)
    assert (metrics.accuracy, metrics.macro_f1) == (None, None)
    assert metrics.loss == pytest.approx(total / tokens, rel=1e-5)


def test_rows_with_choices_of_their_own(llama, tokenizer):
    encoder = encoder_for("llama", tokenizer)
    rows = examples(("sun", "moon"), 6) + examples(("red sky", "blue", "big", "small sea"), 6)
    metrics = evaluate(llama, rows, encoder, 5, scoring="first_token")
    expected = naive(llama, encoder, rows, first_token=True)
    assert metrics.accuracy == expected[0]
    assert metrics.loss == pytest.approx(expected[2], rel=1e-5)
    assert metrics.macro_f1 is None


def test_equal_choices_tie_to_the_lower_index(llama, tokenizer):
    rows = [Example("sun", ("red", "red"), 0), Example("moon", ("red", "red"), 1)]
    assert evaluate(llama, rows, encoder_for("llama", tokenizer), 4).accuracy == 0.5


def test_modes_and_random_state_are_left_alone(llama, tokenizer):
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    state = torch.get_rng_state()
    calls = []
    evaluate(llama, examples(WHOLE, 5), encoder_for("llama", tokenizer), 4, on_batch=lambda *a: calls.append(a))
    assert [module.training for module in llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_no_graph_is_built_and_a_loss_beyond_exp_is_infinite():
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), 0)
    model.lm_head.weight.data *= 1e5
    graphs = []
    model.register_forward_hook(lambda module, inputs, output: graphs.append(output.logits.requires_grad))
    metrics = evaluate(model, [Example("x", completion="y")], Encoder(tokenizer, "{text}", max_tokens=64), 4)
    assert graphs == [False]
    assert metrics.loss > 1000
    assert metrics.perplexity == math.inf


def test_a_broken_model_is_reported_as_such(llama, tokenizer):
    weight = llama.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[WORDS.index("red")] = math.nan
        metrics = evaluate(llama, examples(FIRST, 3), encoder_for("llama", tokenizer), 4)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert math.isnan(metrics.loss)
    assert math.isnan(metrics.perplexity)


def test_only_the_logits_of_the_answers_are_built(llama, tokenizer):
    widths = []
    hook = llama.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    evaluate(llama, examples(FIRST), encoder_for("llama", tokenizer), 4, scoring="first_token")
    hook.remove()
    assert set(widths) == {1}


def test_macro_f1_by_hand():
    # label 0: precision 1/2, recall 1; label 1: precision 1, recall 1/2; label 2 never occurs
    assert macro_f1([0, 1, 1, 3], [0, 0, 1, 3]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_bad_requests(llama, tokenizer):
    encoder = encoder_for("llama", tokenizer)
    with pytest.raises(UserError, match="no held-out rows"):
        evaluate(llama, [], encoder, 4)
    with pytest.raises(UserError, match=r"evaluation\.scoring=first_token: .* use loglikelihood or auto"):
        evaluate(llama, examples(WHOLE), encoder, 4, scoring="first_token")


def test_figures_as_text_and_json():
    whole = Metrics(0.5, None, 2.0, 4, math.exp(2), 0.25)
    assert as_text(whole) == "acc 50.0 %, acc_norm 25.0 %, loss 2, perplexity 7.389 on 4 rows"
    first = Metrics(0.5, 0.3, math.nan, 4, math.inf)
    assert as_text(first) == "accuracy 50.0 %, macro-F1 0.300, loss nan, perplexity inf on 4 rows"
    assert json.loads(to_json(first)) == {
        "accuracy": 0.5,
        "macro_f1": 0.3,
        "loss": None,
        "examples": 4,
        "perplexity": None,
        "accuracy_norm": None,
        "choice_loss": None,
    }
    trained = Metrics(0.5, 0.3, 9.9, 4, math.exp(9.9), choice_loss=0.6112)
    assert as_text(trained) == "accuracy 50.0 %, macro-F1 0.300, loss 0.6112 among the choices on 4 rows"


def test_padding_runs_no_experts(monkeypatch):
    from hfedmoe.data.task import Task
    from hfedmoe.moe.experts.state import ExpertState
    from hfedmoe.moe.model import MoEModel
    from hfedmoe.prepare import Prepared
    from tests.federation import tiny_config

    texts = ["oil", "oil rose and the bank said that it will buy shares in the company", "grain prices fell"]
    rows = [Example(text, ("trade", "ship"), n % 2) for n, text in enumerate(texts)]
    tokenizer = tiny_tokenizer()
    task = Task("x", "classification", "News: {text}\nTopic:", ("ship", "trade"), rows, rows)
    encoder = Encoder.for_task(tokenizer, task, 32)
    model = MoEModel(tiny_model(len(tokenizer), 0))
    prepared = Prepared(tiny_config(), model, encoder, task, watch=[])
    plain = evaluate(model.model, rows, encoder, 8)
    seen = []
    honest = ExpertState._forward

    def forward(state, hidden, index, weights):
        groups = state.grouping

        def counting(*arguments):
            made = groups(*arguments)
            seen.append(made.size)
            return made

        monkeypatch.setattr(state, "grouping", counting)
        try:
            return honest(state, hidden, index, weights)
        finally:
            monkeypatch.setattr(state, "grouping", groups)

    monkeypatch.setattr(ExpertState, "_forward", forward)
    measured = prepared.measure(prepared.initial, "all", None)
    tokens = sum(len(prompt) for prompt in encoder.prompts(rows))
    assert seen == [2 * tokens] * 4  # top-2 in four layers, and no token of the padding
    assert (measured.accuracy, measured.examples) == (plain.accuracy, 3)
    assert measured.loss == pytest.approx(plain.loss, rel=1e-5)
