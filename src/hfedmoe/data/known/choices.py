"""Multiple-choice data sets; prompts and choices are those of the task of the same name in lm-evaluation-harness 0.4.

Texts keep all their spaces, as in the harness: `acc_norm` divides by the length of a choice.
"""

import re

from hfedmoe.data.example import Example
from hfedmoe.data.known.known_set import KnownSet, Row, Wording

QUESTION = "Question: {text}\nAnswer:"
LETTERS = ("A", "B", "C", "D")


def _piqa(row: Row, wording: Wording) -> list[Example]:
    choices = (row.text("sol1", empty=True), row.text("sol2", empty=True))
    return [Example(row.text("goal", empty=True), choices, row.index_of("label", 2))]


def _hellaswag(row: Row, wording: Wording) -> list[Example]:
    context = f"{row.text('ctx_a', empty=True)} {row.text('ctx_b', empty=True).capitalize()}"
    endings = tuple(without_brackets(ending) for ending in row.texts("endings"))
    text = without_brackets(f"{row.text('activity_label', empty=True)}: {context}")
    return [Example(text, endings, row.index_of("label", len(endings)))]


def without_brackets(text: str) -> str:
    """A HellaSwag text without WikiHow's marks: `[title]` becomes the end of a sentence, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _mmlu(row: Row, wording: Wording) -> list[Example]:
    options = row.texts("choices")
    if len(options) != len(LETTERS):
        raise row.error("choices", f"must have four texts, got {len(options)}")
    lines = [
        row.text("question", empty=True).strip(),
        *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True)),
    ]
    subject = row.text("subject", empty=True).replace("_", " ")
    # Training rows have no subject.
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    return [Example(about + "\n".join(lines), LETTERS, row.index_of("answer", 4))]


def _arc(row: Row, wording: Wording) -> list[Example]:
    options = row.cell("choices")
    if not isinstance(options, dict) or not isinstance(options.get("label"), list):
        raise row.error("choices", 'must be an object such as {"text": ["x", "y"], "label": ["A", "B"]}')
    texts = row.checked_texts("choices", options.get("text"))
    labels = [str(label) for label in options["label"]]
    key = row.cell("answerKey") if row.answered else next(iter(labels), None)
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if len(labels) != len(texts) or key not in labels:
        raise row.error("answerKey", f'is "{key}", which is not a label of the {len(texts)} choices')
    return [Example(row.text("question", empty=True), texts, labels.index(key))]


PIQA = KnownSet(
    name="piqa",
    kind="choices",
    hub="baber/piqa",
    test="validation",
    columns=("goal", "sol1", "sol2", "label"),
    examples=_piqa,
    template=QUESTION,
)
HELLASWAG = KnownSet(
    name="hellaswag",
    kind="choices",
    hub="Rowan/hellaswag",
    test="validation",
    columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    examples=_hellaswag,
    template="{text}",
)
MMLU = KnownSet(
    name="mmlu",
    kind="choices",
    hub="cais/mmlu",
    subset="all",
    train="auxiliary_train",
    subset_train="validation",
    columns=("question", "subject", "choices", "answer"),
    examples=_mmlu,
    template="{text}\nAnswer:",
)
ARC_EASY = KnownSet(
    name="arc-easy",
    kind="choices",
    hub="allenai/ai2_arc",
    subset="ARC-Easy",
    columns=("question", "choices", "answerKey"),
    examples=_arc,
    template=QUESTION,
)
ARC_CHALLENGE = KnownSet(
    name="arc-challenge",
    kind="choices",
    hub="allenai/ai2_arc",
    subset="ARC-Challenge",
    columns=("question", "choices", "answerKey"),
    examples=_arc,
    template=QUESTION,
)
