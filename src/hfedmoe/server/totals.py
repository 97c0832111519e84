"""What every client did over the rounds of a run, for the last table."""

from dataclasses import dataclass
from typing import Any

from hfedmoe.events import PaceLine


@dataclass(slots=True)
class ClientTotals:
    """One client over the rounds that it completed; `steps` to `deadline_s` over those under a deadline."""

    rounds: int = 0
    resident: int = 0
    trained: int = 0
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    paced: int = 0
    steps: int = 0
    steps_wanted: int = 0
    activation: float = 0.0
    activation_wanted: float = 0.0
    deadline_s: float = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Count a client's entry in a line of metrics.jsonl."""
        self.bytes_down += row["bytes_down"]
        self.bytes_up += row["bytes_up"]
        if row["status"] != "ok":
            return
        self.rounds += 1
        self.resident, self.trained = row["resident"], row["trained"]
        self.seconds += row["seconds"]
        if row["peak_is"] == "measured":
            self.measured_bytes = max(self.measured_bytes or 0, row["peak_bytes"])
        else:
            self.predicted_bytes = max(self.predicted_bytes or 0, row["peak_bytes"])
        if row.get("deadline_s") is not None:
            self.paced += 1
            self.steps += row["steps"]
            self.steps_wanted += row["steps_wanted"]
            self.activation += row["activation"]
            self.activation_wanted += row["activation_wanted"]
            self.deadline_s = row["deadline_s"]

    def pace(self) -> PaceLine | None:
        """What the deadline left of its rounds: sums of the steps, means over the rounds."""
        if not self.paced:
            return None
        wanted = self.activation_wanted / self.paced
        return PaceLine(self.steps, self.steps_wanted, self.activation / self.paced, wanted, self.deadline_s)
