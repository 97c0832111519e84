"""Clients that run out of memory: reported, left out of one round, and back with fewer experts."""

import errno
import gc
import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe.client.attempt import attempt, is_out_of_memory, smaller
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.regrowth import Regrowth
from hfedmoe.device import learned
from hfedmoe.device.kills import Kills, killed_for_memory
from hfedmoe.device.learned import DOINGS, Attempt, Note
from hfedmoe.device.limits import run_limited, why_no_cgroup
from hfedmoe.events import Participant, Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from hfedmoe.wire.messages import record
from hfedmoe.wire.trouble import OUT_OF_MEMORY, Trouble
from tests.federation import Federation, tiny_config

Make = Callable[..., Federation]
NO_CGROUP = why_no_cgroup() if sys.platform.startswith("linux") else "not Linux"
QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "train.batch_size=2")


def take_everything() -> None:
    """Really ask for more memory than any machine has."""
    torch.empty(10**15)


def rows(path: Path, client: int) -> list[dict[str, Any]]:
    """What metrics.jsonl says of a client, round by round."""
    lines = RunFolder.open(path).read_rounds()[1:]
    return [row for line in lines for row in line["clients"] if row["client"] == client]


def test_out_of_memory_in_a_step_is_reported_and_the_client_comes_back_with_fewer_experts(
    federation: Make, tmp_path: Path
) -> None:
    run = federation(*QUICK, "federation.rounds=3")
    failed: list[weakref.ref[Any]] = []

    def on_step(client: int, step: int, loss: float) -> None:
        if step == 2 and len(failed) < 2:
            frame = sys._getframe(1)
            while "optimizer" not in frame.f_locals:
                assert frame.f_back is not None
                frame = frame.f_back
            failed.append(weakref.ref(frame.f_locals["optimizer"]))
            take_everything()

    run.devices[1].on_step = on_step
    gc.disable()  # nothing but the client itself may clean up
    try:
        run.server.run(run.grid)
    finally:
        gc.enable()
    assert len(failed) == 2
    assert all(reference() is None for reference in failed)
    assert all(parameter.grad is None for parameter in run.prepared.model.parameters())
    first, second, third = rows(tmp_path / "run", 1)
    assert first["status"] == second["status"] == "out of memory"
    # 16 experts, of which top-2 in 4 layers need 8: a fifth of the other 8 goes, rounded up
    assert "you tried to allocate 4000000000000000 bytes" in first["reason"]
    assert first["reason"].endswith("with 16 experts; it holds 14 next round")
    assert second["reason"].endswith("with 14 experts; it holds 12 next round")
    assert (third["status"], third["resident"]) == ("ok", 12)
    lines = RunFolder.open(tmp_path / "run").read_rounds()
    assert [line["short"] for line in lines] == [False, True, True, False]
    assert all(row["status"] == "ok" for client in (0, 2, 3) for row in rows(tmp_path / "run", client))


def test_a_client_that_cannot_hold_top_k_experts_stays_out_and_says_why(federation: Make, tmp_path: Path) -> None:
    run = federation(*QUICK)
    calls = []

    def on_step(client: int, step: int, loss: float) -> None:
        calls.append(step)
        take_everything()

    run.devices[0].on_step = on_step  # 25 %: 8 experts, the fewest possible
    run.run()
    first, second = rows(tmp_path / "run", 0)
    assert calls == [1]
    assert first["status"] == second["status"] == "out of memory"
    for row in (first, second):
        assert "top-2 routing in 4 layers needs 8 experts, so it cannot take part" in row["reason"]


def test_a_first_pass_over_all_experts_that_does_not_fit_is_not_tried_again(federation: Make, tmp_path: Path) -> None:
    run = federation(*QUICK)
    device = run.devices[0]
    calls = []

    def no_room(history: Any) -> None:
        calls.append(history.rounds)
        take_everything()

    device.first_pass = no_room  # type: ignore[method-assign]
    run.run()
    first, second = rows(tmp_path / "run", 0)
    assert calls == [0]
    assert first["status"] == "out of memory"
    assert "in its first pass over all 32 experts" in first["reason"]
    assert "can be read expert by expert" in first["reason"]
    assert (second["status"], second["resident"]) == ("ok", 8)


class Watching(Silent):
    """Lets client 1 run out of memory in round 1, notes budgets, and stops the process's run where told."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.round = stop, 0
        self.budgets: list[int] = []

    def start(self, title: str, num_rounds: int, first_round: int, clients: Any, history: Any = ()) -> None:
        self.budgets = [line.budget for line in clients if isinstance(line, Participant)]

    def round_started(self, round: int) -> None:
        self.round = round
        if round == self.stop:
            raise KeyboardInterrupt

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        if (self.round, client, step) == (1, 1, 2):
            take_everything()


def test_a_resumed_run_keeps_the_learned_budget_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config(*QUICK)
    run(config, tmp_path / "whole", Watching(None))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", Watching(2))
    again = Watching(None)
    resume(tmp_path / "stopped", again)
    assert again.budgets == [8, 16, 32, 16]  # within which it may grow again
    assert [row.get("resident") for row in rows(tmp_path / "stopped", 1)] == [None, 14]
    one, other = (RunFolder.open(tmp_path / name).load_checkpoint("last") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_every_client_may_learn_even_if_it_was_to_hold_everything(federation: Make, tmp_path: Path) -> None:
    run = federation(*QUICK, "method.residency=all")
    run.devices[2].on_step = lambda client, step, loss: take_everything() if not rows(tmp_path / "run", 2) else None
    run.run()
    first, second = rows(tmp_path / "run", 2)
    assert first["status"] == "out of memory"
    assert (second["status"], second["resident"]) == ("ok", 32 - 5)
    assert rows(tmp_path / "run", 1)[1]["resident"] == 32


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        ({"status": "bored", "reason": "x"}, "status"),
        ({"status": 3}, "status"),
        ({"status": "out_of_memory"}, "neither a reason nor a code"),
        ({"status": "refused", "code": "because", "count": 1}, "code"),
        ({"status": "refused", "code": "own_data", "count": -1}, "count"),
    ],
)
def test_an_unknown_trouble_is_an_invalid_reply(facts: dict[str, object], wrong: str) -> None:
    from flwr.app import Message, Metadata

    from hfedmoe.wire import checks
    from hfedmoe.wire.messages import InvalidReplyError

    metadata = Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "train")
    with pytest.raises(InvalidReplyError, match=wrong) as caught:
        checks.trouble(Message(record(facts), metadata=metadata))  # type: ignore[call-overload]
    assert not isinstance(caught.value, checks.TroubleError)


def test_which_errors_mean_that_there_is_no_memory() -> None:
    def raised(work: Callable[[], object]) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - any error will do
            work()
        return caught.value

    def wrapped() -> None:
        try:
            take_everything()
        except RuntimeError as error:
            raise ValueError("the tensors cannot be read") from error

    assert is_out_of_memory(raised(take_everything))
    assert is_out_of_memory(raised(lambda: bytearray(1 << 62)))
    assert is_out_of_memory(raised(wrapped))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."))
    for other in (RuntimeError("size mismatch"), OSError(errno.ENOSPC, "full"), ValueError("x"), OSError("gone")):
        assert not is_out_of_memory(other)
        with pytest.raises(type(other)):
            attempt(lambda other=other: (_ for _ in ()).throw(other))
    assert attempt(lambda: 5) == 5
    trouble = attempt(take_everything)
    assert isinstance(trouble, Trouble)
    assert trouble.reason.startswith("DefaultCPUAllocator: can't allocate memory")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_budgets_shrink_by_a_fifth_of_what_is_spare_and_end_at_the_fewest(held: int, smallest: int) -> None:
    left = smaller(held, smallest)
    if held <= smallest:
        assert left == 0
    else:
        assert smallest <= left < held
        assert (left - smallest) * 5 <= (held - smallest) * 4


# Killed by the system

KILLED = """
import os, sys
from pathlib import Path
from hfedmoe.device.learned import Note
with Note(Path(sys.argv[1]), sys.argv[2]).attempting("train", int(sys.argv[3])):
    {end}
"""


def script(path: Path, end: str) -> list[str]:
    """A command that begins to train with 16 experts, and does not finish."""
    return [sys.executable, "-c", KILLED.format(end=end), str(path), "a", "16"]


class System:
    """A system whose counters a test sets."""

    def __init__(self) -> None:
        self.kills: Kills | None = Kills("boot", 5, "/group 1", 2)

    def kill(self) -> None:
        """A process of the device's group, for its memory."""
        assert self.kills is not None
        assert self.kills.machine is not None
        assert self.kills.in_group is not None
        self.kills = replace(self.kills, machine=self.kills.machine + 1, in_group=self.kills.in_group + 1)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    system = System()
    monkeypatch.setattr(learned, "kills_now", lambda: system.kills)
    return system


def cut_off(path: Path, task: str, experts: int, doing: str = "train") -> None:
    """Leave the note of an attempt that did not end."""
    with Note(path, task).attempting(doing, experts):
        left = path.read_bytes()
    path.write_bytes(left)


def test_an_attempt_killed_for_its_memory_is_found_once_and_only_by_the_same_task(
    tmp_path: Path, system: System
) -> None:
    path, before = tmp_path / "device" / "note.json", system.kills
    cut_off(path, "a", 16)
    system.kill()
    assert Note(path, "a").take_killed() == Attempt("a", "train", 16, before)
    assert Note(path, "a").take_killed() is None
    for doing in DOINGS:
        cut_off(path, "a", 3, doing)
        system.kill()
        assert Note(path, "a").take_killed() is not None, doing
    cut_off(path, "a", 16)
    system.kill()
    assert Note(path, "b").take_killed() is None
    assert not path.exists()
    with Note(path, "a").attempting("plan", 3):
        assert path.exists()
    with pytest.raises(MemoryError), Note(path, "a").attempting("plan", 3):
        raise MemoryError
    system.kill()
    assert Note(path, "a").take_killed() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counters of kills are Linux's")
def test_a_kill_by_somebody_is_none_for_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "note.json"
    assert subprocess.run(script(path, "os.kill(os.getpid(), 9)"), check=False).returncode == -9
    assert b'"machine"' in path.read_bytes()
    assert Note(path, "a").take_killed() is None
    assert "not for its memory as far as the system says" in caplog.text
    assert not path.exists()


@pytest.mark.skipif(NO_CGROUP is not None, reason=f"no cgroup can be made: {NO_CGROUP}")
def test_a_kill_for_memory_by_the_system_is_one(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    done = run_limited(script(path, "x = bytearray(1 << 30)"), 100 << 20, how="cgroup")
    assert done.killed
    found = Note(path, "a").take_killed()
    assert found is not None
    assert (found.doing, found.experts) == ("train", 16)


BEGAN = Kills("boot", 5, "/group 1", 2)


@pytest.mark.parametrize(
    ("now", "killed"),
    [
        (BEGAN, False),
        (Kills("boot", 6, "/group 1", 3), True),
        (Kills("boot", 6, "/group 1", 2), False),  # another process of the machine
        (Kills("boot", 6, "/group 2", 0), True),  # a service or a container that was started again
        (Kills("boot", 5, "/group 2", 0), False),
        (Kills("boot", 6, "", None), True),
        (Kills("boot", None, "/group 1", 3), True),  # an old kernel
        (Kills("boot", None, "/group 2", 1), False),
        (Kills("another boot", 9, "/group 1", 9), False),  # power was lost
        (None, False),
    ],
)
def test_what_shows_a_kill_for_memory(now: Kills | None, killed: bool) -> None:
    assert killed_for_memory(BEGAN, now) is killed
    assert not killed_for_memory(None, now)


def test_a_device_that_was_killed_for_its_memory_starts_with_fewer_experts_and_gets_them_back(
    federation: Make, tmp_path: Path, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Regrowth, "trained", lambda again: True)  # after every good round
    run = federation(*QUICK, "federation.rounds=2")
    for number in (1, 3):
        device, note = run.devices[number], tmp_path / f"note-{number}.json"
        device.simulated, device.notes = False, note  # as a device of its own, not a simulated one
        cut_off(note, device.place.note.task, 16)
        system.kill()
    lost = json.loads(note.read_text())
    lost["kills"]["boot"] = "before its power was lost"
    note.write_text(json.dumps(lost))
    during = []
    note = tmp_path / "note-1.json"
    run.devices[1].on_step = lambda client, step, loss: during.append(json.loads(note.read_text()))
    run.run()
    held = [[(row["status"], row["resident"]) for row in rows(tmp_path / "run", number)] for number in (1, 3)]
    assert held == [[("ok", 14), ("ok", 16)], [("ok", 16)] * 2]
    assert (during[0]["doing"], during[0]["experts"]) == ("train", 14)
    assert not note.exists()


def test_a_limit_grows_again_and_waits_longer_each_time_it_fails() -> None:
    history, place = ClientHistory.new([8] * 4), Federation(None, tiny_config(*QUICK)).devices[2].place
    out = Trouble(OUT_OF_MEMORY, "memory ran out")

    def after(rounds: int) -> int | None:
        """The limit after some good rounds; what is remembered goes through the disk."""
        nonlocal history
        for _ in range(rounds):
            place.trained(history)
        history = ClientHistory.from_tensors(history.to_tensors(), [8] * 4)
        return history.limit

    assert after(9) is None  # nothing was learned
    place.learn(out, history, "train", 32)
    assert [after(0), after(2), after(1)] == [27, 27, 31]  # a fifth of the 24 above 8 went; one more per layer
    place.learn(out, history, "train", 31)
    assert [after(0), after(5), after(1), after(6), after(9)] == [26, 26, 30, 32, 32]
    place.learn(out, history, "train", 32)
    place.learn(out, history, "train", 27)  # it had not grown in between: not twice as long
    assert [after(0), after(11), after(1)] == [23, 23, 27]
    history.limit = 0
    assert after(20) == 0  # not even the fewest fit


def test_simulated_devices_leave_no_notes(federation: Make, tmp_path: Path, system: System) -> None:
    run = federation(*QUICK, "federation.rounds=1")
    for device in run.devices:
        device.notes = tmp_path / "note.json"
    cut_off(tmp_path / "note.json", run.devices[1].place.note.task, 16)
    system.kill()
    run.run()
    assert rows(tmp_path / "run", 1)[0]["resident"] == 16
    assert (tmp_path / "note.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b'{"task": "a", "doing": "train"}',
        b'{"task": "a", "doing": "train", "experts": -3, "kills": null}',
        b'{"task": "a", "doing": "sleep", "experts": 3, "kills": null}',
        b'{"task": "a", "doing": "train", "experts": true, "kills": null}',
        b'{"task": "a", "doing": "train", "experts": 3, "kills": {"boot": "b"}}',
        b'{"task": "", "doing": "plan", "experts":3, "kills": {"boot": "", "machine": -1, "group": "", "in_group": 0}}',
    ],
)
def test_a_damaged_note_is_ignored_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Note(path, "a").take_killed() is None
    assert "is ignored" in caplog.text
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "note.json"):
        note = Note(path, "a")
        with caplog.at_level(logging.WARNING), note.attempting("train", 3):
            pass
        assert note.take_killed() is None
        assert str(path) in caplog.text
