"""The clients that `benchmarks.gpu_fits` measures, and their shapes.

Eight of middle size, so that each takes seconds and the framework does not hide the rest; and clients of two well-known
shapes that are held to a memory, with as many experts as the planner says.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfedmoe.config import RunConfig, load_config

_BIG: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 2048, "num_attention_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {
        **_BIG,
        "model_type": "olmoe",
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_key_value_heads": 16,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "eos_token_id": 0,
    },
    "mixtral": {
        **_BIG,
        "model_type": "mixtral",
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **_BIG,
        "model_type": "qwen3_moe",
        "intermediate_size": 4096,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        **_BIG,
        "model_type": "gpt_oss",
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "eos_token_id": 0,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
_TINY: dict[str, int] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
BF16 = {"model.dtype": "bfloat16"}
CHECKPOINTING = {"train.gradient_checkpointing": "true"}
RANK_16 = {"train.rank": "16"}


@dataclass(frozen=True)
class Case:
    """One client: a shape, how it trains, and how many experts it holds."""

    name: str
    shape: str
    batch: int
    length: int
    settings: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    """Of all experts; not read if `hold_gib` is given."""
    hold_gib: float | None = None
    """Memory to which the client is held; the planner chooses the experts for it."""
    tiny: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """The model's config with its family as `model_type`."""
        shape = SHAPES[self.shape]
        if not self.tiny:
            return shape
        return {name: _TINY.get(name, value) for name, value in shape.items()}

    def config(self, folder: Path, device: str, more: list[str]) -> RunConfig:
        """The configuration of a run with this client; `more` settings come last."""
        settings = {"data.format": "classification", "train.steps": "2", **self.settings}
        return load_config(
            None,
            [
                f'model.name="{folder}"',
                f"model.device={device}",
                f'data.source="{folder / "rows.jsonl"}"',
                "clients.count=1",
                'clients.budgets=["100%"]',
                f"train.batch_size={self.batch}",
                f"data.max_tokens={self.length}",
                *(f"{key}={value}" for key, value in settings.items()),
                *more,
            ],
        )


CASES = [
    Case("lora", "olmoe", 8, 256, BF16, share=0.5),
    Case("float32", "olmoe", 8, 256, {}, share=0.25),
    Case("checkpointing", "olmoe", 32, 256, {**BF16, **CHECKPOINTING, "model.expert_dtype": "4bit"}),
    Case("full", "mixtral", 8, 256, {"train.experts": "full"}, share=0.25),
    Case("4bit", "mixtral", 8, 256, {**BF16, "model.expert_dtype": "4bit", "train.attention": "true"}),
    Case("8bit", "qwen3_moe", 4, 512, {**BF16, "model.expert_dtype": "8bit", "train.rank": "32"}, share=0.5),
    Case("long answers", "qwen3_moe", 4, 256, {**BF16, "data.format": "completion"}, share=0.75),
    Case("sinks", "gpt_oss", 4, 512, BF16, share=0.5),
    Case("OLMoE in 4 GiB", "OLMoE-1B-7B", 8, 128, {**BF16, **RANK_16, **CHECKPOINTING}, hold_gib=4),
    Case("Qwen3 in 24 GiB", "Qwen3-30B-A3B", 4, 256, {**BF16, **RANK_16}, hold_gib=24),
    Case("OLMoE 4bit in 4 GiB", "OLMoE-1B-7B", 8, 128, {**BF16, **RANK_16, "model.expert_dtype": "4bit"}, hold_gib=4),
    Case(
        "Qwen3 4bit in 24 GiB", "Qwen3-30B-A3B", 4, 256, {**BF16, **RANK_16, "model.expert_dtype": "4bit"}, hold_gib=24
    ),
]


def cases(dry: bool) -> dict[str, Case]:
    """By name, in the order in which they are measured; `dry`: tiny, the same settings."""
    chosen = CASES
    if dry:
        chosen = [
            replace(case, batch=2, length=24, tiny=True, hold_gib=None if case.hold_gib is None else 1.0)
            for case in CASES
        ]
    return {case.name: case for case in chosen}
