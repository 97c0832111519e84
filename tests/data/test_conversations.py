"""What conversations have beside roles and texts, and what a chat template makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfedmoe.config import DataConfig, load_config
from hfedmoe.data.chat import ChatForm, render
from hfedmoe.data.example import Example
from hfedmoe.data.partition import partition
from hfedmoe.data.tasks import load_task, load_test
from hfedmoe.errors import UserError
from hfedmoe.prepare import with_chat_date

# Templates of our own with the mechanisms that are met: thoughts, tools, dates, a system role that is refused.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLING = (
    "{% if tools %}<tools>{{ tools | tojson }}</s>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "<system>Today is {{ strftime_now('%d %B %Y') }}</s>" + PLAIN
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    own.chat_template = template
    return own


def rows(path: Path, *lines: dict[str, Any]) -> DataConfig:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(source=str(path), format="instructions")


def talk(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


def example(*turns: tuple[str, str], **more: Any) -> Example:
    return Example(turns[-2][1], completion=turns[-1][1], messages=tuple(turns), **more)


ASKED = (("user", "2 + 2?"), ("assistant", "4"))


def test_an_empty_block_of_thoughts_is_not_learned() -> None:
    prompt, answer = render(tokenizer(THINKING), example(*ASKED), ChatForm())
    assert prompt == "<user>2 + 2?</s><assistant><think>\n\n</think>\n\n"
    assert answer == "4</s>"


def test_thoughts_that_a_row_has_are_learned() -> None:
    own = example(*ASKED, extras=("", json.dumps({"reasoning_content": "two twos"})))
    prompt, answer = render(tokenizer(THINKING), own, ChatForm())
    assert prompt == "<user>2 + 2?</s><assistant>"
    assert answer == "<think>\ntwo twos\n</think>\n\n4</s>"


def test_arguments_reach_the_template() -> None:
    quick = ChatForm.of(DataConfig(chat_arguments={"enable_thinking": False}))
    assert render(tokenizer(THINKING), example(*ASKED), quick)[1] == "4</s>"
    assert load_config(None, ["data.chat_arguments={enable_thinking=false}"]).data.chat_arguments == {
        "enable_thinking": False
    }


def test_tools_and_calls_are_written_or_refused_by_line(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    said = {"messages": [{"role": "user", "content": "2 + 2?"}, call], "tools": [{"name": "add"}]}
    (own,) = load_test(rows(tmp_path / "rows.jsonl", said)).test
    prompt, answer = render(tokenizer(CALLING), own, ChatForm())
    assert prompt == '<tools>[{"name": "add"}]</s><user>2 + 2?</s><assistant>'
    assert answer == "[add]</s>"
    with pytest.raises(UserError, match=r'has "tool_calls", which the tokenizer\'s chat template does not know'):
        render(tokenizer(PLAIN), own, ChatForm())
    thought = example(*ASKED, extras=("", json.dumps({"reasoning_content": "x"})))
    with pytest.raises(UserError, match='has "reasoning_content"'):
        render(tokenizer(PLAIN), thought, ChatForm())
    plain = rows(tmp_path / "rows.jsonl", said).model_copy(update={"chat": "plain"})
    with pytest.raises(UserError, match=r"rows.jsonl line 1.*cannot write"):
        load_test(plain)


def test_an_answer_of_weight_0_is_context_only(tmp_path: Path) -> None:
    said = talk(*ASKED, ("user", "sure?"), ("assistant", "yes"))
    said["messages"][1]["weight"] = 0
    said["messages"][3]["weight"] = 1
    (own,) = load_test(rows(tmp_path / "rows.jsonl", said)).test
    assert own.completion == "yes"
    assert len(own.messages) == 4
    said["messages"][1]["weight"] = 0.5
    with pytest.raises(UserError, match=r'line 1.*has "weight": 0.5; 1 learns an answer and 0 does not'):
        load_test(rows(tmp_path / "rows.jsonl", said))


def test_a_system_message_can_be_merged_into_the_first_turn(tmp_path: Path) -> None:
    config = rows(tmp_path / "rows.jsonl", talk(("system", "Be brief."), *ASKED))
    (own,) = load_test(config).test
    with pytest.raises(UserError, match=r"refuses a conversation \(no system role\)"):
        render(tokenizer(NO_SYSTEM), own, ChatForm())
    (merged,) = load_test(config.model_copy(update={"chat_system": "merge"})).test
    assert render(tokenizer(NO_SYSTEM), merged, ChatForm())[0] == "<user>Be brief.\n\n2 + 2?</s><assistant>"


def test_the_date_of_a_template_is_fixed_by_the_run(tmp_path: Path) -> None:
    fixed = ChatForm.of(DataConfig(chat_date="2026-02-03"))
    assert render(tokenizer(DATED), example(*ASKED), fixed)[0].startswith("<system>Today is 03 February 2026</s>")
    config = load_config(None, [])
    settings = config.model_copy(update={"data": rows(tmp_path / "rows.jsonl", talk(*ASKED))})
    task = load_test(settings.data)
    begun = with_chat_date(settings, tokenizer(DATED), task)
    assert begun.data.chat_date is not None  # the day on which the run begins
    later = begun.model_copy(update={"data": begun.data.model_copy(update={"chat_date": "2026-01-01"})})
    assert with_chat_date(later, tokenizer(DATED), task).data.chat_date == "2026-01-01"
    assert with_chat_date(settings, tokenizer(DATED), task, told="2025-12-31").data.chat_date == "2025-12-31"
    assert with_chat_date(settings, tokenizer(PLAIN), task) is settings
    with pytest.raises(UserError, match=r"data\.chat_date"):
        load_config(None, ["data.chat_date=tomorrow"])


def test_a_missing_template_file_is_named() -> None:
    with pytest.raises(UserError, match=r"the file chat_template.jinja is missing here: download the whole folder"):
        render(tokenizer(None), example(*ASKED), ChatForm())


def test_the_answers_of_one_conversation_stay_with_one_client(tmp_path: Path) -> None:
    lines = [talk(*[turn for _ in range(1 + n % 4) for turn in ASKED]) for n in range(30)]
    config = rows(tmp_path / "rows.jsonl", *lines)
    settings = load_config(None, ["partition.scheme=iid", "partition.min_rows=1"])
    task = load_task(config, settings.partition, 0)
    parts = partition(task, settings.partition, 4, 0)
    assert sorted(row for part in parts for row in part) == list(range(len(task.train)))
    owners: dict[str, set[int]] = {}
    for client, part in enumerate(parts):
        for row in part:
            owners.setdefault(task.train[row].origin, set()).add(client)
    assert all(len(own) == 1 for own in owners.values())
    assert max(map(len, parts)) - min(map(len, parts)) <= 4
