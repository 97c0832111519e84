"""One seed per purpose, derived from the run's seed, so that nothing depends on what ran before."""

import hashlib

import torch


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for a purpose such as ("train", round, client); the same on every machine."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
