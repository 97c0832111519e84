"""A site's own label shares, from `--label-shares`: a file with its labelled rows, or a list of shares."""

import math
from collections import Counter
from pathlib import Path

from hfedmoe.config import DataConfig
from hfedmoe.data.tasks import load_rows
from hfedmoe.errors import UserError
from hfedmoe.server.prior import log_prior

EXAMPLE = "spam=0.2,ham=0.8"


def check_shares(given: str) -> None:
    """Raise UserError at once if this is neither a file nor looks like a list."""
    if not Path(given).expanduser().is_file() and "=" not in given:
        raise UserError(f"--label-shares {given}: no such file, and no list such as {EXAMPLE}")


def prior_of(given: str, config: DataConfig, labels: tuple[str, ...]) -> list[float]:
    """What the site adds to the score of each label (`server.prior`).

    Args:
        given: a file with labelled rows, whose labels are counted, or a list such as "spam=0.2,ham=0.8".
        config: its columns, and how files are written.
        labels: of the model.

    Raises:
        UserError: the file cannot be read or has other labels, or the list does not give every label a share.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        return _listed(given, labels)
    own = {"source": str(path), "split": None, "test": None, "clients": None, "test_rows": None}
    answers = Counter(
        example.answer for example in load_rows(config.model_copy(update=own), trained_labels=lambda: labels).test
    )
    return log_prior([answers[number] for number in range(len(labels))])


def _listed(given: str, labels: tuple[str, ...]) -> list[float]:
    shares: dict[str, float] = {}
    for part in given.split(","):
        label, _, share = (text.strip() for text in part.rpartition("="))
        if label not in labels:
            raise UserError(f'--label-shares: "{label}" is not a label of the model; labels: {", ".join(labels)}')
        try:
            shares[label] = float(share)
        except ValueError:
            raise UserError(f'--label-shares: the share of "{label}" is "{share}"; write a number') from None
        if not 0 < shares[label] < math.inf:
            raise UserError(f'--label-shares: the share of "{label}" is {share}; it must be more than 0')
    missing = [label for label in labels if label not in shares]
    if missing:
        raise UserError(f"--label-shares: lacks {', '.join(missing)}; give every label a share")
    return [math.log(shares[label]) for label in labels]
