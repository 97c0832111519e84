"""Python code for the model card that names the label of a text, with the scores that the run was measured with."""

import json
from dataclasses import dataclass

from hfedmoe.config import RunConfig
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.known import known_set
from hfedmoe.data.labels import label_words
from hfedmoe.data.task import Task
from hfedmoe.data.templates import template_of
from hfedmoe.models.loaded import Loaded


@dataclass(frozen=True)
class Classifier:
    """What the code needs: how a text becomes a prompt, and how the model says each label."""

    answers: dict[str, list[int]]
    """Label -> the tokens with which the model says it."""
    head: list[int]
    tail: list[int]
    """Tokens of the prompt before and after the text."""
    room: int
    """Most tokens of the text."""
    lead: str
    """White space of the template in front of the text, which is tokenised with it."""
    begins: bool
    """Whether the text begins the prompt."""
    first_token: bool
    """Whether labels are compared by their first token, else by all."""
    start: int | None
    """Of an encoder-decoder model: the first token of its decoder."""


def classifier_of(config: RunConfig, labels: tuple[str, ...], loaded: Loaded) -> Classifier:
    """The classifier of a run, for its tokenizer. Raises UserError if the template or a word does not fit it."""
    known = known_set(config.data)
    words = label_words(labels, config.data) if known is None else known.wording(config.data).words
    row = Example("", words, 0)
    task = Task("", "classification", template_of(config.data, known, "classification"), labels, [], [row])
    encoder = Encoder.for_task(
        loaded.tokenizer, task, config.data.max_tokens, loaded.encoder_decoder, loaded.decoder_start_token_id
    )
    first = encoder.first_token_only and config.evaluation.scoring != "loglikelihood"
    frame = encoder.frame
    return Classifier(
        answers={
            label: tokens[:1] if first else tokens for label, tokens in zip(labels, encoder.choices(row), strict=True)
        },
        head=frame.head,
        tail=frame.tail,
        room=frame.room,
        lead=frame.lead,
        begins=frame.begins,
        first_token=first,
        start=loaded.decoder_start_token_id if loaded.encoder_decoder else None,
    )


def classifying_code(known: Classifier) -> list[str]:
    """Lines that define `classify` and print what it makes of a text; `model` and `tokenizer` are loaded."""
    answers = ", ".join(f"{json.dumps(label, ensure_ascii=False)}: {tokens}" for label, tokens in known.answers.items())
    lead = json.dumps(known.lead)
    text = [f"    words = tokens({lead} + text.strip())"]
    if not known.begins:  # some tokenizers mark the beginning of every text
        text = [
            f'    before, words = tokens("a"), tokens("a" + {lead} + text.strip())',
            f"    words = words[len(before) :] if words[: len(before)] == before else tokens({lead} + text.strip())",
        ]
    return [
        "",
        f"answers = {{{answers}}}  # label -> the tokens with which the model says it",
        f"head, tail = {known.head}, {known.tail}  # the tokens around a text",
        "",
        "",
        "def tokens(text):",
        '    return tokenizer(text, add_special_tokens=False)["input_ids"]',
        "",
        "",
        "def classify(text):",
        '    """The probability of each label."""',
        *text,
        f"    prompt = head + words[:{known.room}] + tail",
        "    with torch.no_grad():",
        *(_by_first_token(known) if known.first_token else _by_whole_answers(known)),
        "    return dict(zip(answers, scores.softmax(0).tolist()))",
        "",
        "",
        'print(classify("..."))',
    ]


def _by_first_token(known: Classifier) -> list[str]:
    inputs = "torch.tensor([prompt])"
    if known.start is not None:
        inputs += f", decoder_input_ids=torch.tensor([[{known.start}]])"
    return [f"        scores = model({inputs}).logits[0, -1, [first for (first,) in answers.values()]].float()"]


def _by_whole_answers(known: Classifier) -> list[str]:
    inputs, logits = "torch.tensor([prompt + answer[:-1]])", "logits[0, -len(answer) :]"
    if known.start is not None:
        inputs = f"torch.tensor([prompt]), decoder_input_ids=torch.tensor([[{known.start}] + answer[:-1]])"
    return [
        "        scores = []",
        "        for answer in answers.values():",
        f"            found = model({inputs}).{logits}.float().log_softmax(-1)",
        "            scores.append(found[range(len(answer)), answer].sum())",
        "        scores = torch.stack(scores)",
    ]
