"""Memory on the GPU: what is measured and predicted, and a client that runs out of it and comes back."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hfedmoe.client.attempt import attempt
from hfedmoe.device.memory import peak_bytes, sub_model_bytes
from hfedmoe.device.planner import Planner
from hfedmoe.device.probe import available_memory, probe
from hfedmoe.runs.folder import RunFolder
from hfedmoe.wire.trouble import OUT_OF_MEMORY, Trouble
from tests.cuda.steps import batch_for, loss_of, wrapped
from tests.federation import Federation, tiny_config

MIB = 1 << 20
PIECE = 16 * MIB
IMPOSSIBLE = 1 << 50
"""Bytes that no machine has."""


@pytest.fixture
def little_memory(device: torch.device) -> Iterator[None]:
    """Of a GPU, this process may have only 256 MiB more than now."""
    if device.type != "cuda":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 256 * MIB) / total, device)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def taking(device: torch.device, most: int) -> list[Tensor]:
    """Take memory piece by piece; on a CPU, which has no such limit, all at once."""
    if device.type != "cuda":
        return [torch.empty(PIECE if most <= 2 else IMPOSSIBLE, dtype=torch.uint8, device=device)]
    return [torch.empty(PIECE, dtype=torch.uint8, device=device) for _ in range(most)]


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def test_a_step_without_memory_leaves_nothing_and_a_smaller_one_works(
    device: torch.device, little_memory: None
) -> None:
    model = wrapped("mixtral", device)
    batch = batch_for(model)

    def step(most: int) -> float:
        logits = model.model(**batch, use_cache=False).logits
        held = taking(device, most)
        loss = loss_of(logits)
        loss.backward()
        del held
        return loss.item()

    first = attempt(lambda: step(1))
    for parameter in model.parameters():
        parameter.grad = None
    before = allocated(device)
    trouble = attempt(lambda: step(1000))
    assert isinstance(trouble, Trouble)
    assert trouble.status == OUT_OF_MEMORY
    assert allocated(device) == before
    again = attempt(lambda: step(1))
    assert again == first
    assert isinstance(first, float)


def test_a_client_that_ran_out_of_memory_comes_back_with_fewer_experts(tmp_path: Path, device: torch.device) -> None:
    quick = ("partition.scheme=iid", "data.test_rows=6", "evaluation.watch_rows=1", "train.batch_size=2")
    config = tiny_config(*quick, f"model.device={device}")
    federation = Federation(RunFolder.create(tmp_path / "run", config), config)
    asked: list[int] = []

    def on_step(client: int, step: int, loss: float) -> None:
        if not asked:
            asked.append(step)
            torch.empty(IMPOSSIBLE, dtype=torch.uint8, device=device)

    federation.devices[1].on_step = on_step
    federation.run()
    lines = RunFolder.open(tmp_path / "run").read_rounds()[1:]
    first, second = (next(row for row in line["clients"] if row["client"] == 1) for line in lines)
    assert asked == [1]
    assert first["status"] == "out of memory"
    assert (second["status"], second["resident"]) == ("ok", 14)  # it held 16
    others = [row["status"] for line in lines for row in line["clients"] if row["client"] != 1]
    assert set(others) == {"ok"}


def test_the_machine_is_measured(tmp_path: Path, device: torch.device) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * MIB)
    found = probe(str(device), file)
    assert found.flops > 1e8
    assert found.disk_bytes_per_s is not None
    assert found.memory_bytes > 256 * MIB
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        assert found.memory_bytes <= total
        assert found.limit == f"free memory of {device}"
        assert available_memory("cuda")[1] == "free memory of cuda"
        assert found.flops > 1e12


def test_the_peak_counts_what_was_taken(device: torch.device) -> None:
    held = torch.zeros(64 * MIB, dtype=torch.uint8, device=device)
    peak = peak_bytes(device)
    assert peak >= held.nbytes
    if device.type == "cuda":
        del held
        torch.cuda.empty_cache()
        assert peak_bytes(device) == peak


@pytest.mark.parametrize(
    "more", [(), ("train.gradient_checkpointing=true",), ("train.experts=full",), ("train.attention=true",)]
)
def test_forecasts_are_made_for_the_device(more: tuple[str, ...], device: torch.device) -> None:
    """The step is rehearsed on imagined tensors of the device, so real memory must not be touched."""
    gc.collect()  # what other tests left is not freed while this one counts
    before = allocated(device)
    planner = Planner(tiny_config(f"model.device={device}", *more))
    few, all_of_them = planner.forecast(planner.smallest), planner.forecast(sum(planner.num_experts))
    assert 0 < few.highest < all_of_them.highest < 4 << 30
    assert allocated(device) == before


def test_a_sub_model_takes_what_was_counted(device: torch.device) -> None:
    """Weights, gradients and both moments of AdamW, beside what the device really allocated."""
    before = allocated(device)
    model = wrapped("mixtral", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    everyone = [torch.ones(number, dtype=torch.bool) for number in model.num_experts]
    counted = sub_model_bytes(model, everyone)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert counted > 0
    if device.type == "cuda":
        pieces = 512 * 10 * len([*model.parameters(), *model.model.parameters()])  # every tensor is rounded up to 512
        assert counted <= allocated(device) - before <= counted + pieces
