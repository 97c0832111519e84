"""What a client's training takes, and how many experts fit into its memory, from the model's configuration alone.

ModelBytes, adapters and optimizer state are counted from shapes (`weights`); activations, gradients, logits and FLOPs
come from running the real step on fake tensors (`rehearsal`). Only the configuration is downloaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from hfedmoe.config import RunConfig
from hfedmoe.device.beside import beside
from hfedmoe.device.forecast import KINDS, Change, Fit, Forecast
from hfedmoe.device.rehearsal import GROUPS, Rehearsed, rehearse
from hfedmoe.device.weights import ModelBytes, blob_bytes
from hfedmoe.device.workload import Workload
from hfedmoe.errors import UserError
from hfedmoe.models.loading import structure
from hfedmoe.moe.anatomy import UnsupportedModelError

MARGIN = 1.05
"""`fit` multiplies predictions by this: they were within a few per cent of measurements."""
FRAMEWORK_BYTES = {"cpu": 500 << 20, "cuda": 770 << 20, "mps": 500 << 20}
"""A client's process without a model: libraries, their first use, a tokenizer of 49,152 tokens and a few rows of data.
Measured on the CPU (x86-64, torch 2.13, transformers 5.23) with `python -m benchmarks.planner_accuracy --framework`.
For CUDA it is the context in the card's memory after the first steps, on an H200 (torch 2.11, CUDA 13.0) with
`python -m benchmarks.gpu_fits`; smaller cards have smaller ones. Assumed for MPS."""
PARQUET_BYTES = 56 << 20
"""Libraries that read Parquet, if the data are packaged, on the hub or in a Parquet file; measured in the same way."""
QUANTISER_BYTES = 44 << 20
"""bitsandbytes, if experts are stored in 8 or 4 bit."""
ATTENTION_LORA_BYTES = 106 << 20
"""PEFT, which is imported only for LoRA on the attention."""
CODE_BYTES = 112 << 20
"""Code that oneDNN compiles and keeps for 16-bit products, after some tens of steps; hfedmoe limits its size."""
RECEIVED_COPIES = {"cpu": 1, "cuda": 0, "mps": 1}
"""Copies of the server's message in memory while the client trains: the blob; the tensors are views of it. None is in
a card's memory."""
UPDATE_COPIES = {"cpu": 3, "cuda": 1, "mps": 3}
"""Copies of the update in memory afterwards: rows taken from the model, the blob, and the carrier's copy. Only the
first is in a card's memory."""
_REHEARSED: dict[tuple[str, Workload], Rehearsed] = {}
"""Of this process: runs that follow each other in one process often have the same model and step."""
_MOST_REHEARSED = 64
_BYTES_OF_FACTS = 1024
_VECTORS = 3


def rehearsable(device: str) -> str:
    """The device type on which to rehearse a step for `device`: the CPU if torch does not have `device` here."""
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    return "cpu" if missing else device


class Planner:
    """Forecasts for one configuration.

    Args:
        config: of the run. Only the configuration of its model is read.

    Raises:
        UserError: the model is unknown, cannot be reached, or is not a supported MoE model.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.workload = Workload.of(config)
        try:
            self._weights = ModelBytes(structure(config.model))
        except UnsupportedModelError as error:
            raise UserError(f"model.name = {config.model.name}: {error}") from None

    @property
    def num_experts(self) -> list[int]:
        """Experts per MoE layer."""
        return [layer.num_experts for layer in self._weights.layers]

    @property
    def top_k(self) -> list[int]:
        """Experts that a token uses, per MoE layer."""
        return [layer.top_k for layer in self._weights.layers]

    @property
    def smallest(self) -> int:
        """The fewest experts over all layers that a client can train with: top-k in every layer."""
        return sum(self._at_least())

    def _at_least(self) -> list[int]:
        most = max(self.top_k)  # the `at_least` of `selection.select`
        return [min(most, number) for number in self.num_experts]

    def spread(self, experts: int) -> list[int]:
        """This number of experts, spread over the layers as evenly as their sizes allow."""
        rest, counts = min(experts, sum(self.num_experts)), [0] * len(self.num_experts)
        while rest > 0:
            open_layers = [i for i, number in enumerate(self.num_experts) if counts[i] < number]
            share, more = divmod(rest, len(open_layers))
            for place, index in enumerate(open_layers):
                added = min(share + (place < more), self.num_experts[index] - counts[index])
                counts[index] += added
                rest -= added
        return counts

    def forecast(self, residents: int | list[int], workload: Workload | None = None) -> Forecast:
        """What training takes with these experts: a number over all layers, spread evenly, or one per layer."""
        workload = workload or self.workload
        counts = self.spread(residents) if isinstance(residents, int) else list(residents)
        held = self._held(counts, workload)
        travelling = self._weights.travelling(counts, workload)
        down = blob_bytes(travelling) + _BYTES_OF_FACTS
        up = down + _VECTORS * 4 * sum(self.num_experts)
        received = RECEIVED_COPIES.get(workload.device, RECEIVED_COPIES["cpu"]) * down
        returned = UPDATE_COPIES.get(workload.device, UPDATE_COPIES["cpu"]) * up
        whole = self._weights.whole(workload).nbytes
        trained = whole + sum(
            number * layer.trained_bytes(workload) for layer, number in zip(self._weights.layers, counts, strict=True)
        )
        rehearsed = self._rehearse(workload)
        step = _by_kind(rehearsed.step.peak({"expert_gradients": self._expert_share(counts, workload)}))
        moments = [
            held | step | {"optimizer": 2 * trained if workload.steps > 1 else 0, "buffers": received},
            held | {"gradients": trained, "optimizer": 2 * trained, "buffers": received},
            held | {"buffers": received + returned},
        ]
        kinds = max(moments, key=lambda kinds: sum(kinds.values()))
        base = sum(held.values()) - held["adapters"]
        forward = sum(rehearsed.forward.peak().values())
        return Forecast(
            residents=counts,
            kinds={kind: kinds.get(kind, 0) for kind in KINDS},
            flops=rehearsed.flops,
            loading_peak=self._loading_peak(counts, held, workload),
            bootstrap_peak=base + forward,
            bytes_down=down,
            bytes_up=up,
            beside=beside(workload.device, down, up),
        )

    def _framework(self, workload: Workload) -> int:
        known = FRAMEWORK_BYTES.get(workload.device, FRAMEWORK_BYTES["cpu"])
        if workload.device == "cuda":  # GPU memory holds no data
            return known
        if workload.expert_dtype in ("8bit", "4bit"):
            known += QUANTISER_BYTES
        if workload.attention:
            known += ATTENTION_LORA_BYTES
        if workload.device == "cpu" and workload.torch_dtype.itemsize == 2 and not workload.compute_float32:
            known += CODE_BYTES
        plain = (".jsonl", ".json", ".csv", ".tsv")
        sources = self.config.data.clients or [self.config.data.source]
        return known + (0 if all(source.endswith(plain) for source in sources) else PARQUET_BYTES)

    def _held(self, counts: list[int], workload: Workload) -> dict[str, int]:
        """What stays in memory from step to step, except optimizer and messages."""
        layers = list(zip(self._weights.layers, counts, strict=True))
        return {
            "framework": self._framework(workload),
            **self._weights.base(workload),
            "experts": sum(number * layer.base_bytes(workload) for layer, number in layers),
            "adapters": sum(number * layer.adapter_bytes(workload) for layer, number in layers)
            + self._weights.shared_bytes(workload),
        }

    def _loading_peak(self, counts: list[int], held: dict[str, int], workload: Workload) -> int:
        """First all except the experts is read, then the experts; a tensor whose precision changes is in memory twice.

        Adapters are made for a whole layer, and those of residents are kept. Experts to be trained are stacked, layer
        by layer.
        """
        base, expert = self._weights.largest_bytes(workload)
        layers = list(zip(self._weights.layers, counts, strict=True))
        fresh = max(layer.num_experts * layer.adapter_bytes(workload) for layer, _ in layers)
        stacked = max(number * layer.base_bytes(workload) for layer, number in layers)
        total, experts = sum(held.values()), held["experts"] + held["adapters"]
        return max(total - experts + base, total + max(expert, fresh, stacked if workload.experts == "full" else 0))

    def _expert_share(self, counts: list[int], workload: Workload) -> float:
        """Bytes of the residents' gradients divided by those of the experts in a rehearsal."""
        sizes = [layer.trained_bytes(workload) for layer in self._weights.layers]
        there = sum(sizes) * GROUPS
        return sum(size * number for size, number in zip(sizes, counts, strict=True)) / there if there else 0.0

    def _rehearse(self, workload: Workload) -> Rehearsed:
        key = self._weights.fingerprint, replace(workload, steps=2, device=rehearsable(workload.device))
        if key not in _REHEARSED:
            while len(_REHEARSED) >= _MOST_REHEARSED:
                del _REHEARSED[next(iter(_REHEARSED))]
            _REHEARSED[key] = rehearse(self._weights.model(key[1]), key[1])
        return _REHEARSED[key]

    def fit(self, memory_bytes: int, workload: Workload | None = None, margin: float = MARGIN) -> Fit:
        """The most experts with which a device stays within `memory_bytes`, at least top-k in every layer.

        Args:
            margin: the predicted peak is multiplied by this.
        """
        low, high = self.smallest, sum(self.num_experts)
        best = self.forecast(low, workload)
        if best.needed(margin) > memory_bytes:
            return Fit(memory_bytes, 0, best, best.needed(margin))
        while low < high:
            middle = (low + high + 1) // 2
            forecast = self.forecast(middle, workload)
            if forecast.needed(margin) <= memory_bytes:
                low, best = middle, forecast
            else:
                high = middle - 1
        return Fit(memory_bytes, low, best, best.needed(margin))

    def smallest_change(
        self, memory_bytes: int, workload: Workload | None = None, margin: float = MARGIN
    ) -> Change | None:
        """The smallest change of settings with which top-k experts per layer fit; None if no two changes are enough.

        Shorter text comes first, then smaller batches, checkpointing, fewer bits, lower rank; then pairs of them.
        """
        workload = workload or self.workload
        ladders = self._ladders(workload)
        for number in (1, 2):
            for chosen in combinations(ladders, number):
                settings = self._least(workload, chosen, memory_bytes, margin)
                if settings is not None:
                    changed = replace(workload, **settings)
                    needed = self.forecast(self.smallest, changed).needed(margin)
                    return Change({_SETTINGS[key]: value for key, value in settings.items()}, needed)
        return None

    def _ladders(self, workload: Workload) -> list[tuple[str, list[Any]]]:
        """(field, values from the mildest change to the strongest), for fields that can be changed."""
        ladders: list[tuple[str, list[Any]]] = [
            ("length", list(_shorter(workload.length))),
            ("batch_size", list(_halves(workload.batch_size))),
            ("gradient_checkpointing", [] if workload.gradient_checkpointing else [True]),
        ]
        bits = {"8bit": ["4bit"], "4bit": []}.get(workload.expert_dtype, ["8bit", "4bit"])
        ladders.append(("expert_dtype", bits if workload.experts != "full" else []))
        ladders.append(("rank", list(_halves(workload.rank)) if workload.experts == "lora" else []))
        return [ladder for ladder in ladders if ladder[1]]

    def _least(
        self, workload: Workload, ladders: tuple[tuple[str, list[Any]], ...], memory_bytes: int, margin: float
    ) -> dict[str, Any] | None:
        """The mildest values on these ladders that fit: the last ladder is made milder first, then the one before."""

        def fits(settings: dict[str, Any]) -> bool:
            changed = replace(workload, **settings)
            # A cheap check first: often the weights alone do not fit.
            if sum(self._held(self._at_least(), changed).values()) * margin > memory_bytes:
                return False
            return self.forecast(self.smallest, changed).needed(margin) <= memory_bytes

        settings = {field: values[-1] for field, values in ladders}
        if not fits(settings):
            return None
        for field, values in reversed(ladders):
            for value in values[:-1]:
                if fits(settings | {field: value}):
                    settings[field] = value
                    break
        return settings


_SETTINGS = {
    "length": "data.max_tokens",
    "batch_size": "train.batch_size",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "expert_dtype": "model.expert_dtype",
    "rank": "train.rank",
}
_SHORTEST = 16
"""Tokens: a template and a little text."""


def _halves(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def _shorter(length: int) -> Iterator[int]:
    """Three quarters, half, three eighths, a quarter ... of the length."""
    while length // 2 >= _SHORTEST:
        yield length * 3 // 4
        length //= 2
        yield length


def _by_kind(peak: dict[str, int]) -> dict[str, int]:
    """A rehearsal's kinds under the names of `KINDS`."""
    gradients = peak.get("gradients", 0) + peak.get("expert_gradients", 0)
    return {"activations": peak.get("activations", 0), "logits": peak.get("logits", 0), "gradients": gradients}
