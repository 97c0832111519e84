"""The head multiplies once for all samples, not sample by sample."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfedmoe.moe.compact import compute_in_float32
from hfedmoe.moe.head import keep_head_one_product
from hfedmoe.moe.model import MoEModel
from tests.families.table import build, inputs


class Products(TorchDispatchMode):
    """Counts products with a matrix of the vocabulary's size for each sample."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.single, self.by_sample = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        packet = func._overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.bmm) and self.vocabulary in args[1].shape:
            self.single += packet is torch.ops.aten.mm
            self.by_sample += packet is torch.ops.aten.bmm
        return func(*args, **(kwargs or {}))


def step(model: MoEModel) -> Products:
    """A forward and backward pass on the logits of the last tokens."""
    seen = Products(model.config.vocab_size)
    with seen:
        model.model(**inputs(model.model), logits_to_keep=1).logits.float().logsumexp(-1).sum().backward()
    return seen


def test_the_vocabulary_is_read_once_per_pass_and_not_once_per_sample() -> None:
    seen = step(MoEModel(build("mixtral")))
    assert (seen.single, seen.by_sample) == (2, 0)


def test_so_it_is_where_16_bit_weights_are_cast() -> None:
    model = build("mixtral").bfloat16()
    compute_in_float32(model)
    seen = step(MoEModel(model))
    assert (seen.single, seen.by_sample) == (2, 0)


def test_logits_stay_as_they_were_and_the_hook_is_there_once() -> None:
    model, x = build("mixtral").eval(), inputs(build("mixtral"))
    expected = model(**x, logits_to_keep=2).logits
    for _ in range(2):
        keep_head_one_product(model)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1
    torch.testing.assert_close(model(**x, logits_to_keep=2).logits, expected)
