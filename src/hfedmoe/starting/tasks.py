"""The rows of a draft as a task, read again only when a setting that matters to them has changed."""

from hfedmoe.config import RunConfig
from hfedmoe.data.example import Example
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import load_watched_task


class Tasks:
    """Remembers the last task."""

    def __init__(self) -> None:
        self._key, self._last = "", (Task("", "completion", "", (), [], []), list[Example]())

    def of(self, config: RunConfig) -> tuple[Task, list[Example]]:
        """Training and held-out rows, and the watched rows, as a run loads them. Raises UserError."""
        split = config.partition.model_dump_json(include={"scheme", "column"})
        key = config.data.model_dump_json(exclude={"max_tokens"}) + split + str(config.evaluation.watch_rows)
        if key != self._key:
            self._last = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
            self._key = key
        return self._last
