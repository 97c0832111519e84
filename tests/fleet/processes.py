"""Commands as processes of their own, for tests of what several machines do."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

WAIT_S = 240.0


class Command:
    """A running `hfedmoe` command and what it has said so far."""

    def __init__(self, log: Path, *arguments: str | Path, env: Mapping[str, str] | None = None) -> None:
        self.log, self.arguments = log, arguments
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hfedmoe", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until it has said something."""
        self.wait_for_since(0, text)

    def wait_for_since(self, begin: int, text: str) -> None:
        """Wait until it has said something after the first characters."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.said[begin:]:
            if self.process.poll() is not None:
                assert text in self.said[begin:], f"ended with {self.process.returncode}:\n{self.said}"
                return
            assert time.monotonic() < deadline, f"{text!r} was not said within {WAIT_S:.0f} s:\n{self.said}"
            time.sleep(0.1)

    def ended(self) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def commands(folder: Path) -> Iterator["Commands"]:
    """Starts commands; all are ended with the block."""
    started = Commands(folder)
    try:
        yield started
    finally:
        for command in started.all:
            command.process.terminate()
        for command in started.all:
            try:
                command.process.wait(20)
            except subprocess.TimeoutExpired:
                command.process.kill()
                command.process.wait()


class Commands:
    """The commands of a test, with a log each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[Command] = []

    def start(self, name: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Command:
        self.all.append(Command(self._folder / f"{name}.log", *arguments, env=env))
        return self.all[-1]
