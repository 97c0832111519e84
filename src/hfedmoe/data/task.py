"""A task: its kind, prompt, labels and examples."""

from dataclasses import dataclass

from hfedmoe.config.data import Kind
from hfedmoe.data.example import Example


@dataclass
class Task:
    """Kind, prompt, labels and examples.

    `labels` is sorted, and empty except for classification. There, the choices of every example are the words of all
    labels in this order, and its answer is the index of its label. If files or natural ids decide which client holds
    what, `parts` has indices into `train` for each client and `part_names` their names; otherwise both are None.
    `groups` has the value of `partition.column` for each training row, if rows are split by it instead of by label.
    """

    name: str
    kind: Kind
    template: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    parts: list[list[int]] | None = None
    part_names: list[str] | None = None
    groups: list[str] | None = None
