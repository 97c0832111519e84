"""What is learnt, and on which rows."""

from dataclasses import dataclass

from hfedmoe.config.data import Kind
from hfedmoe.data.example import Example


@dataclass
class Task:
    """What is learnt and on which rows.

    `labels` is sorted and only filled for classification, where every example has the words of all labels, in this
    order, as its choices and the label's index as its answer. `parts` are indices into `train`, one list per client,
    where files or natural ids decide who holds what; `part_names` names those clients. Both are None otherwise.
    """

    name: str
    kind: Kind
    template: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    parts: list[list[int]] | None = None
    part_names: list[str] | None = None
