"""Python code for the model card that loads and prompts an export."""

from dataclasses import dataclass

from hfedmoe.config import DataConfig, RunConfig
from hfedmoe.data.known import known_set
from hfedmoe.data.templates import template_of
from hfedmoe.export.classifying import Classifier, classifying_code

ANSWER_TOKENS, TURN_TOKENS = 4, 64
"""Tokens that the code generates: for a label or choice, and for the beginning of a conversation turn."""


@dataclass(frozen=True)
class Loading:
    """Facts about the files that the code depends on."""

    dtype: str
    encoder_decoder: bool = False
    base: str | None = None
    """Of an adapter: its base model, as a hub id or a path, relative to the adapter's folder."""
    base_inside: bool = False
    """Whether the base is a folder in the export."""
    classifier: Classifier | None = None
    """Of a task with labels: how the model says each."""


def loading_code(config: RunConfig, files: Loading) -> str:
    """Code that loads the export from the current folder, and prints the labels of a text or the model's output."""
    auto = "AutoModelForSeq2SeqLM" if files.encoder_decoder else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    peft = ["from peft import PeftModel"] if files.base is not None else []
    torch = ["import torch"] if files.classifier is not None else []
    code = [*torch, *peft, f"from transformers import {auto}, AutoTokenizer", "", 'folder = "."  # where this file is']
    if files.base is None:
        code += [f'model = {auto}.from_pretrained(folder, dtype="{files.dtype}"{trust})']
    else:
        where = f'f"{{folder}}/{files.base}"' if files.base_inside else repr(files.base)
        revision = f", revision={config.model.revision!r}" if config.model.revision and not files.base_inside else ""
        if config.model.dtype != "float32":
            code += ["# With a 16-bit base, PEFT would round the adapter to 16 bit."]
        code += [f'base = {auto}.from_pretrained({where}{revision}, dtype="float32"{trust})']
        code += ["model = PeftModel.from_pretrained(base, folder)"]
    code += [f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"]
    if files.classifier is not None:
        return "\n".join([*code, *classifying_code(files.classifier)])
    return "\n".join([*code, *_prompting(config.data), "print(tokenizer.decode(output[0]))"])


def prompt_words(data: DataConfig) -> str:
    """The prompts of a run and their maximum length, in words."""
    if by_chat_template(data):
        return f"the tokenizer's chat template, cut to the last {data.max_tokens} tokens"
    return f"`{template_of(data, known_set(data))!r}`, at most {data.max_tokens} tokens"


def by_chat_template(data: DataConfig) -> bool:
    """Whether the tokenizer's chat template wrote the prompts."""
    known = known_set(data)
    return known is not None and known.name == "instructions" and data.chat == "template"


def _prompting(data: DataConfig) -> list[str]:
    if by_chat_template(data):
        return [
            'messages = [{"role": "user", "content": "..."}]',
            "prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            # The template writes the special tokens itself.
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)',
            f"output = model.generate(**inputs, max_new_tokens={TURN_TOKENS})",
        ]
    known = known_set(data)
    talk = known is not None and known.name == "instructions"
    prompt = template_of(data, known).replace("{text}", "User: ..." if talk else "...")
    return [
        f'inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)',
        f"output = model.generate(**inputs, max_new_tokens={TURN_TOKENS if talk else ANSWER_TOKENS})",
    ]
