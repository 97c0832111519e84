"""The device under test: a CUDA GPU, or the CPU in a dry run.

Without a GPU these tests are skipped. With HFEDMOE_CUDA_TESTS=cpu they run on the CPU, compared with itself: this shows
that the tests themselves work.

    python -m pytest tests/cuda                             # needs a CUDA GPU
    HFEDMOE_CUDA_TESTS=cpu python -m pytest tests/cuda      # the dry run
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; needed for repeatable bits

from collections.abc import Iterator

import pytest
import torch

CHOICE = "HFEDMOE_CUDA_TESTS"


def chosen() -> torch.device | None:
    """The device under test; None: there is none."""
    asked = os.environ.get(CHOICE)
    if asked is not None and asked != "cpu":
        raise pytest.UsageError(f"{CHOICE}={asked}: only cpu is known")
    if asked == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    found = chosen()
    if found is None:
        pytest.skip(f"needs a CUDA GPU ({CHOICE}=cpu runs this test on the CPU)")
    return found


@pytest.fixture(autouse=True)
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 are not rounded to TF32 in these tests; every test needs the device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def same_bits(device: torch.device) -> Iterator[None]:
    """Every operation gives the same bits each time, or raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
