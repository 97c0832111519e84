"""The figures of one evaluation, as one line or as JSON."""

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfedmoe.server.evaluation import Metrics


def as_text(metrics: "Metrics") -> str:
    """For example "accuracy 81.2 %, macro-F1 0.774, loss 0.61, perplexity 1.84 on 400 rows".

    The loss is the one that was trained: among the choices if that was (`train.loss = "choices"`).

    If whole choices were compared, there are two accuracies, named as in lm-evaluation-harness:
    "acc 61.9 %, acc_norm 61.3 %, ...".
    """
    parts = []
    if metrics.accuracy is not None:
        name = "accuracy" if metrics.accuracy_norm is None else "acc"
        parts.append(f"{name} {100 * metrics.accuracy:.1f} %")
    if metrics.accuracy_norm is not None:
        parts.append(f"acc_norm {100 * metrics.accuracy_norm:.1f} %")
    if metrics.macro_f1 is not None:
        parts.append(f"macro-F1 {metrics.macro_f1:.3f}")
    if metrics.choice_loss is not None:
        parts.append(f"loss {metrics.choice_loss:.4g} among the choices")
    else:
        parts += [f"loss {metrics.loss:.4g}", f"perplexity {metrics.perplexity:.4g}"]
    return f"{', '.join(parts)} on {metrics.examples} rows"


def to_json(metrics: "Metrics") -> str:
    """All figures as a JSON object; NaN and infinity become null."""
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.figures().items()
    }
    return json.dumps(figures, indent=2)
