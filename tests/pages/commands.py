"""Whether a command could be run, as far as its words tell: its options, settings, files and targets exist."""

import argparse
import re
import runpy
import sys
import tomllib

import click
import pytest
import typer.main

from hfedmoe.cli import app
from hfedmoe.cli.opening import load
from hfedmoe.compare.grid import points_of, seeds_of
from hfedmoe.compare.rows import rows_of
from hfedmoe.config import load_config
from tests.pages.blocks import ROOT


def context_of(words: list[str]) -> click.Context:
    """The parsed arguments of a command line after `hfedmoe`. Raises click's errors."""
    command = typer.main.get_command(app)
    context = command.make_context("hfedmoe", list(words), resilient_parsing=False)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(name, rest, parent=context)
    return context


def check_hfedmoe(words: list[str]) -> None:
    """Options, values, settings, methods, seeds and points of a command are valid."""
    if words in (["--help"], ["--version"]):
        return
    params = context_of(words).params
    settings = list(params.get("overrides") or [])
    config = str(params.get("config"))
    load_config(ROOT / config if config.startswith("configs/") else None, settings)
    if "methods" in params:
        for row in rows_of(params["methods"]):
            row.config(load_config(None, settings))
        seeds_of(params["seeds"])
        points_of(params["vary"] or [], lambda changes: load(None, [*settings, *changes]))


class Parsed(Exception):
    """Arguments were read without an error."""


OTHERS = ("sglang.", "llama_cpp_python-")
"""How modules and files of others begin."""


def check_python(words: list[str]) -> None:
    """`python -m MODULE` or `python FILE`: it is there, and its parser takes the options."""
    if words[words[0] == "-m"].startswith(OTHERS):
        return
    if words[0] == "-m":
        path = words[1].replace(".", "/")
        (file,) = [place / f"{path}.py" for place in (ROOT / "src", ROOT) if (place / f"{path}.py").is_file()]
        options = words[2:]
    else:
        file, options = ROOT / words[0], words[1:]
        assert file.is_file() or "/" not in words[0], words[0]  # without a folder: the page says what is in it
    if not options:
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)  # type: ignore[call-overload]
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(file), *options])
        with pytest.raises(Parsed):
            runpy.run_path(str(file), run_name="__main__")
    if "--" in options:
        check(options[options.index("--") + 1 :])


def check_pip(words: list[str]) -> None:
    """Extras of `pip install hfedmoe[...]` exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"hfedmoe\[(.*)\]", word):
            assert set(found[1].split(",")) <= extras.keys(), word


def check_docker(words: list[str]) -> None:
    """The file that an image is made of exists, and what a container is asked can be parsed."""
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file(), words
    else:
        check_hfedmoe(words[words.index("hfedmoe") + 1 :])


def check_make(words: list[str]) -> None:
    """The target exists."""
    targets = re.findall(r"^\.PHONY: (\w+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), words


def check_path(words: list[str]) -> None:
    """The first file or folder that is named exists in the repository."""
    named = [word for word in words if "/" in word]
    assert named, words
    assert (ROOT / named[0]).exists(), named[0]


def check_nothing(words: list[str]) -> None:
    """Programs of others, with options of theirs."""


CHECKS = {
    "hfedmoe": check_hfedmoe,
    "python": check_python,
    "pip": check_pip,
    "docker": check_docker,
    "make": check_make,
    "pytest": check_path,
    "flwr": check_path,
    **dict.fromkeys((".", "cat", "tar", "tensorboard", "vllm", "flower-superlink", "flower-supernode"), check_nothing),
}


def check(words: list[str]) -> None:
    """Raise unless a command could be run as far as its words tell."""
    assert words[0] in CHECKS, f"{words[0]}: a program that tests/pages/commands.py does not know"
    CHECKS[words[0]](words[1:])
