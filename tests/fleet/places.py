"""A fleet in a folder, with a front that is really reached over TLS."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfedmoe.cli import main
from hfedmoe.config import config_from_text
from hfedmoe.data.terms import terms_of
from hfedmoe.events import Silent
from hfedmoe.fleet.folder import opened
from hfedmoe.fleet.front import Board, front
from hfedmoe.fleet.offer import offer_of
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.prepare import prepare

HOST = "127.0.0.1"


def hfedmoe(*arguments: str | Path) -> int:
    """The exit code of a command that runs in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int | None)
    return code or 0


def free_port() -> int:
    """A port on loopback that nobody listens on now, below those that the system gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise AssertionError("no free port")


def new_fleet(folder: Path, *names: str) -> int:
    """Make a fleet with some invited devices below a folder; returns its port."""
    port = free_port()
    assert hfedmoe("serve", "init", HOST, "--port", str(port), "--fleet", folder / "fleet") == 0
    for name in names:
        assert hfedmoe("invite", name, "--fleet", folder / "fleet", "--out", folder) == 0
    return port


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of the tiny model."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def offering(fleet: Path, port: int, config: str) -> Iterator[Board]:
    """A front that offers a run with this configuration, without a SuperLink behind it."""
    ready = prepare(config_from_text(config, "test"), Silent())
    terms = terms_of(ready.task, ready.config.data, ready.encoder.first_token_only)
    board = Board(opened(fleet), offer=offer_of(ready, terms, "a run"))
    with front(board, HOST, port):
        yield board
