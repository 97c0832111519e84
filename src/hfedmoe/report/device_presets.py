"""The list of named devices for `plan --presets`."""

import json
import textwrap
from dataclasses import asdict

from hfedmoe.config.presets import PRESETS, SUSTAINED_SHARE
from hfedmoe.report.table import WIDTH, table
from hfedmoe.report.words import human_bytes


def as_text() -> str:
    """A table, followed by the sources of its figures."""
    lines = table(
        ["device", "type", "installed", "for a process", "sustained", "peak"],
        [
            [
                name,
                preset.device,
                human_bytes(preset.installed_bytes),
                human_bytes(preset.memory_bytes),
                human_flops(preset.flops),
                human_flops(preset.peak_flops),
            ]
            for name, preset in PRESETS.items()
        ],
    )
    lines += ["", f"Peak is float32 from the data sheet; sustained is assumed to be {SUSTAINED_SHARE:.0%} of it.", ""]
    for name, preset in PRESETS.items():
        text = f"{name}: {preset.title}. {preset.source}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def to_json() -> str:
    """All figures as JSON."""
    return json.dumps({name: asdict(preset) for name, preset in PRESETS.items()}, indent=2)


def human_flops(rate: float) -> str:
    """A speed: `46.1 GFLOP/s`, `2.4 TFLOP/s`."""
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 0.9995e12 else f"{rate / 1e9:.1f} GFLOP/s"
