"""Named devices: data that agrees with itself, and imports nothing heavy."""

import re
import subprocess
import sys

import pytest

from hfedmoe.config.presets import PRESETS, SUSTAINED_SHARE

GIB = 1 << 30


@pytest.mark.parametrize("name", PRESETS)
def test_the_peak_follows_from_the_computation_in_the_source(name: str) -> None:
    preset = PRESETS[name]
    found = re.search(r"(\d+) [\w ]+ x ([\d.]+) GHz x (\d+) FLOP/clock", preset.source)
    assert found is not None
    units, clock, per_clock = (float(text) for text in found.groups())
    assert preset.peak_flops == pytest.approx(units * clock * 1e9 * per_clock, rel=1e-3)
    assert preset.flops == pytest.approx(SUSTAINED_SHARE * preset.peak_flops)
    assert preset.half_flops is None or preset.half_flops > preset.peak_flops


@pytest.mark.parametrize("name", PRESETS)
def test_usable_memory_is_installed_memory_less_the_reserve(name: str) -> None:
    preset = PRESETS[name]
    assert GIB / 2 < preset.installed_bytes - preset.memory_bytes <= 8 * GIB
    assert preset.device in ("cpu", "cuda", "mps")
    size = re.search(r"(\d+) GB", preset.title)
    assert size is not None
    installed = preset.installed_bytes / GIB
    assert installed == float(size[1]) or (name == "t4-16gb" and installed == 15)  # error correction takes one


def test_the_reserves() -> None:
    assert PRESETS["jetson-orin-nano-8gb"].memory_bytes == 6.5 * GIB
    assert PRESETS["raspberry-pi-5-16gb"].memory_bytes == 14.5 * GIB
    assert PRESETS["rtx-4090"].memory_bytes == 23.25 * GIB
    assert PRESETS["laptop-16gb"].memory_bytes == 12 * GIB
    assert PRESETS["apple-m2-16gb"].memory_bytes == int(16 * GIB * 2 / 3)


def test_names_can_be_typed_and_are_not_mistaken_for_memory() -> None:
    for name in PRESETS:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+", name)


def test_presets_and_budgets_import_without_torch() -> None:
    code = "import sys, hfedmoe.config.budgets; print([m for m in ('torch', 'numpy', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
