"""Named devices: memory and throughput, each with its source. Pure data, cheap to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a device offers to one training process."""

    title: str
    memory_bytes: int
    """What a process may use: installed memory less what the system itself needs."""
    flops: float
    """Sustained float32 FLOP/s of a training step."""
    source: str


_GIB = 1 << 30

PRESETS: dict[str, Preset] = {
    "jetson-orin-nano-8gb": Preset("NVIDIA Jetson Orin Nano 8 GB", 6 * _GIB, 0.4e12, "to be completed"),
}
