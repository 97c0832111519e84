"""The last matrix product of a model, onto the vocabulary."""

from typing import Any

from torch import Tensor, nn


def keep_head_one_product(model: Any) -> None:
    """Let the head of a transformers model see its input in one piece of memory; calling it again changes nothing.

    Logits are wanted of the last tokens only, and transformers slices them out. With such an input and frozen weights
    torch multiplies sample by sample: it reads the vocabulary's matrix once for each, and in bfloat16 on a processor
    copies it for each (8 samples and a matrix of 100 MB: 800 MB, and 170 times as long).
    """
    head = model.get_output_embeddings()
    if head is not None and _in_one_piece not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_in_one_piece)


def _in_one_piece(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
