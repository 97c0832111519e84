"""The figures of one evaluation in one line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfedmoe.evaluation import Metrics


def as_text(metrics: "Metrics") -> str:
    """For example "accuracy 81.2 %, macro-F1 0.774, loss 0.61, perplexity 1.84 on 400 rows"."""
    parts = []
    if metrics.accuracy is not None:
        parts.append(f"accuracy {100 * metrics.accuracy:.1f} %")
    if metrics.macro_f1 is not None:
        parts.append(f"macro-F1 {metrics.macro_f1:.3f}")
    parts += [f"loss {metrics.loss:.4g}", f"perplexity {metrics.perplexity:.4g}"]
    return f"{', '.join(parts)} on {metrics.examples} rows"
