"""Real devices without a network: the ClientApp that a SuperNode runs, called with contexts of nodes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from hfedmoe import deployment
from hfedmoe.client.device import Device
from hfedmoe.data.terms import Terms
from hfedmoe.wire.messages import DESCRIBE, MEASURE, PLAN, TRAIN, describe_request, plan_request
from hfedmoe.wire.same import NO_DIGESTS, Digests


@dataclass
class Node:
    """One device; its state stays from message to message, its process is this one."""

    config: str
    """The run's configuration as TOML."""
    number: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Its node config beside the number."""
    state: RecordDict = field(default_factory=RecordDict)

    @property
    def context(self) -> Context:
        return Context(
            run_id=7,
            node_id=self.number + 1,
            node_config={"partition-id": self.number, **self.settings},
            state=self.state,
            run_config={"config": self.config},
        )

    def ask(self, kind: str, content: RecordDict) -> Message:
        reply = deployment.client(request(kind, content), self.context)
        if "data" in self.settings:
            check_holds_no_row(reply, Path(str(self.settings["data"])))
        return reply

    def device(self) -> Device:
        """As a later message opens it."""
        return deployment.open_device(request(PLAN, plan_request(1)), self.context)

    def describe(self, terms: Terms, digests: Digests = NO_DIGESTS) -> Message:
        return self.ask(DESCRIBE, describe_request(terms.to_json(), digests))

    def plan(self, round: int = 1) -> Message:
        return self.ask(PLAN, plan_request(round))

    def train(self, content: RecordDict) -> Message:
        return self.ask(TRAIN, content)

    def measure(self, content: RecordDict) -> Message:
        return self.ask(MEASURE, content)


def check_holds_no_row(reply: Message, file: Path) -> None:
    """Check that none of the bytes that a device sends are the name of its file or a text in it."""
    sent = b"".join(part.deflate() for part in get_all_nested_objects(reply).values())
    assert file.name.encode() not in sent
    if file.suffix == ".csv" and file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            text = line.rpartition(",")[0].strip('"')
            assert len(text) < 4 or text.encode() not in sent, text


def request(kind: str, content: RecordDict) -> Message:
    return Message(content, metadata=Metadata(1, "1", 0, 1, "", "", 0.0, 60.0, kind))  # type: ignore[call-overload]


def rows_file(path: Path, *labels: str, rows: int = 6) -> Path:
    """A CSV of short texts with these labels in turn."""
    words = ("profit", "share", "bank", "oil", "dollar", "trade", "ship", "grain")
    lines = [f"{words[i % 8]} {words[(3 * i + 1) % 8]},{labels[i % len(labels)]}\n" for i in range(rows)]
    path.write_text("text,label\n" + "".join(lines), encoding="utf-8")
    return path
