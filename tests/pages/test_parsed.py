"""The commands of all pages can be parsed: programs, options, settings, files and targets are there."""

import click
import pytest

from hfedmoe.errors import UserError
from tests.pages.blocks import BLOCKS, Block
from tests.pages.commands import check


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands_can_be_parsed(block: Block) -> None:
    assert block.commands
    for words in block.commands:
        check(words)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("hfedmoe rnu my.toml", click.UsageError),
        ("hfedmoe run my.toml --nonsense", click.UsageError),
        ("hfedmoe run my.toml another.toml", click.UsageError),
        ("hfedmoe serve my.toml --port 1", click.UsageError),
        ("hfedmoe run my.toml --set train.speed=1", UserError),
        ("hfedmoe run configs/nothing.toml", UserError),
        ("hfedmoe compare my.toml --methods nothing", UserError),
        ("hfedmoe compare my.toml --vary train.speed=1|2", UserError),
        ("docker run hfedmoe join", click.UsageError),
        ("docker build -f examples/nothing .", AssertionError),
        ("python -m benchmarks.nothing", ValueError),
        ("python -m benchmarks.expert_scores bases/olmoe-15m --nonsense", SystemExit),
        ("python tools/nothing.py", AssertionError),
        ("pip install hfedmoe[nothing]", AssertionError),
        ("make nothing", AssertionError),
        ("flwr run examples/nothing", AssertionError),
        ("nonsense", AssertionError),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        check(command.split())
