"""Conversations: the tokenizer's chat template writes them, and the loss is on the answer only."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfedmoe.config import DataConfig
from hfedmoe.data.chat import ChatForm, render
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.tasks import load_test
from hfedmoe.errors import UserError
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.server.evaluation import evaluate

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_folder())


def loaded(name="instructions", **settings):
    return load_test(DataConfig(source=str(FIXTURES / f"{name}.jsonl"), format="instructions", **settings))


def test_every_answer_is_an_example_with_what_came_before():
    assert [[role for role, _ in example.messages] for example in loaded().test] == [
        ["user", "assistant"],
        ["user", "assistant", "user", "assistant"],
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]
    assert [example.completion for example in loaded().test] == [
        "Hello! How can I help you?",
        "Two plus three is five.",
        "Dogs",
        "red\nblue",
    ]


def test_other_schemas():
    alpaca = loaded("instructions-alpaca").test
    assert [example.messages for example in alpaca] == [  # the row without an answer is left out
        (("user", "Name the capital of the country.\n\nFrance"), ("assistant", "Paris")),
        (("user", "Write a line about rain."), ("assistant", "The rain came down softly on the roofs.")),
    ]
    shared = loaded("instructions-sharegpt").test
    assert [example.completion for example in shared] == [
        "A small model.",
        "Very small.",
        "Air scatters blue light most.",
    ]
    assert shared[2].messages[0] == ("system", "Be brief.")


def test_prompt_and_answer_are_the_template_s_own_text(tokenizer):
    task = loaded()
    encoder = Encoder.for_task(tokenizer, task, 200)
    for example in task.test:
        turns = [{"role": role, "content": content} for role, content in example.messages]
        ((prompt, answer),) = encoder.encoded([example])
        assert prompt == tokenizer.apply_chat_template(
            turns[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert prompt + answer == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert tokenizer.decode(answer) == example.completion + "<|im_end|>\n"


def test_the_loss_is_on_the_answer_only(tokenizer):
    task = loaded()
    encoder = Encoder.for_task(tokenizer, task, 200)
    batch = encoder.training_batch(task.test)
    assert batch.choice_tokens is None
    assert batch.answers.tolist() == [-1] * 4
    for row, example in zip(batch.targets, task.test, strict=True):
        assert tokenizer.decode(row[row != -100]) == example.completion + "<|im_end|>\n"
    # A conversation among other examples is still one.
    mixed = [Example("x", completion="y"), task.test[0]]
    assert encoder.prompts(mixed)[1] == encoder.prompts([task.test[0]])[0]


def test_evaluation_reads_conversations(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config).eval()
    task = loaded()
    encoder = Encoder.for_task(tokenizer, task, 200)
    total, tokens = 0.0, 0
    for example in task.test:
        turns = [{"role": role, "content": content} for role, content in example.messages]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        target = len(tokenizer(example.completion + "<|im_end|>\n")["input_ids"])
        with torch.no_grad():
            labels = torch.tensor([[-100] * (len(ids) - target) + ids[-target:]])
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * target
        tokens += target
    metrics = evaluate(model, task.test, encoder, 3)
    assert metrics.loss == pytest.approx(total / tokens, rel=1e-5)
    assert (metrics.accuracy, metrics.accuracy_norm) == (None, None)


def test_long_conversations_are_cut_in_front_and_long_answers_behind(tokenizer):
    example = loaded().test[1]
    whole, short = Encoder(tokenizer, "{text}", max_tokens=200), Encoder(tokenizer, "{text}", max_tokens=6)
    assert short.prompts([example])[0] == whole.prompts([example])[0][-6:]
    assert short.encoded([example])[0][1] == whole.encoded([example])[0][1][:6]


def test_a_tokenizer_without_a_template_gives_one_clear_line(tokenizer):
    bare = AutoTokenizer.from_pretrained(smollm2_folder())
    bare.chat_template = None
    encoder = Encoder(bare, "{text}", max_tokens=200)
    with pytest.raises(UserError, match=r'the tokenizer has no chat template; .* set data\.chat = "plain"'):
        encoder.training_batch(loaded().test)
    bare.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(UserError, match=r"refuses a conversation \(roles must\); set data\.chat") as caught:
        encoder.training_batch(loaded().test)
    assert "\n" not in str(caught.value)
    bare.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="changes the prompt when the answer is added"):
        render(bare, Example("x", completion="y", messages=(("user", "x"), ("assistant", "y"))), ChatForm())


def test_plain_lines_for_models_without_a_template(tokenizer):
    task = loaded(chat="plain")
    encoder = Encoder.for_task(tokenizer, task, 200)
    ((prompt, answer),) = encoder.encoded([task.test[1]])
    assert tokenizer.decode(prompt) == (
        "User: Hi there\n\nAssistant: Hello! How can I help you?\n\nUser: What is two plus three?\n\nAssistant:"
    )
    assert tokenizer.decode(answer) == " Two plus three is five." + tokenizer.eos_token
    own = loaded(chat="plain", template="{text}\nBot:")
    assert own.template == "{text}\nBot:"


def test_plain_prompts_keep_the_last_question(tokenizer):
    task = loaded(chat="plain")
    whole = Encoder.for_task(tokenizer, task, 200).prompts([task.test[1]])[0]
    cut = Encoder.for_task(tokenizer, task, 16).prompts([task.test[1]])[0]
    assert cut == whole[-16:]
    assert tokenizer.decode(cut).endswith("\n\nUser: What is two plus three?\n\nAssistant:")


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": TALK},
        {"messages": SHARED},
        {"conversation": [{"from": "User", "value": "q"}, {"from": " ChatGPT", "value": "a"}]},
        {"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": "the first message again", "prompt_id": "7", "messages": TALK},
        {"messages": None, "prompt": "q", "completion": "a"},
    ],
)
def test_every_schema_of_instructions(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    (example,) = load_test(DataConfig(source=str(path), format="instructions")).test
    assert example.messages == (("user", "q"), ("assistant", "a"))


def test_dolly_s_context_and_a_tool_are_in_the_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    called = [TALK[0], {"role": "assistant", "content": "call"}, {"role": "function", "content": "7"}, TALK[1]]
    rows = [{"instruction": "q", "context": "about", "response": "a"}, {"messages": called}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = load_test(DataConfig(source=str(path), format="instructions", chat="plain"))
    assert [(e.text, e.completion) for e in task.test] == [
        ("User: q\n\nabout", "a"),
        ("User: q", "call"),
        ("User: q\n\nAssistant: call\n\nTool: 7", "a"),
    ]


def test_a_template_that_cannot_begin_an_answer_does_not_train_the_header(tokenizer):
    other = AutoTokenizer.from_pretrained(smollm2_folder())
    talk = [("user", "a"), ("assistant", " a ")]

    def written(template):
        other.chat_template = template
        return render(other, Example("a", completion=" a ", messages=tuple(talk)), ChatForm())

    turns = "{% for m in messages %}<|{{m['role']}}|>\n{{m['content']}}</s>\n{% endfor %}"
    assert written(turns) == ("<|user|>\na</s>\n<|assistant|>\n", " a </s>\n")
    begun = turns + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    assert written(begun) == ("<|user|>\na</s>\n<|assistant|>\n", " a </s>\n")
    # What a template puts in front of an answer by itself is for the model to say.
    thinks = begun.replace("{{m['content']}}", "{% if m['role'] == 'assistant' %}<think/>{% endif %}{{m['content']}}")
    assert written(thinks) == ("<|user|>\na</s>\n<|assistant|>\n", "<think/> a </s>\n")
    # Mistral writes an answer right behind what was asked.
    behind = "{% for m in messages %}{% if m['role'] == 'user' %}[I]{{m['content']}}[/I]{% else %}{{m['content']}}</s>"
    assert written(behind + "{% endif %}{% endfor %}") == ("[I]a[/I]", " a </s>")
