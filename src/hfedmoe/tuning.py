"""After the last round simulated clients go on training for themselves; the run folder keeps what each trained."""

from hfedmoe.client.app import OWN_EXPERTS
from hfedmoe.events import OwnResult, Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.recall import recall
from hfedmoe.server.server import Server
from hfedmoe.server.sites import ask_to_tune
from hfedmoe.wire.local import LocalGrid


def tune_clients(server: Server, grid: LocalGrid, folder: RunFolder) -> dict[int, OwnResult]:
    """Let every client that took part train on; what each says that it gained, by its number.

    A run that is resumed after its last round does the same again: who held what is read from the folder.

    Raises:
        UserError: the disk is full.
    """
    grid.abandon()  # training of which nobody waits for the end
    attendance = Attendance(grid, server.config, server.num_experts, server.terms, server.digests, Silent())
    attendance.gather()
    recall(attendance, folder, server.num_experts)
    folder.drop_tuned()

    def keep(node: int, client: int) -> None:
        blob = grid.context(node).state.config_records.pop(OWN_EXPERTS)["blob"]
        assert isinstance(blob, bytes)
        folder.save_tuned(client, blob)

    return ask_to_tune(server, attendance, lambda member: keep(member.node, member.about.client))
