"""Named devices: memory and throughput, each with its source. Pure data, cheap to import.

A process may use the installed memory minus a reserve:

* boards whose CPU and GPU share the memory (Jetson, Raspberry Pi): 1.5 GiB for firmware and a headless system;
* CUDA cards: 0.75 GiB of the driver's memory for the context, and the libraries' kernels and workspaces;
* laptops: 4 GiB for the desktop; on Apple laptops the third that Metal reserves by default;
* servers: 8 GiB for the system and its services.

Peaks are the manufacturers' float32 figures without sparsity, recomputed in `source` as units x clock x FLOP per clock.
A training step of small matrices does not reach them: `SUSTAINED_SHARE` of the peak is an assumption, not a
measurement. To predict times for a machine that you have, use `hfedmoe.device.probe` instead.
"""

from dataclasses import dataclass

SUSTAINED_SHARE = 0.3
"""Assumed part of the float32 peak that a training step sustains."""


@dataclass(frozen=True)
class Preset:
    """What a device offers to one training process."""

    title: str
    memory_bytes: int
    """What a process may use: installed memory minus the reserve."""
    flops: float
    """Assumed sustained float32 FLOP/s of a training step."""
    source: str
    """Data sheet or product page, and how the peak is computed from it."""
    device: str
    """Device type in torch's words: "cpu", "cuda" or "mps"."""
    installed_bytes: int
    peak_flops: float
    """Float32 FLOP/s by the data sheet."""
    half_flops: float | None
    """Dense float16 matrix FLOP/s on tensor cores; None without them."""
    bandwidth: float
    """Peak memory bandwidth, bytes/s."""


_GIB = 1 << 30
_BOARD, _CARD, _LAPTOP, _SERVER = 3 * _GIB // 2, 3 * _GIB // 4, 4 * _GIB, 8 * _GIB


def _preset(
    title: str,
    device: str,
    installed: int,
    reserve: int,
    peak: float,
    bandwidth: float,
    source: str,
    half: float | None = None,
) -> Preset:
    return Preset(
        title=title,
        memory_bytes=installed - reserve,
        flops=SUSTAINED_SHARE * peak,
        source=source,
        device=device,
        installed_bytes=installed,
        peak_flops=peak,
        half_flops=half,
        bandwidth=bandwidth,
    )


_PI = (
    "Raspberry Pi 5 product brief (BCM2712, 4 Cortex-A76, 32-bit LPDDR4X-4267): 4 cores x 2.4 GHz x 16 FLOP/clock (two "
    "128-bit FMA pipes, Arm Cortex-A76 optimisation guide)"
)

PRESETS: dict[str, Preset] = {
    "raspberry-pi-5-8gb": _preset("Raspberry Pi 5, 8 GB", "cpu", 8 * _GIB, _BOARD, 153.6e9, 17.1e9, _PI),
    "raspberry-pi-5-16gb": _preset("Raspberry Pi 5, 16 GB", "cpu", 16 * _GIB, _BOARD, 153.6e9, 17.1e9, _PI),
    "jetson-orin-nano-8gb": _preset(
        "NVIDIA Jetson Orin Nano, 8 GB",
        "cuda",
        8 * _GIB,
        _BOARD,
        1.28e12,
        68e9,
        "Jetson Orin Nano Series data sheet (15 W; the later 25 W mode has 1.02 GHz and 102 GB/s): 1024 CUDA cores x "
        "0.625 GHz x 2 FLOP/clock; half precision: a quarter of the 40 sparse INT8 TOPS",
        half=10e12,
    ),
    "jetson-agx-xavier-32gb": _preset(
        "NVIDIA Jetson AGX Xavier, 32 GB",
        "cuda",
        32 * _GIB,
        _BOARD,
        1.41e12,
        136.5e9,
        "Jetson AGX Xavier Series data sheet: 512 CUDA cores x 1.377 GHz x 2 FLOP/clock; half precision as stated "
        "there (64 tensor cores)",
        half=11e12,
    ),
    "jetson-agx-orin-64gb": _preset(
        "NVIDIA Jetson AGX Orin, 64 GB",
        "cuda",
        64 * _GIB,
        _BOARD,
        5.325e12,
        204.8e9,
        "Jetson AGX Orin Series technical brief (5.3 FP32 TFLOPS): 2048 CUDA cores x 1.3 GHz x 2 FLOP/clock; half "
        "precision: a quarter of the GPU's 170 sparse INT8 TOPS",
        half=42.5e12,
    ),
    "laptop-16gb": _preset(
        "Laptop, 4 cores (Intel Core i5-1135G7), 16 GB",
        "cpu",
        16 * _GIB,
        _LAPTOP,
        307.2e9,
        51.2e9,
        "Intel product page of the Core i5-1135G7, base clock at 28 W, two channels of DDR4-3200: 4 cores x 2.4 GHz x "
        "32 FLOP/clock (two 256-bit FMA units, or one of 512 bit)",
    ),
    "apple-m2-16gb": _preset(
        "Apple M2 laptop, 10 GPU cores, 16 GB",
        "mps",
        16 * _GIB,
        16 * _GIB - 16 * _GIB * 2 // 3,
        3.58e12,
        100e9,
        "Apple's announcement of M2, June 2022 (3.6 TFLOPS, 100 GB/s): 1280 ALUs x 1.398 GHz x 2 FLOP/clock (clock as "
        "measured by reviewers); Metal's recommended working set on 16 GB is 10,922 MiB",
    ),
    "rtx-3060-12gb": _preset(
        "NVIDIA GeForce RTX 3060, 12 GB",
        "cuda",
        12 * _GIB,
        _CARD,
        12.74e12,
        360e9,
        "NVIDIA product page (boost clock): 3584 CUDA cores x 1.777 GHz x 2 FLOP/clock; half precision: 112 tensor "
        "cores at 128 FLOP per clock with float32 accumulation, as in the GA102 whitepaper",
        half=25.5e12,
    ),
    "rtx-4090": _preset(
        "NVIDIA GeForce RTX 4090, 24 GB",
        "cuda",
        24 * _GIB,
        _CARD,
        82.58e12,
        1008e9,
        "NVIDIA Ada GPU architecture whitepaper (82.6 TFLOPS): 16384 CUDA cores x 2.52 GHz x 2 FLOP/clock; half "
        "precision with float32 accumulation",
        half=165.2e12,
    ),
    "t4-16gb": _preset(
        "NVIDIA T4, 16 GB",
        "cuda",
        15 * _GIB,  # what the driver offers with ECC on: 15,360 MiB
        _CARD,
        8.14e12,
        320e9,
        "NVIDIA T4 data sheet (8.1 TFLOPS; with 70 W it stays well below): 2560 CUDA cores x 1.59 GHz x 2 FLOP/clock; "
        "error correction leaves 15 of the 16 GiB",
        half=65e12,
    ),
    "a100-80gb": _preset(
        "NVIDIA A100 SXM, 80 GB",
        "cuda",
        80 * _GIB,
        _CARD,
        19.49e12,
        2039e9,
        "NVIDIA A100 data sheet (19.5 TFLOPS float32 without TF32): 6912 CUDA cores x 1.41 GHz x 2 FLOP/clock",
        half=312e12,
    ),
    "server-32-core-128gb": _preset(
        "Server, 32 cores (AMD EPYC 7543), 128 GB",
        "cpu",
        128 * _GIB,
        _SERVER,
        2.867e12,
        204.8e9,
        "AMD product page of the EPYC 7543, base clock, eight channels of DDR4-3200: 32 cores x 2.8 GHz x 32 "
        "FLOP/clock (two 256-bit FMA units, Zen 3)",
    ),
}
