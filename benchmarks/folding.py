"""How fast the server checks and folds updates, compared with a copy; part of `python -m benchmarks.round`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.events import Work
from hfedmoe.moe.payload import layer_of
from hfedmoe.server.fold import Fold
from hfedmoe.wire import checks
from hfedmoe.wire.inprocess import InProcessGrid
from hfedmoe.wire.messages import Update, train_reply


def global_tensors(layers: int, experts: int, hidden: int, inner: int, rank: int, lora: str) -> dict[str, Tensor]:
    """The global tensors of a model: LoRA pairs of its experts, and its routers."""
    tensors = {f"router.{layer}.weight": torch.zeros(experts, hidden) for layer in range(layers)}
    kinds = {"up_b": (2 * inner, rank), "down_b": (hidden, rank)}
    if lora != "freeze_a":
        kinds |= {"up_a": (rank, hidden), "down_a": (rank, inner)}
    for layer in range(layers):
        tensors |= {f"experts.{layer}.{name}": torch.zeros(experts, *shape) for name, shape in kinds.items()}
    return tensors


def update_of(tensors: dict[str, Tensor], num_experts: list[int], share: float, draws: torch.Generator) -> Update:
    """An update in which a share of each layer's experts is trained, drawn at random."""
    trained = []
    for number in num_experts:
        flags = torch.zeros(number, dtype=torch.bool)
        flags[torch.randperm(number, generator=draws)[: max(1, round(number * share))]] = True
        trained.append(flags)
    return update_with(tensors, trained, draws)


def update_with(tensors: dict[str, Tensor], trained: list[Tensor], draws: torch.Generator) -> Update:
    """An update in which the experts of `trained`, flags [E] for each layer, have random rows."""
    sent = {}
    for name, tensor in tensors.items():
        rows = int(trained[layer_of(name)].sum()) if name.startswith("experts.") else len(tensor)
        sent[name] = torch.empty(rows, *tensor.shape[1:]).uniform_(-1, 1, generator=draws)
    uniform = [torch.full((len(flags),), 1 / len(flags)) for flags in trained]
    tokens = [torch.full((len(flags),), 100.0) for flags in trained]
    work = Work(
        examples=100, steps=1, steps_wanted=1, first_loss=1.0, last_loss=1.0, mean_loss=1.0, seconds=1.0, peak_bytes=1
    )
    return Update(sent, trained, trained, uniform, uniform, tokens, work)


def fold_rows(quick: bool) -> list[dict[str, Any]]:
    """Time to check, to fold and to copy updates, with one thread and with all."""
    layers, experts = (2, 16) if quick else (16, 64)
    rows = []
    all_threads = torch.get_num_threads()
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            for lora, shares in (("factors", (0.05, 0.25, 1.0)), ("freeze_a", (0.05, 0.25, 1.0)), ("exact", (0.05,))):
                tensors = global_tensors(layers, experts, 2048, 1024, 8, lora)
                for share in shares:
                    rows.append({"threads": threads} | _fold_row(tensors, [experts] * layers, lora, share))
    finally:
        torch.set_num_threads(all_threads)
    return rows


def fold_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The lowest shares of a copy's bandwidth: of updates with a quarter of the experts or more, and of all."""
    averaged = [row for row in rows if row["lora"] != "exact"]  # "exact" decomposes products, it does not average rows
    large = [row for row in averaged if row["lora"] == "factors" and row["share of experts"] >= 0.25]

    def lowest(rows: list[dict[str, Any]], threads: int) -> float:
        return min(row["fold of memcpy"] for row in rows if row["threads"] == threads)

    most = max(row["threads"] for row in rows)
    return {
        "fold_share_of_memcpy": lowest(large, 1),
        "fold_share_of_memcpy_worst": lowest(averaged, 1),
        "fold_share_of_memcpy_all_threads": lowest(large, most),
        "fold_share_of_memcpy_all_threads_worst": lowest(averaged, most),
    }


def _fold_row(tensors: dict[str, Tensor], num_experts: list[int], lora: str, share: float) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    fold = Fold(tensors, MethodConfig(), lora == "exact", 8)
    everything = [torch.ones(number, dtype=torch.bool) for number in num_experts]
    work = checks.Asked(1, [1 << 20] * len(num_experts))
    times: dict[str, list[float]] = {"copy": [], "check": [], "fold": []}

    def timed(what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments)
        times[what].append(time.perf_counter() - started)
        return result

    size = 0
    for _ in range(3 if lora == "exact" else 8):
        message = _message(train_reply(update_of(tensors, num_experts, share, draws)))
        update = timed("check", checks.update, message, everything, tensors, work)
        timed("fold", fold.add, update, everything, 100)
        copies = [torch.zeros_like(tensor) for tensor in update.tensors.values()]
        timed("copy", _copy, copies, update)
        size = sum(tensor.nbytes for tensor in copies)
    # The first fold of a round also allocates the accumulators.
    copy, check, folding = (statistics.median(times[what][1:]) for what in ("copy", "check", "fold"))
    return {
        "lora": lora,
        "share of experts": share,
        "MB": size / 1e6,
        "copy GB/s": size / copy / 1e9,
        "check ms": 1e3 * check,
        "fold ms": 1e3 * folding,
        "fold ms per MB": 1e9 * folding / size,
        "fold of memcpy": copy / folding,
        "check and fold of memcpy": copy / (check + folding),
    }


def _copy(into: list[Tensor], update: Update) -> None:
    for target, tensor in zip(into, update.tensors.values(), strict=True):
        target.copy_(tensor)


def _message(content: Any) -> Message:
    grid = InProcessGrid(lambda message, context: message, 1)  # type: ignore[arg-type]
    return grid.create_message(content, "train", 1, "benchmark")
