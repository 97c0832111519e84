"""What carriers of devices have in common where they are simulated in one process."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class DeviceGrid(Grid):
    """A Grid without a SuperLink. Messages are made as for devices; who is connected and answers is left open."""

    def __init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # messages to devices name them

    def create_message(self, *arguments: object, **named: object) -> Message:
        """Messages are made as for devices."""
        raise RuntimeError("a grid of devices makes no messages")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies are taken one by one."""
        raise RuntimeError("replies are taken with pull_messages")

    def set_run(self, run: Run) -> None:
        """Does nothing: there is only one run."""

    @property
    def run(self) -> Run:
        raise RuntimeError("a simulated run is not registered with a SuperLink")
