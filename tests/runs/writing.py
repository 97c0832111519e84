"""What tests write into a run folder."""

import subprocess
import sys

import torch


def tensors(round: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), float(round)), "b": torch.arange(5) + round}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def child(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that talks with the test line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def append_experts(run, round, num_experts, clients, *vectors):
    """A round of experts.npy in one call."""
    with run.expert_rows(round, num_experts) as add:
        for row in zip(clients, *vectors, strict=True):
            add(*row)
