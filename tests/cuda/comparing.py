"""How near a result on the device must be to that of the CPU in float32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Named = Mapping[str, Tensor | None]

FLOAT32 = 1e-4
"""Sums of some hundred float32 products differ by about 1e-6 in another order; a few layers make 1e-5 of it."""
BFLOAT16 = 2e-2
"""One rounding to bfloat16 is up to 2^-9, 0.2 %; an output has about ten of them one after the other."""
BFLOAT16_GRADIENT = 4e-2
"""A gradient passes through the forward's roundings and as many of its own."""


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, computed in float64 on the CPU."""
    found, reference = (tensor.detach().cpu().double() for tensor in (found, reference))
    assert found.shape == reference.shape
    size = float(reference.norm())
    return float((found - reference).norm()) / size if size else float(found.norm())


def assert_near(found: Named, reference: Named, bound: float, gradient_bound: float | None = None) -> None:
    """Check every tensor; names that begin with "grad" have their own bound. None (no gradient) must be None in both.

    Raises:
        AssertionError: it lists every tensor that is too far away.
    """
    assert found.keys() == reference.keys()
    wrong = []
    for name, expected in reference.items():
        got = found[name]
        if got is None or expected is None:
            if got is not expected:
                wrong.append(f"{name}: {'no gradient' if got is None else 'a gradient'} only on the device")
            continue
        limit = gradient_bound if gradient_bound is not None and name.startswith("grad") else bound
        error = relative_error(got, expected)
        if not error < limit:
            wrong.append(f"{name} {tuple(expected.shape)}: relative error {error:.2e}, allowed {limit:.0e}")
    assert not wrong, "\n".join(wrong)


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Check that two sets of tensors are equal, wherever they are."""
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not torch.equal(tensor.cpu(), other[name].cpu())]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ: {', '.join(differing[:5])}"


def is_nonzero(tensors: Sequence[Tensor | None]) -> bool:
    """Whether some of the tensors are there and not zero: a comparison of nothing would prove nothing."""
    return any(tensor is not None and bool(tensor.detach().any()) for tensor in tensors)
