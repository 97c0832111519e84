"""A site's own label shares beside the model's scores: Bayes' rule for a site that knows which labels are frequent.

The model of all sites answers as if labels were as frequent as in training. A site adds the logarithm of its own shares
to the scores, which makes of a model for labels of equal frequency one for its own.
"""

import math
from collections.abc import Sequence


def log_prior(counts: Sequence[int]) -> list[float]:
    """What a site adds to the score of each label, from its rows with each label.

    One row more of each label keeps all of them possible. The values are not normalised: a common term changes neither
    the best label nor the probabilities.
    """
    return [math.log(number + 1) for number in counts]


def with_prior(scores: Sequence[float], prior: Sequence[float]) -> list[float]:
    """The scores of one row's labels with a site's prior."""
    return [score + more for score, more in zip(scores, prior, strict=True)]


def probabilities(scores: Sequence[float]) -> list[float]:
    """The probability of each label, from logits or log-probabilities: their softmax."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
