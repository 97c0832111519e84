"""A client of a 6.9 B parameter model in 4 GiB, enforced by the operating system; then the whole model in 4 GiB.

    python -m benchmarks.memory_limit [--limit 4GiB] [--checkpoint FOLDER] [--json FILE]

The checkpoint has the size and shape of OLMoE-1B-7B (16 layers of 64 experts, top-8, hidden 2048; bfloat16, 14 GB) with
random weights. It is written first (some minutes), to a temporary folder or to --checkpoint, where it stays. The client
plans with the limit as its budget, scores all experts in a streaming pass, trains LoRA for some steps and sends its
update, which is checked as on a server. With the same limit, the whole model must be killed or get a memory error.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import olmoe_1b_7b, write
from benchmarks.common import parser, report
from benchmarks.limited_client import Round, one_round
from hfedmoe.config import load_config
from hfedmoe.config.budgets import in_experts, is_count, parse_bytes
from hfedmoe.device.planner import Planner

CLIENT = """
name = "limited"
[model]
name = "{checkpoint}"
dtype = "bfloat16"
expert_dtype = "{expert_dtype}"
[data]
max_tokens = {tokens}
[clients]
count = 1
budgets = ["{limit}"]
[method]
bootstrap = "stream"
bootstrap_batches = 1
[train]
steps = {steps}
batch_size = {batch}
lr = 1e-4
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--limit", default="4GiB", help="memory limit of the client's process, and its budget")
    arguments.add_argument("--checkpoint", type=Path, help="use this folder; written if it is empty, and kept")
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=32, help="data.max_tokens of the client")
    arguments.add_argument("--expert-dtype", default="same", help="same (16 bit), 8bit or 4bit")
    arguments.add_argument("--how", default="auto", help="cgroup (root), rlimit, or auto")
    arguments.add_argument("--no-whole", action="store_true", help="do not try the whole model")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = (given.checkpoint or Path(scratch) / "checkpoint").resolve()
        if not (checkpoint / "config.json").is_file():
            print(f"writing {write(olmoe_1b_7b(), checkpoint) / 1e9:.1f} GB to {checkpoint}", flush=True)
        folder = Path(scratch) / "client"
        folder.mkdir()
        settings = {
            "checkpoint": checkpoint,
            "limit": given.limit,
            "steps": given.steps,
            "batch": given.batch,
            "tokens": given.tokens,
            "expert_dtype": given.expert_dtype,
        }
        (folder / "client.toml").write_text(CLIENT.format(**settings))
        limit = parse_bytes(given.limit)
        carved = one_round(folder, limit, given.how)
        whole = None if given.no_whole else one_round(folder, limit, given.how, whole=True)
        predicted = _predicted(folder)
    if carved.update is None:
        raise SystemExit(f"the client did not finish: {carved.run}")
    if carved.run.peak_bytes > limit:
        raise SystemExit(f"the client took {carved.run.peak_bytes} bytes, more than the limit of {limit}")
    report(_rows(carved, whole), _summary(carved, whole, limit, predicted), given.json)


def _predicted(folder: Path) -> dict[str, int]:
    """The bytes that the planner predicts, by kind."""
    config = load_config(folder / "client.toml")
    planner, budget = Planner(config), config.clients.budgets[0]
    if is_count(budget):
        return planner.forecast(in_experts(budget, sum(planner.num_experts))).kinds
    return planner.fit(parse_bytes(str(budget))).forecast.kinds


def _rows(carved: Round, whole: Round | None) -> list[dict[str, Any]]:
    assert carved.took is not None
    rows = [{"process": "carved", "stage": stage, **took} for stage, took in carved.took.items()]
    if whole is not None:
        row = {"stage": _ending(whole), "seconds": None, "peak_bytes": whole.run.peak_bytes}
        rows.append({"process": "whole model", **row})
    return rows


def _ending(whole: Round) -> str:
    if whole.run.killed:
        return "killed"
    last = whole.run.stderr.strip().splitlines()[-1:] or [""]
    return "finished" if whole.update is not None else f"exit code {whole.run.returncode}: {last[0][:80]}"


def _summary(carved: Round, whole: Round | None, limit: int, predicted: dict[str, int]) -> dict[str, Any]:
    update, resident = carved.update, carved.resident
    assert update is not None
    assert resident is not None
    return {
        "limit_bytes": limit,
        "peak_bytes": carved.run.peak_bytes,
        "predicted_bytes": sum(predicted.values()),
        **{f"predicted_{kind}": size for kind, size in predicted.items()},
        "steps": update.work.steps,
        "seconds_per_step": update.work.seconds / max(1, update.work.steps),
        "resident_experts": sum(int(keep.sum()) for keep in resident),
        "all_experts": sum(len(keep) for keep in resident),
        "trained_experts": sum(int(flags.sum()) for flags in update.trained),
        "update_bytes": sum(tensor.nbytes for tensor in update.tensors.values()),
        "losses": [update.work.first_loss, update.work.last_loss],
        "how": carved.run.how,
        "whole_model": None if whole is None else _ending(whole),
    }


if __name__ == "__main__":
    main()
