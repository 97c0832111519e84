"""How well the planner predicts: the measured peak memory of a client's process, compared with the prediction.

    python -m benchmarks.planner_accuracy [--json FILE]      # about 6 minutes, 4 GB of disk for a while
    python -m benchmarks.planner_accuracy --framework        # measures planner.FRAMEWORK_BYTES on this machine

Each configuration is a client in a separate process: it opens a checkpoint with random weights, reads its resident
experts, trains two steps on what the server sent, and packs its update, all with the code that a real client runs.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import in_own_process, parser, report

BIG: dict[str, Any] = {"vocab_size": 49152, "num_attention_heads": 16, "hidden_size": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {
        **BIG,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "eos_token_id": 0,
    },
    "mixtral": {
        **BIG,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {
        **BIG,
        "intermediate_size": 2048,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        **BIG,
        "intermediate_size": 2816,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 8,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        **BIG,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "switch_transformers": {
        "vocab_size": 49152,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_heads": 16,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "num_experts": 16,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}
TINY: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One client: a family, the share of the experts that it holds, and how it trains."""

    family: str
    share: float
    batch: int
    length: int
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        return [
            f"train.batch_size={self.batch}",
            f"data.max_tokens={self.length}",
            *(f"{key}={value}" for key, value in self.settings.items()),
        ]


FULL = {"train.experts": "full"}
CHECKPOINTING = {"train.gradient_checkpointing": "true"}
CASES = [
    Case("olmoe", 0.25, 8, 128),
    Case("olmoe", 1.0, 4, 128, CHECKPOINTING),
    Case("olmoe", 0.5, 8, 64, {"model.dtype": "bfloat16", "train.rank": "32"}),
    Case("olmoe", 0.125, 4, 64, FULL),
    Case("mixtral", 0.5, 4, 128),
    Case("mixtral", 0.25, 4, 128, FULL),
    Case("mixtral", 1.0, 8, 64, {"model.expert_dtype": "4bit"}),
    Case("qwen3_moe", 0.25, 8, 64, {"train.attention": "true"}),
    Case("qwen3_moe", 0.5, 4, 256, {**CHECKPOINTING, "model.expert_dtype": "bfloat16"}),
    Case("deepseek_v2", 0.25, 4, 128),
    Case("deepseek_v2", 0.5, 2, 128, {"model.expert_dtype": "8bit"}),
    Case("gpt_oss", 0.5, 4, 128),
    Case("switch_transformers", 0.5, 8, 128),
    Case("switch_transformers", 0.125, 16, 32, {**FULL, **CHECKPOINTING}),
]


def predict(folder: Path, case: Case) -> tuple[Any, float]:
    """The forecast for a case, and its seconds."""
    from hfedmoe.device.planner import Planner

    started = time.perf_counter()
    planner = Planner(_config(folder, case))
    forecast = planner.forecast(max(planner.smallest, round(case.share * sum(planner.num_experts))))
    return forecast, time.perf_counter() - started


def _config(folder: Path, case: Case) -> Any:
    from hfedmoe.config import load_config

    return load_config(
        None,
        [
            f'model.name="{folder}"',
            "model.device=cpu",
            f'data.source="{folder / "rows.jsonl"}"',
            "data.format=classification",
            "clients.count=1",
            *case.overrides,
        ],
    )


def measure(folder: Path, case: Case, residents: list[int]) -> dict[str, Any]:
    """Peak bytes and seconds of a client in a separate process."""
    arguments = [str(folder), json.dumps(case.__dict__), json.dumps(residents)]
    return in_own_process("benchmarks.planner_accuracy", ["--client", *arguments])


def client(folder: Path, case: Case, residents: list[int]) -> dict[str, Any]:
    """What a device does in its first round, from opening the checkpoint to packing the update."""
    import torch

    from hfedmoe.client.app import client_app
    from hfedmoe.client.device import Device
    from hfedmoe.device.peak import peak_process_bytes
    from hfedmoe.events import Silent
    from hfedmoe.moe.payload import expected_shapes
    from hfedmoe.prepare import prepare
    from hfedmoe.wire.inprocess import InProcessGrid
    from hfedmoe.wire.messages import TRAIN, facts_of, train_request, unpack_bits

    config = _config(folder, case)
    prepared = prepare(config, Silent(), carve=True)
    model = prepared.model
    device = Device(0, "client", model, prepared.encoder, prepared.task.train, config, prepared.initial)
    generator = torch.Generator().manual_seed(0)
    resident = []
    for number, held in zip(model.num_experts, residents, strict=True):
        resident.append(torch.zeros(number, dtype=torch.bool))
        resident[-1][torch.randperm(number, generator=generator)[:held]] = True
    model.set_resident(resident)
    loaded = peak_process_bytes()
    tensors = {name: torch.randn(shape) * 0.01 for name, shape in expected_shapes(model, resident).items()}
    request = train_request(1, resident, tensors)
    del tensors
    started = time.perf_counter()
    grid = InProcessGrid(client_app(lambda *_: device), 1)
    (reply,) = grid.send_and_receive([grid.create_message(request, TRAIN, 1, "")])
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    return {
        "peak": peak_process_bytes(),
        "loaded": loaded,
        "train_s": time.perf_counter() - started,
        "trained": sum(int(bits.sum()) for bits in unpack_bits(facts_of(reply)["trained"], model.num_experts)),
    }


def write(family: str, config: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint in bfloat16, and rows that are long enough for any prompt."""
    from transformers import CONFIG_MAPPING

    from benchmarks.checkpoints import write as write_checkpoint

    write_checkpoint(CONFIG_MAPPING[family](**config), folder)
    draw = random.Random(0)
    words = [
        "grain",
        "trade",
        "oil",
        "ship",
        "bank",
        "money",
        "rate",
        "share",
        "year",
        "profit",
        "loss",
        "crude",
        "wheat",
        "dollar",
        "price",
        "market",
    ]
    # Rows have different words: similar rows would all be routed to the same few experts.
    texts = [" ".join(draw.choices(draw.sample(words, 4), k=400)) for _ in range(64)]
    rows = [{"text": text, "label": ("grain", "trade")[i % 2]} for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def framework() -> int:
    """Peak bytes of a client with a tiny model, minus what the planner predicts for that model."""
    with tempfile.TemporaryDirectory() as name:
        folder, case = Path(name), Case("olmoe", 1.0, 2, 16)
        write("olmoe", TINY, folder)
        forecast, _ = predict(folder, case)
        peak: int = measure(folder, case, forecast.residents)["peak"]
        return peak - (forecast.peak - forecast.kinds["framework"])


def compare(only: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the summary. Checkpoints are written family by family and deleted."""
    rows = []
    for family in dict.fromkeys(case.family for case in CASES):
        if only is not None and family != only:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(family, FAMILIES[family], folder)
            for case in (case for case in CASES if case.family == family):
                forecast, plan_s = predict(folder, case)
                measured = measure(folder, case, forecast.residents)
                rows.append(
                    {
                        "family": family,
                        "settings": " ".join(value for value in case.settings.values()) or "lora",
                        "experts": forecast.num_residents,
                        "trained": measured["trained"],
                        "batch": f"{case.batch} x {case.length}",
                        "measured_MB": round(measured["peak"] / 1e6),
                        "predicted_MB": round(forecast.peak / 1e6),
                        "error_%": 100 * (forecast.peak / measured["peak"] - 1),
                        "loaded_MB": round(measured["loaded"] / 1e6),
                        "predicted_loading_MB": round(forecast.loading_peak / 1e6),
                        "plan_s": plan_s,
                        "train_s": measured["train_s"],
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    errors = [abs(row["error_%"]) / 100 for row in rows]
    summary = {"configurations": len(rows), "max_error": max(errors), "median_error": median(errors)}
    return rows, summary


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--framework", action="store_true", help="measure what a client takes without a model")
    arguments.add_argument("--family", choices=list(FAMILIES), help="only this one")
    arguments.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.client:
        place, case, held = given.client
        print(json.dumps(client(Path(place), Case(**json.loads(case)), json.loads(held))))
    elif given.framework:
        print(json.dumps({"framework_bytes": framework()}))
    else:
        report(*compare(given.family), given.json)
