"""Memory limits that the operating system enforces: on real processes, and on made-up control group trees."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from hfedmoe.device import launcher
from hfedmoe.device.cgroups import MemoryGroup, memory_groups
from hfedmoe.device.kills import Kills, kills_now
from hfedmoe.device.limits import LimitedRun, main, run_limited, why_no_cgroup

MB = 1 << 20
ALLOCATE = "import sys; data = b'x' * (200 << 20); print(len(data) >> 20)"  # every page is written

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory limits need Linux")
OBSTACLE = why_no_cgroup() if sys.platform.startswith("linux") else None
needs_cgroup = pytest.mark.skipif(OBSTACLE is not None, reason=f"no cgroup can be made: {OBSTACLE}")
both_ways = pytest.mark.parametrize("how", [pytest.param("cgroup", marks=needs_cgroup), "rlimit"])


def python(code: str, limit: int, how: str, timeout_s: float = 60) -> LimitedRun:
    return run_limited([sys.executable, "-c", code], limit, how=how, timeout_s=timeout_s)


def leftovers() -> set[Path]:
    return {folder for group in memory_groups() for folder in group.folder.glob("hfedmoe-*")}


def leaves_nothing(before: set[Path]) -> bool:
    """Whether no group stays that was not there before; those of other tests at work come and go."""
    new, deadline = leftovers() - before, time.monotonic() + 20
    while new and time.monotonic() < deadline:
        time.sleep(0.02)
        new &= leftovers()
    return not new


@both_ways
def test_what_fits_finishes(how: str) -> None:
    run = python(ALLOCATE, 400 * MB, how)
    assert (run.returncode, run.stdout, run.killed, run.how) == (0, "200\n", False, how)
    assert 200 * MB < run.peak_bytes < 240 * MB


@needs_cgroup
def test_a_cgroup_kills_what_does_not_fit_and_is_gone_afterwards() -> None:
    before = leftovers()
    run = python(ALLOCATE, 100 * MB, "cgroup")
    assert (run.returncode, run.stdout, run.killed) == (-signal.SIGKILL, "", True)
    assert 80 * MB < run.peak_bytes < 130 * MB
    assert run.group_peak_bytes is None or run.group_peak_bytes <= 100 * MB
    assert leaves_nothing(before)


def test_rlimit_refuses_what_does_not_fit() -> None:
    run = python(ALLOCATE, 100 * MB, "rlimit")
    assert (run.returncode, run.killed, run.group_peak_bytes) == (1, False, None)
    assert run.stderr.endswith("MemoryError\n")
    assert run.peak_bytes < 100 * MB


@needs_cgroup
def test_a_cgroup_limits_all_processes_of_the_command_together() -> None:
    child = "import time; data = b'x' * (60 << 20); time.sleep(1.5)"
    code = f"import subprocess, sys; p = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(3)]; "
    run = python(code + "sys.exit(sum(q.wait() == -9 for q in p))", 150 * MB, "cgroup")
    assert run.returncode >= 1
    assert run.killed


@both_ways
def test_the_peak_is_the_commands_own_even_if_this_process_is_larger(how: str) -> None:
    ballast = b"x" * (120 * MB)
    run = python("pass", 400 * MB, how)
    assert len(ballast) > 4 * run.peak_bytes


@both_ways
def test_after_the_timeout_everything_that_was_started_is_killed(how: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before, start = leftovers(), time.monotonic()
    script = f"sleep 60 & echo $! $$ > {pids}; wait"
    run = run_limited(["sh", "-c", script], 100 * MB, how=how, timeout_s=0.5)
    assert run.timed_out
    assert run.returncode == -signal.SIGKILL
    assert not run.killed  # not for want of memory
    assert 0.4 < time.monotonic() - start < 10
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    assert leaves_nothing(before)


@both_ways
def test_a_timeout_that_comes_before_the_command_is_there_still_ends_it(how: str) -> None:
    for _ in range(20):
        run = run_limited(["sleep", "30"], 100 * MB, how=how, timeout_s=0.001)
        assert (run.timed_out, run.returncode) == (True, -signal.SIGKILL)


@both_ways
def test_what_the_command_leaves_behind_is_killed(how: str) -> None:
    run = run_limited(["sh", "-c", "sleep 60 & echo $!"], 100 * MB, how=how, timeout_s=30)
    assert (run.returncode, run.timed_out) == (0, False)
    assert not alive(int(run.stdout))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waits for its parent does not."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.01)
    return True


@both_ways
def test_an_interrupt_takes_the_command_along(how: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = ["sh", "-c", f"echo $$ > {pids}; sleep 60"]
    before = leftovers()
    shell = [sys.executable, "-m", "hfedmoe.device.limits", "100MiB", "--how", how, "--", *command]
    # Shells let their background jobs ignore interrupts, and children inherit it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(shell, stderr=subprocess.DEVNULL, preexec_fn=heed) as process:
        deadline = time.monotonic() + 20
        while not (pids.exists() and pids.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    assert not alive(int(pids.read_text()))
    assert leaves_nothing(before)


def test_an_interrupt_before_the_command_is_there_still_ends_it() -> None:
    for delay in range(0, 60, 4):
        reading, writing = os.pipe()
        order = {"command": ["sleep", "20"], "group": None, "limit_bytes": 100 * MB, "timeout_s": None}
        command = [sys.executable, "-I", "-S", launcher.__file__, json.dumps(order | {"report": writing})]
        start = time.monotonic()
        with subprocess.Popen(command, pass_fds=[writing], start_new_session=True) as process:
            os.close(writing)
            time.sleep(delay / 1000)
            process.terminate()
            process.wait(timeout=10)
        assert time.monotonic() - start < 10
        os.close(reading)


@both_ways
def test_output_environment_and_exit_code_are_the_commands_own(how: str) -> None:
    code = "import os, sys; print(os.environ['NAME']); print('no', file=sys.stderr); sys.exit(7)"
    run = run_limited([sys.executable, "-c", code], 100 * MB, env={"NAME": "value"}, how=how)
    assert (run.returncode, run.stdout, run.stderr, run.killed) == (7, "value\n", "no\n", False)


def test_a_command_that_does_not_exist_gives_127() -> None:
    run = run_limited(["no-such-command"], 100 * MB, how="rlimit")
    assert run.returncode == 127
    assert "no-such-command: No such file" in run.stderr


def test_auto_takes_a_cgroup_if_it_can() -> None:
    assert python("pass", 100 * MB, "auto").how == ("cgroup" if OBSTACLE is None else "rlimit")


@pytest.mark.parametrize(("how", "limit"), [("ulimit", MB), ("auto", 0)])
def test_wrong_arguments_are_refused(how: str, limit: int) -> None:
    with pytest.raises(ValueError, match=f"how='{how}'"):
        run_limited(["true"], limit, how=how)


def test_from_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["64MiB", "--how", "rlimit", "--", "sh", "-c", "echo here; exit 3"]) == 3
    out, err = capfd.readouterr()
    assert out == "here\n"
    assert err.startswith("exit code 3; peak ")
    assert err.endswith("limit 64 MiB (rlimit)\n")
    assert main(["64MiB", "--how", "rlimit", "--", "sh", "-c", "kill -9 $$"]) == 128 + 9
    assert capfd.readouterr().err.startswith("killed; ")
    with pytest.raises(SystemExit, match="2"):
        main(["64", "--", "true"])
    assert '"64": expected memory with its unit' in capfd.readouterr().err


def fake_proc(folder: Path, cgroup: str, mounts: str) -> Path:
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(cgroup)
    (folder / "proc" / "mountinfo").write_text(mounts)
    return folder / "proc"


def test_groups_of_version_1_with_a_blank_in_the_mount_point(tmp_path: Path) -> None:
    top = tmp_path / "memory tree"
    (top / "a" / "b").mkdir(parents=True)
    point = str(top).replace(" ", r"\040")
    proc = fake_proc(
        tmp_path,
        "5:cpu,cpuacct:/x\n4:hugetlb,memory:/a/b\n0::/elsewhere\n",
        "30 1 0:1 / /sys/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"31 1 0:2 / {point} rw shared:4 - cgroup cgroup rw,hugetlb,memory\n"
        f"32 1 0:3 / {tmp_path} rw - cgroup2 cgroup2 rw\n",
    )
    assert memory_groups(proc) == [MemoryGroup(place, 1) for place in (top / "a" / "b", top / "a", top)]


@pytest.mark.parametrize(
    ("root", "own", "folders"),
    [
        ("/", "/a/b", ["a/b", "a", ""]),
        ("/docker/1", "/docker/1/c", ["c", ""]),  # a container shows its own part of the tree
        ("/docker/1", "/docker/1", [""]),
        ("/docker/1", "/other", [""]),
        ("/", "/../../host", [""]),  # outside the cgroup namespace
    ],
)
def test_groups_of_version_2(tmp_path: Path, root: str, own: str, folders: list[str]) -> None:
    top = tmp_path / "cgroup"
    top.mkdir()
    (top / "cgroup.controllers").write_text("cpu memory pids\n")
    proc = fake_proc(tmp_path, f"0::{own}\n", f"31 1 0:2 {root} {top} rw - cgroup2 cgroup2 rw\n")
    assert memory_groups(proc) == [MemoryGroup(top / folder, 2) for folder in folders]


def test_counters_of_kills(tmp_path: Path) -> None:
    assert kills_now(tmp_path) is None  # not Linux
    top = tmp_path / "cgroup"
    (top / "a").mkdir(parents=True)
    (top / "cgroup.controllers").write_text("memory\n")
    own = fake_proc(tmp_path, "0::/a\n", f"31 1 0:2 / {top} rw - cgroup2 cgroup2 rw\n").rename(tmp_path / "self")
    (tmp_path / "sys" / "kernel" / "random").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "random" / "boot_id").write_text("5a8a-67\n")
    group = f"{top / 'a'} {(top / 'a').stat().st_ino}"
    assert kills_now(tmp_path) == Kills("5a8a-67", None, "", None)  # hidden by a sandbox
    (tmp_path / "vmstat").write_text("nr_free_pages 8\noom_kill 47\noom_kill_disable 3\n")
    assert kills_now(tmp_path) == Kills("5a8a-67", 47, group, None)
    (top / "a" / "memory.events").write_text("oom 3\noom_kill 2\n")
    assert kills_now(tmp_path) == Kills("5a8a-67", 47, group, 2)
    (own / "cgroup").unlink()
    assert kills_now(tmp_path) == Kills("5a8a-67", 47, "", None)


def test_version_2_without_the_memory_controller_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("\n")
    assert memory_groups(fake_proc(tmp_path, "0::/\n", f"31 1 0:2 / {tmp_path} rw - cgroup2 cgroup2 rw\n")) == []


def test_no_proc_no_groups(tmp_path: Path) -> None:
    assert memory_groups(tmp_path) == []


def test_numbers_of_a_group(tmp_path: Path) -> None:
    one, two = MemoryGroup(tmp_path / "1", 1), MemoryGroup(tmp_path / "2", 2)
    files = {
        "1/memory.limit_in_bytes": "9223372036854771712\n",
        "1/memory.usage_in_bytes": "1000\n",
        "1/memory.stat": "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200\n",
        "1/memory.max_usage_in_bytes": "1500\n",
        "1/memory.memsw.limit_in_bytes": "9223372036854771712\n",
        "1/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "2/memory.max": "max\n",
        "2/memory.current": "1000\n",
        "2/memory.stat": "active_file 10\ninactive_file 20\nshmem 40\n",
        "2/memory.events": "low 0\noom 1\noom_kill 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [(g.limit_bytes, g.held_bytes, g.peak_bytes, g.oom_kills) for g in (one, two)] == [
        (None, 700, 1500, 2),
        (None, 970, None, 1),
    ]
    one.set_limit(4096)
    two.set_limit(8192)
    assert (one.limit_bytes, two.limit_bytes) == (4096, 8192)
    assert (one.folder / "memory.memsw.limit_in_bytes").read_text() == "4096"
    assert not (two.folder / "memory.swap.max").exists()  # no swap accounting, nothing to write


@needs_cgroup
def test_a_limit_inside_a_limit() -> None:
    inner = f"from hfedmoe.device.limits import run_limited; r = run_limited([{sys.executable!r}, '-c', {ALLOCATE!r}], "
    run = python(inner + "400 << 20, how='cgroup'); print(r.killed, r.returncode)", 100 * MB, "cgroup")
    assert run.stdout == "True -9\n"  # 400 MB would do, but the outer limit still holds


HELD = """
import torch
from hfedmoe.device.limits import hold_process_to
from hfedmoe.wire.trouble import OUT_OF_MEMORY, Trouble
from hfedmoe.client.attempt import attempt

assert hold_process_to(600 << 20)
kept = attempt(lambda: torch.ones(50 << 20, dtype=torch.uint8))
refused = attempt(lambda: torch.ones(600 << 20, dtype=torch.uint8))
assert not isinstance(kept, Trouble), kept
assert isinstance(refused, Trouble), refused
assert refused.status == OUT_OF_MEMORY
assert hold_process_to(None)
free = attempt(lambda: torch.ones(600 << 20, dtype=torch.uint8))
assert not isinstance(free, Trouble), free
print(refused.reason)
"""


def test_a_process_held_to_its_budget_runs_out_of_memory_inside_until_it_is_let_go():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout
