"""Who took part before a server was started again, and which experts each client held, from the run folder."""

import numpy as np
import torch
from torch import Tensor

from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.attendance import Attendance
from hfedmoe.wire.messages import pack_bits


def recall(attendance: Attendance, folder: RunFolder, num_experts: list[int]) -> None:
    """Give each member for which no round was planned in this process the experts that it held last, if any."""
    new = [member for member in attendance.members.values() if not member.resident_bits]
    held = last_held(folder, num_experts) if new else {}
    for member in new:
        if member.about.client in held:
            member.resident_bits = pack_bits(held[member.about.client])


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
