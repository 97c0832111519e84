"""The training loss: the cross entropy of the answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfedmoe.data.encoding import IGNORED, Batch
from hfedmoe.data.example import Example
from hfedmoe.errors import TrainingError


def answer_loss(logits: Tensor, batch: Batch, among_choices: bool = False, adjustment: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the answer's tokens: logits [B, A, V].

    Args:
        among_choices: compare only the first tokens of the choices with each other, as accuracy does.
        adjustment: [N] added to the choices' logits, to correct for the client's label frequencies (logit adjustment,
            Menon et al., 2021).

    Raises:
        TrainingError: one of the last two arguments is used, but choices share a first token.
    """
    logits = logits.float()
    if not among_choices and adjustment is None:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    if batch.choice_tokens is None or logits.shape[1] != 1:
        raise TrainingError(
            'train.loss = "choices" and train.logit_adjustment need choices that differ in their first token; '
            "set data.label_words, or leave both settings out"
        )
    last = logits[:, -1]
    chosen = last.gather(1, batch.choice_tokens)
    if adjustment is not None:
        chosen = chosen + adjustment.to(chosen)
    if among_choices:
        return torch.nn.functional.cross_entropy(chosen, batch.answers)
    return torch.nn.functional.cross_entropy(last.scatter(1, batch.choice_tokens, chosen), batch.targets[:, -1])


def label_adjustment(examples: Sequence[Example], strength: float) -> Tensor | None:
    """[N] strength x log frequency of each choice among the client's answers, centred; None if it does not apply."""
    if strength == 0 or not examples or not examples[0].choices:
        return None
    choices = examples[0].choices
    if any(example.choices != choices for example in examples):
        return None
    counts = torch.bincount(torch.tensor([example.answer for example in examples]), minlength=len(choices)).float()
    logs = ((counts + 1) / (counts + 1).sum()).log()
    return strength * (logs - logs.mean())
