"""What the machine offers: real measurements, and limits on made-up process folders."""

import mmap
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from hfedmoe.device import probe as module
from hfedmoe.device.limits import run_limited, why_no_cgroup
from hfedmoe.device.probe import Probe, available_memory, matmul_flops, probe, read_speed

MB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_groups", list)
    monkeypatch.setattr(module, "_resource_limits", list)


def test_without_limits_it_is_free_memory_and_what_the_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    no_limits(monkeypatch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000 * MB))
    monkeypatch.setattr(
        psutil.Process, "memory_info", lambda self: types.SimpleNamespace(rss=300 * MB, shared=100 * MB)
    )
    assert available_memory() == (1200 * MB, "free physical memory")
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: types.SimpleNamespace(rss=300 * MB))  # not Linux
    assert available_memory() == (1300 * MB, "free physical memory")


@linux
def test_what_this_process_allocates_does_not_change_what_it_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000 * MB))
    before, _ = module._physical()[0]
    # Pages of its own: what malloc gives may have been resident before.
    with mmap.mmap(-1, 100 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as data:
        data.write(b"x" * len(data))
        after, _ = module._physical()[0]
    assert after - before == pytest.approx(100 * MB, abs=4 * MB)  # as psutil's figure would fall by that


def fake_proc(folder: Path, version: int, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    kind, member = ("cgroup2 cgroup2 rw", "0::/a/b") if version == 2 else ("cgroup cgroup rw,memory", "3:memory:/a/b")
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(f"{member}\n")
    (folder / "proc" / "mountinfo").write_text(f"31 1 0:2 / {folder / 'top'} rw - {kind}\n")
    return folder / "proc"


def test_room_in_groups_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_own_bytes", lambda: 50)
    proc = fake_proc(
        tmp_path,
        2,
        {
            "top/cgroup.controllers": "memory\n",
            "top/a/memory.max": "1000\n",
            "top/a/memory.current": "900\n",  # 300 of it can be dropped
            "top/a/memory.stat": "anon 600\nactive_file 100\ninactive_file 200\n",
            "top/a/b/memory.max": "max\n",
            "top/a/b/memory.current": "50\n",
        },
    )
    assert module._groups(proc) == [(1000 - 600 + 50, f"limit of the control group {tmp_path / 'top/a'}")]


def test_room_in_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_own_bytes", lambda: 800)  # more than the group knows of: it came from elsewhere
    none = "9223372036854771712\n"
    proc = fake_proc(
        tmp_path,
        1,
        {
            "top/memory.limit_in_bytes": none,
            "top/a/memory.limit_in_bytes": none,
            "top/a/b/memory.limit_in_bytes": "1000\n",
            "top/a/b/memory.usage_in_bytes": "700\n",
            "top/a/b/memory.stat": "total_active_file 0\ntotal_inactive_file 50\n",
        },
    )
    assert module._groups(proc) == [(1000, f"limit of the control group {tmp_path / 'top/a/b'}")]


@linux
@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_resource_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import resource

    (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t  600 kB\nVmRSS:\t  100 kB\nVmData:\t  250 kB\n")
    limits = {getattr(resource, name): (2 * MB, resource.RLIM_INFINITY)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, unlimited))
    reserved = {"RLIMIT_DATA": 150, "RLIMIT_AS": 500}[name] * 1024  # counted by the limit, but not in use
    assert module._resource_limits(tmp_path) == [(2 * MB - reserved, name)]
    assert module._resource_limits(tmp_path / "nothing") == [(2 * MB, name)]  # macOS has no /proc


@linux
@pytest.mark.parametrize("how", ["cgroup", "rlimit"])
def test_a_limited_process_finds_its_limit(how: str) -> None:
    if how == "cgroup" and (obstacle := why_no_cgroup()):
        pytest.skip(f"no cgroup can be made: {obstacle}")
    code = "from hfedmoe.device.probe import available_memory; print(*available_memory(), sep='|')"
    run = run_limited([sys.executable, "-c", code], 300 * MB, how=how)
    assert run.returncode == 0, run.stderr
    memory, limit = run.stdout.strip().split("|")
    assert 290 * MB < int(memory) <= 300 * MB
    assert limit == "RLIMIT_DATA" if how == "rlimit" else "control group" in limit


def test_the_accelerator_counts_what_torch_has_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * MB, 8 * MB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * MB)
    assert available_memory("cuda:1") == (7 * MB, "free memory of cuda:1")


def test_metal_shares_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    no_limits(monkeypatch)
    monkeypatch.setattr(module, "_physical", lambda: [(900 * MB, "free physical memory")])
    for recommended, expected in ((700 * MB, 700 * MB), (1000 * MB, 900 * MB)):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda value=recommended: value)
        assert available_memory("mps")[0] == expected


def test_speed_of_matrix_products_is_what_a_product_takes() -> None:
    import torch

    flops = matmul_flops()
    a = torch.rand(512, 512)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    assert 0.02 < flops * best / (2 * 512**3) < 50  # the unit is right, however busy the machine


def test_reading_speed(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(bytes(8 * MB))
    start = time.perf_counter()
    speed = read_speed(file)
    assert speed >= 8 * MB / (time.perf_counter() - start)
    assert read_speed(file, at_most=MB) > 0
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        read_speed(tmp_path / "empty")


def test_everything_at_once(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    file.write_bytes(bytes(MB))
    found = probe(file=file)
    assert isinstance(found, Probe)
    assert found.memory_bytes == pytest.approx(available_memory()[0], rel=0.5)
    assert found.flops > 1e8
    assert found.disk_bytes_per_s is not None
    assert found.disk_bytes_per_s > 0
    assert probe().disk_bytes_per_s is None


def test_memory_is_measured_without_torch() -> None:
    code = "import sys; from hfedmoe.device.probe import available_memory as a; a(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
