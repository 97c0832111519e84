"""The output head: the last matrix product of a model."""

from typing import Any

from torch import Tensor, nn


def keep_head_one_product(model: Any) -> None:
    """Make the input of the output head of a transformers model contiguous; a second call changes nothing.

    Only the logits of the last tokens are needed, so transformers slices the input. With a slice and frozen weights,
    torch multiplies sample by sample: it reads the head's matrix once per sample, and in bfloat16 on a CPU also copies
    it each time (8 samples and a matrix of 100 MB: 800 MB, and 170 times as long).
    """
    head = model.get_output_embeddings()
    if head is not None and _in_one_piece not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_in_one_piece)


def _in_one_piece(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
