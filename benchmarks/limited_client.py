"""One client in a process of its own, for measurements under a memory limit: carves, plans, trains and answers.

It is the client that a SuperNode would start, with a folder in place of the network: for every message the server puts
NAME.request into the folder, and the client puts NAME.reply. Contents are Flower's own serialisation.
"""

import argparse
import json
import time
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from hfedmoe.config import load_config
from hfedmoe.device.memory import peak_process_bytes
from hfedmoe.experiment import prepare
from hfedmoe.federation.client import Device, client_app
from hfedmoe.federation.inprocess import InProcessGrid
from hfedmoe.federation.messages import DESCRIBE, PLAN, TRAIN
from hfedmoe.report.live import Silent

PATIENCE_S = 600.0


def put(file: Path, content: RecordDict) -> None:
    """Write a message's content, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(recorddict_to_proto(content).SerializeToString())
    partial.rename(file)


def take(file: Path) -> RecordDict:
    """Wait for a message's content. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file.name} did not come")
        time.sleep(0.05)
    return recorddict_from_proto(Proto.FromString(file.read_bytes()))


def main(folder: Path, carve: bool) -> None:
    """Answer a description, a plan and a training request; print what it took as JSON."""
    started = time.perf_counter()
    config = load_config(folder / "client.toml")
    prepared = prepare(config, Silent(), carve=carve)
    device = Device(0, "limited", prepared.model, prepared.encoder, prepared.task.train, config)
    seconds, peaks = {"load": time.perf_counter() - started}, {"load": peak_process_bytes()}
    grid = InProcessGrid(client_app(lambda _: device), 1)
    for kind in (DESCRIBE, PLAN, TRAIN):
        request = grid.create_message(take(folder / f"{kind}.request"), kind, 1, "")
        began = time.perf_counter()
        (reply,) = grid.send_and_receive([request])
        if reply.has_error():
            raise RuntimeError(f"{kind}: {reply.error.reason}")
        put(folder / f"{kind}.reply", reply.content)
        del request, reply
        seconds[kind], peaks[kind] = time.perf_counter() - began, peak_process_bytes()
    print(json.dumps({"seconds": seconds, "peaks": peaks}))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--whole", action="store_true", help="load the whole model instead of carving it")
    given = arguments.parse_args()
    main(given.folder, carve=not given.whole)
