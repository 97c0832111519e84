"""After the last round simulated clients go on training for themselves; the run folder keeps what each trained."""

import numpy as np
import torch
from torch import Tensor

from hfedmoe.client.app import OWN_EXPERTS
from hfedmoe.events import OwnResult, Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.server import Server
from hfedmoe.server.sites import ask_to_tune
from hfedmoe.wire.local import LocalGrid
from hfedmoe.wire.messages import pack_bits


def tune_clients(server: Server, grid: LocalGrid, folder: RunFolder) -> dict[int, OwnResult]:
    """Let every client that took part train on; what each says that it gained, by its number.

    A run that is resumed after its last round does the same again: who held what is read from the folder.

    Raises:
        UserError: the disk is full.
    """
    grid.abandon()  # training of which nobody waits for the end
    attendance = Attendance(grid, server.config, server.num_experts, server.terms, server.digests, Silent())
    attendance.gather()
    held = last_held(folder, server.num_experts)
    for client, member in attendance.members.items():
        member.resident_bits = pack_bits(held[client]) if client in held else b""
    folder.drop_tuned()

    def keep(node: int, client: int) -> None:
        blob = grid.context(node).state.config_records.pop(OWN_EXPERTS)["blob"]
        assert isinstance(blob, bytes)
        folder.save_tuned(client, blob)

    return ask_to_tune(server, attendance, lambda member: keep(member.node, member.about.client))


def last_held(folder: RunFolder, num_experts: list[int]) -> dict[int, list[Tensor]]:
    """The experts that each client held in the last round in which it took part, bool [E] per layer, by its number."""
    rows = folder.read_expert_rows()
    if rows is None:
        return {}
    last = {int(client): row for row, client in enumerate(np.asarray(rows["client"]))}
    return {
        client: [
            torch.from_numpy(np.array(bits[:number]))
            for bits, number in zip(rows["resident"][row], num_experts, strict=True)
        ]
        for client, row in last.items()
    }
