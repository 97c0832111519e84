"""What a device remembers of a run."""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from hfedmoe.client.lasting import PREFIX
from hfedmoe.errors import UserError
from hfedmoe.fleet.memory import ROUNDS, RUNS, RunMemory

RUN = "0" * 32


def state(number: int) -> RecordDict:
    return RecordDict({"history": ConfigRecord({"blob": bytes([number]), "ok": True})})


def told(found: RecordDict) -> int | None:
    history = found.config_records.get("history")
    return None if history is None else history["blob"][0]  # type: ignore[index,return-value]


def test_a_state_is_there_after_a_restart_and_is_another_runs_never(tmp_path: Path) -> None:
    assert told(RunMemory(tmp_path, RUN).recall()) is None
    RunMemory(tmp_path, RUN).keep(state(5))
    assert told(RunMemory(tmp_path, RUN).recall()) == 5
    assert told(RunMemory(tmp_path, "1" * 32).recall()) is None


def test_a_round_that_begins_again_begins_with_the_same_state(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, RUN)
    for round in (1, 2, 3):
        memory.recall(round, plans=True)
        memory.keep(state(round))
    assert told(memory.recall(3, plans=True)) == 2  # the server was killed in round 3, and asks for it again
    memory.keep(state(33))
    assert told(memory.recall(2, plans=True)) == 1  # and now it goes on from round 1
    memory.keep(state(22))
    assert told(memory.recall(3, plans=True)) == 22
    assert told(memory.recall()) == 22


def test_a_round_that_was_planned_with_the_one_before_can_begin_again_too(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, RUN)
    assert told(memory.recall(1, plans=True)) is None
    memory.keep(state(10))  # planned
    assert told(memory.recall(1)) == 10
    memory.keep(state(11))  # trained, and round 2 planned
    assert told(memory.recall(2)) == 11
    memory.keep(state(22))
    # The server was killed in round 2: it asks what the device will hold, and then to train.
    assert told(memory.recall(2, plans=True)) == 11
    memory.keep(state(20))
    assert told(memory.recall(2)) == 20
    # And now it goes on from before round 1.
    assert told(memory.recall(1, plans=True)) is None


def test_what_lasts_is_there_when_a_round_begins_again(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, RUN)
    memory.recall(1, plans=True)
    kept = state(10)
    for round, request in ((2, "a"), (3, "b")):
        kept[f"{PREFIX}measured"] = ConfigRecord({"request": request})
        memory.keep(kept)
        memory.recall(round, plans=True)
    for round in (2, 1):  # the server goes on from ever earlier rounds
        found = memory.recall(round, plans=True)
        assert told(found) == (10 if round == 2 else None)
        assert found.config_records[f"{PREFIX}measured"]["request"] == "b"


def test_old_rounds_and_old_runs_are_deleted(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, RUN)
    for round in range(1, 20):
        memory.recall(round)
        memory.keep(state(round))
    assert len(list((tmp_path / RUN).iterdir())) == ROUNDS + 1
    for run in range(1, 2 * RUNS):
        RunMemory(tmp_path, f"{run:032x}").keep(state(run))
    assert len(list(tmp_path.iterdir())) == RUNS
    assert told(RunMemory(tmp_path, f"{2 * RUNS - 1:032x}").recall()) == 2 * RUNS - 1


@pytest.mark.parametrize("key", ["", "..", "../../etc", "0" * 31, "G" * 32, "None", "0" * 32 + "\n"])
def test_a_key_from_the_server_names_no_other_folder(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid"):
        RunMemory(tmp_path, key)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    memory = RunMemory(tmp_path, RUN)
    memory.keep(state(1))
    (tmp_path / RUN / "now").write_bytes(b"\xff\xff\xff")
    with pytest.raises(UserError, match=r"now: is damaged"):
        memory.recall()
