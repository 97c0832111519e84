"""One server and many registered clients: seconds, bytes and memory of a round, and what takes the time.

    python -m benchmarks.scale [--registered 100000] [--sampled 1000] [--rounds 3] [--quick] [--json FILE]

The server is the real one, with the trained tensors of the OLMoE-1B-7B shape (16 layers of 64 experts, LoRA of rank 8).
Clients are not: replies of real size, for a quarter of the experts, are made when the server takes them, from a few
that were made before. So neither training nor the network counts, and what the carrier would store is only counted: a
SuperLink keeps every request until its client has taken it, and every reply until the server has.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from benchmarks.common import parser, report
from benchmarks.device_grid import DeviceGrid
from benchmarks.folding import global_tensors, update_with
from hfedmoe.config import load_config
from hfedmoe.events import Silent
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.records import RoundRecord
from hfedmoe.server.server import Server
from hfedmoe.wire.messages import (
    DESCRIBE,
    PLAN,
    TRAIN,
    Description,
    Plan,
    describe_reply,
    facts_of,
    plan_reply,
    train_reply,
    unpack_bits,
    wire_bytes,
)

EXAMPLES, SHARE, RANK, TOP_K = 100, 0.25, 8, 8
DIFFERENT = 4
"""Sets of experts that clients hold, in turn."""


class Registered(DeviceGrid):
    """Clients that answer everything at once, with replies made when they are taken."""

    def __init__(
        self, clients: int, num_experts: list[int], replies: list[RecordDict], plans: list[RecordDict]
    ) -> None:
        super().__init__()
        self._nodes = [NodeInfo(node_id=node) for node in range(1, clients + 1)]
        self._num_experts, self._replies, self._plans = num_experts, replies, plans
        self._numbers = itertools.count(1)
        self._open: dict[str, Message] = {}
        self.down: Counter[str] = Counter()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Count the bytes, and forget the content."""
        ids = []
        for message in messages:
            size = wire_bytes(message.content)
            self.down[message.metadata.message_type] += size
            name = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = name
            if message.metadata.message_type == TRAIN:
                message.content = RecordDict({"facts": facts_of(message)})
            else:
                message.content = RecordDict()
            self._open[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Make the replies to these messages."""
        for name in message_ids:
            message = self._open.pop(name, None)
            if message is not None:
                yield Message(self._answer(message), reply_to=message)

    def _answer(self, message: Message) -> RecordDict:
        client, kind = message.metadata.dst_node_id - 1, message.metadata.message_type
        if kind == DESCRIBE:
            budget = round(SHARE * sum(self._num_experts))
            return describe_reply(Description(client, f"c{client}", EXAMPLES, budget, self._num_experts))
        which = client % DIFFERENT
        if kind == PLAN:
            return self._plans[which]
        held = unpack_bits(facts_of(message)["resident"], self._num_experts)
        assert int(torch.cat(held).sum()) > 0
        return self._replies[which]

    def get_node_ids(self) -> Iterable[int]:
        """All clients."""
        return [node.node_id for node in self._nodes]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All clients, always connected."""
        return self._nodes


class Rounds(Keeper):
    """Notes what each round took."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[dict[str, Any]] = []

    def save_round(self, log: RoundRecord, *more: Any) -> None:
        """As `Keeper.save_round`, which without a folder keeps only sums."""
        super().save_round(log, *more)
        clients = sum(done.status == "ok" for done in log.clients())
        took = log.phases.seconds
        self.rows.append(
            {
                "round": log.round,
                "clients": clients,
                "s": log.seconds,
                "s planning": log.planning_seconds,
                **{f"s {name}": took[name] for name in ("pack", "check", "fold", "note", "average")},
                "GB down": sum(log.bytes_down.values()) / 1e9,
                "GB up": sum(log.bytes_up.values()) / 1e9,
                "memory MB": psutil.Process().memory_info().rss / 1e6,
            }
        )


def main() -> None:
    """Run the rounds and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--registered", type=int, default=100_000)
    arguments.add_argument("--sampled", type=int, default=1_000)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="a small model and few clients")
    given = arguments.parse_args()
    if given.quick:
        given.registered, given.sampled = 1_000, 100
    layers, experts = (2, 16) if given.quick else (16, 64)
    num_experts = [experts] * layers
    torch.manual_seed(0)
    tensors = global_tensors(
        layers, experts, 256 if given.quick else 2048, 128 if given.quick else 1024, RANK, "factors"
    )
    draws, replies, plans = torch.Generator().manual_seed(0), [], []
    for _ in range(DIFFERENT):
        held = []
        for number in num_experts:
            flags = torch.zeros(number, dtype=torch.bool)
            flags[torch.randperm(number, generator=draws)[: round(SHARE * number)]] = True
            held.append(flags)
        update = update_with(tensors, held, draws)
        replies.append(train_reply(update))
        plans.append(plan_reply(Plan(held)))
    sets = [f"clients.count={given.registered}", f"federation.clients_per_round={given.sampled}", "train.steps=1"]
    sets += [f"federation.rounds={given.rounds}", f"clients.budgets=['{SHARE:.0%}']", f"train.rank={RANK}"]
    config = load_config(None, [*sets, "evaluation.watch_rows=0"])
    nothing = Metrics(None, None, 0.0, 0, 1.0)
    keeper = Rounds()
    top_k = [min(TOP_K, round(SHARE * experts))] * layers
    server = Server(config, tensors, num_experts, top_k, lambda *_: nothing, keeper, Silent(), watches=False)
    grid = Registered(given.registered, num_experts, replies, plans)
    before = psutil.Process().memory_info().rss / 1e6
    attendance = server.attendance(grid)
    started = time.perf_counter()
    attendance.gather()
    gathered, members = time.perf_counter() - started, psutil.Process().memory_info().rss / 1e6 - before
    server.run(grid)
    last = keeper.rows[-1]
    slowest = max(
        (name for name in last if name.startswith("s ") and name != "s planning"), key=lambda name: last[name]
    )
    summary = {
        "registered": given.registered,
        "sampled per round": given.sampled,
        "MB of one reply": wire_bytes(replies[0]) / 1e6,
        "seconds to ask all who they are": gathered,
        "MB for all of them": members,
        "memory of the last round over the first": last["memory MB"] / keeper.rows[0]["memory MB"],
        "seconds per update of the last round": last["s"] / last["clients"],
        "most of them": slowest.removeprefix("s "),
        "GB of requests that a SuperLink keeps until clients take them": grid.down[TRAIN] / given.rounds / 1e9,
    }
    report(keeper.rows, summary, given.json)


if __name__ == "__main__":
    main()
