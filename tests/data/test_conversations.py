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
from hfedmoe.data.tasks import load_task, load_test, load_watched_task
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


@pytest.mark.parametrize(
    "template",
    [
        "{% set now = strftime_now %}{{ now('%Y-%-d') }}" + PLAIN,
        "{%- if strftime_now is defined %}{%- set form = '%Y-%-d' %}{{ strftime_now(form) }}{% endif %}" + PLAIN,
    ],
)
def test_the_date_is_fixed_however_a_template_asks_for_it(template: str) -> None:
    fixed = ChatForm.of(DataConfig(chat_date="2020-02-03"))
    assert render(tokenizer(template), example(*ASKED), fixed)[0] == "2020-3<user>2 + 2?</s><assistant>"
    several = tokenizer(template)
    several.chat_template = {"default": template, "tool_use": PLAIN}
    assert render(several, example(*ASKED), fixed)[0].startswith("2020-3<user>")
    spaced = tokenizer("\n  " + DATED)
    assert render(spaced, example(*ASKED), fixed)[0].startswith("\n  <system>Today is 03 February 2020</s>")


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>", "</think>"),
        ("<seed:think>", "</seed:think>"),
        ("<reason>", "</reason>"),
        ("<thought>", "</thought>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ],
)
def test_empty_thoughts_are_known_in_every_spelling(opens: str, closes: str) -> None:
    template = THINKING.replace("<think>", opens).replace("</think>", closes)
    prompt, answer = render(tokenizer(template), example(*ASKED), ChatForm())
    assert answer == "4</s>"
    assert prompt.endswith(f"{closes}\n\n")
    other = template.replace(closes, "</other>")
    assert render(tokenizer(other), example(*ASKED), ChatForm())[1].startswith(opens)


@pytest.mark.parametrize(
    ("mention", "part"),
    [
        ("{# enable_thinking #}", "reasoning_content"),
        ("{% if reasoning_content %}{% endif %}", "reasoning_content"),
        ("{# no tools here #}", "tools"),
        ("{# tool_calls #}", "tool_calls"),
    ],
)
def test_a_template_that_only_mentions_a_part_does_not_write_it(mention: str, part: str) -> None:
    if part == "tools":
        own = example(*ASKED, tools=json.dumps([{"name": "add"}]))
    else:
        value = "two twos" if part == "reasoning_content" else [{"function": {"name": "add"}}]
        own = example(*ASKED, extras=("", json.dumps({part: value})))
    with pytest.raises(UserError, match=f'has "{part}", which the tokenizer.s chat template does not know'):
        render(tokenizer(mention + PLAIN), own, ChatForm())


def test_the_system_of_a_row_is_its_first_message(tmp_path: Path) -> None:
    said = {
        "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        "system": "Be brief.",
    }
    (own,) = load_test(rows(tmp_path / "rows.jsonl", said)).test
    assert own.messages[0] == ("system", "Be brief.")
    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    (own,) = load_test(rows(tmp_path / "rows.jsonl", alpaca)).test
    assert [role for role, _ in own.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("part", "value"),
    [("history", [["a", "b"]]), ("functions", "[]x"), ("chat_template_kwargs", {"a": 1}), ("images", ["x.png"])],
)
def test_parts_of_a_row_that_cannot_be_used_are_refused_by_line(tmp_path: Path, part: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf'rows.jsonl line 1: .*"{part}".*cannot be used here'):
        load_test(rows(tmp_path / "rows.jsonl", talk(*ASKED, **{part: value})))
    for empty in (None, [], ""):
        assert load_test(rows(tmp_path / "rows.jsonl", talk(*ASKED, **{part: empty}))).test


def test_parts_of_a_message_are_used_or_refused(tmp_path: Path) -> None:
    said = talk(*ASKED, ("user", "sure?"), ("assistant", "yes"))
    said["messages"][1]["train"] = False
    (own,) = load_test(rows(tmp_path / "rows.jsonl", said)).test
    assert own.completion == "yes"
    said["messages"][3]["function_call"] = {"name": "add"}
    with pytest.raises(UserError, match=r'line 1.*has "function_call" in a message, which cannot be used'):
        load_test(rows(tmp_path / "rows.jsonl", said))
    with pytest.raises(UserError, match=r"answer"):
        load_test(rows(tmp_path / "rows.jsonl", talk(*ASKED, weight=0)))


def test_every_system_message_is_merged_or_refused(tmp_path: Path) -> None:
    def merged(*turns: tuple[str, str]) -> list[tuple[str, str]]:
        config = rows(tmp_path / "rows.jsonl", talk(*turns)).model_copy(update={"chat_system": "merge"})
        return list(load_test(config).test[-1].messages)

    assert merged(("system", "A"), ("system", "B"), *ASKED)[0] == ("user", "A\n\nB\n\n2 + 2?")
    later = merged(*ASKED, ("system", "C"), ("user", "sure?"), ("assistant", "yes"))
    assert [content for _, content in later] == ["2 + 2?", "4", "C\n\nsure?", "yes"]
    with pytest.raises(UserError, match=r"line 1.*without a user turn behind it"):
        merged(("user", "a"), ("system", "A"), ("assistant", "4"))


def test_watched_and_test_rows_share_no_conversation(tmp_path: Path) -> None:
    lines = [talk(*[turn for _ in range(4) for turn in ASKED]) for _ in range(30)]
    config = rows(tmp_path / "rows.jsonl", *lines).model_copy(update={"test_share": 0.5, "test_rows": 20})
    task, watch = load_watched_task(config, load_config(None, ["partition.scheme=iid"]).partition, 0, 6)
    origins = [{row.origin for row in part} for part in (task.train, task.test, watch)]
    assert all(origins)
    assert not origins[0] & origins[1]
    assert not origins[0] & origins[2]
    assert not origins[1] & origins[2]


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
