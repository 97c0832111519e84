"""A server that knows its clients by their keys."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hfedmoe.events import Watcher
from hfedmoe.server import attendance
from hfedmoe.server.members import Known, Member
from tests.federation import Federation


class Heard(Watcher):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.warnings: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Roll:
    """Knows the nodes of the in-process carrier, whose devices say that they are number 0, 1, 2, 3, the other way."""

    def __init__(self, names: list[str], come: int, most: int | None = None, more: int = 1) -> None:
        self.names, self.come, self.most, self.more = names, come, most, more

    def expected(self) -> list[str]:
        return self.names

    def here(self, grid: Any) -> dict[int, Known]:
        nodes = sorted(grid.get_node_ids())[: self.come]
        self.come += self.more
        last = len(self.names) - 1
        return {node: Known(last - i, self.names[last - i], self.most) for i, node in enumerate(nodes)}


def asked(federation: Federation, roll: Roll, watcher: Heard) -> dict[int, Member]:
    server = federation.server
    server.watcher, server.roll = watcher, roll
    here = server.attendance(federation.grid)
    here.gather()
    return here.members


def test_number_and_name_come_from_the_roll_whatever_a_client_says(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "WAIT_S", 0.0)
    ready, heard = federation(), Heard()
    names = ["north", "south", "east", "west"]
    found = asked(ready, Roll(names, come=2), heard)
    assert [member.about.name for member in found.values()] == names
    rows = [len(device.examples) for device in ready.devices]
    assert [member.about.examples for member in found.values()] == rows[::-1]
    assert heard.phases == [
        "2 of 4 here, waiting for north, south",
        "3 of 4 here, waiting for north",
        "4 of 4 here",
    ]


def test_a_start_waits_for_a_sign_of_life_from_who_owes_one(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Owing(Roll):
        looks = 0

        def here(self, grid: Any) -> dict[int, Known]:
            self.looks += 1
            found = super().here(grid)
            return {node: replace(one, overdue=one.name == "east" and self.looks < 3) for node, one in found.items()}

    monkeypatch.setattr(attendance, "WAIT_S", 0.0)
    ready, heard = federation(), Heard()
    assert len(asked(ready, Owing(["north", "south", "east", "west"], come=4), heard)) == 4
    assert heard.phases == ["3 of 4 here, waiting for east", "4 of 4 here"]


def test_who_comes_between_two_looks_at_the_carrier_is_waited_for(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The carrier is asked who is connected, and then the roll, which asks again who they are."""
    known, come = attendance.connected, iter([1, 3, 4, 4, 4, 4])

    def connected(grid: Any) -> Any:
        return {node: session for node, session in known(grid).items() if node <= number}

    monkeypatch.setattr(attendance, "WAIT_S", 0.0)
    monkeypatch.setattr(attendance, "connected", connected)
    number = 0

    class Late(Roll):
        def here(self, grid: Any) -> dict[int, Known]:
            nonlocal number
            number = next(come)
            return super().here(grid)

    ready, heard = federation(), Heard()
    assert len(asked(ready, Late(["north", "south", "east", "west"], come=4), heard)) == 4
    assert heard.phases[-1] == "4 of 4 here"
    assert len(heard.phases) == 4


def test_a_client_counts_for_no_more_rows_than_the_roll_allows(federation: Callable[..., Federation]) -> None:
    ready, heard = federation(), Heard()
    found = asked(ready, Roll(["a", "b", "c", "d"], come=4, most=10), heard)
    rows = [len(device.examples) for device in ready.devices][::-1]
    assert max(rows) > 10
    assert [member.weight for member in found.values()] == [min(10, number) for number in rows]
    assert f"a says that it has {rows[0]} rows; it counts as 10 (the roster's limit)" in heard.warnings


def test_who_is_on_the_roll_may_have_any_number(federation: Callable[..., Federation]) -> None:
    """The roll may have grown since the run began."""

    class Longer(Roll):
        def here(self, grid: Any) -> dict[int, Known]:
            return {node: replace(one, client=one.client + 10) for node, one in super().here(grid).items()}

    ready, heard = federation(), Heard()
    found = asked(ready, Longer(["a", "b", "c", "d"], come=4), heard)
    assert list(found) == [10, 11, 12, 13]
    assert heard.warnings == []


def test_after_the_time_is_up_those_who_are_here_begin(federation: Callable[..., Federation]) -> None:
    ready, heard = federation("federation.connect_timeout_s=0.01"), Heard()
    roll = Roll(["a", "b", "c", "d"], come=3, more=0)
    assert list(asked(ready, roll, heard)) == [1, 2, 3]
    assert heard.phases[0] == "3 of 4 here, waiting for a"


def test_a_run_that_ends_early_keeps_its_rounds(federation: Callable[..., Federation]) -> None:
    ready = federation()
    ready.server.ends_early = lambda: True
    ready.run()
    assert ready.server.round == 1
    assert ready.server.keeper.folder is not None
    assert ready.server.keeper.folder.saved_rounds()[-1] == 1
