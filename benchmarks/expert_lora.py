"""A LoRA training step on fused experts: ours against PEFT's `target_parameters` and against frozen experts.

    python -m benchmarks.expert_lora [--rounds 3] [--json FILE]

The model is OLMoE-shaped with random weights: 8 layers, hidden 576, intermediate 768, 16 experts, top-2, batch 8 x 64
tokens. Every variant runs in processes of its own, in turn, several times; the step is forward, backward and AdamW.
Frozen experts train one attention matrix instead, in the faster of the stock implementations. Peak memory is the
operating system's figure for the whole process. PEFT with batched_mm is left out: it copies the weights once per
(token, expert) pair and does not fit in 24 GiB.
"""

import json
import statistics
import sys
import time
from typing import Any

from benchmarks.common import in_own_process, parser, peak_bytes, report

LAYERS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, BATCH, LENGTH, RANK = 8, 576, 768, 16, 2, 8, 64, 8
VARIANTS = {
    "frozen eager": ("frozen", "eager"),
    "frozen grouped_mm": ("frozen", "grouped_mm"),
    "PEFT eager": ("peft", "eager"),
    "PEFT grouped_mm": ("peft", "grouped_mm"),
    "hfedmoe": ("ours", "hfedmoe"),
    "hfedmoe, 4 of 16 resident": ("carved", "hfedmoe"),
}


def build() -> Any:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        eos_token_id=2,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
    )
    return OlmoeForCausalLM(config).train()


def prepare(kind: str, implementation: str) -> tuple[Any, list[Any]]:
    """The model, and what the optimizer trains."""
    import torch

    model = build()
    if kind in ("ours", "carved"):
        from hfedmoe.moe.model import MoEModel

        ours = MoEModel(model, rank=RANK, router=False)
        if kind == "carved":
            keep = torch.arange(EXPERTS) % 4 == 0
            ours.carve([keep] * LAYERS)
        return model, ours.parameters()
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind == "frozen":
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        return model, [weight]
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    peft_model = get_peft_model(model, config)
    return peft_model, [parameter for parameter in peft_model.parameters() if parameter.requires_grad]


def worker(kind: str, implementation: str, steps: int) -> dict[str, Any]:
    import torch

    model, parameters = prepare(kind, implementation)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "peak_bytes": peak_bytes(), "loss": loss.item()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="how often every variant is run, in turn")
    arguments.add_argument("--steps", type=int, default=3, help="timed steps per run, after one that is not timed")
    options = arguments.parse_args()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, (kind, implementation) in VARIANTS.items():
            results[name].append(
                in_own_process("benchmarks.expert_lora", ["--worker", kind, implementation, str(options.steps)])
            )
    # The smallest of all steps is the least disturbed by other users of the machine; the median is reported beside it.
    rows = [
        {
            "variant": name,
            "s/step median": statistics.median(s for run in runs for s in run["seconds"]),
            "s/step min": min(s for run in runs for s in run["seconds"]),
            "peak MB": statistics.median(run["peak_bytes"] for run in runs) / 1e6,
        }
        for name, runs in results.items()
    ]
    step = {row["variant"]: row["s/step median"] for row in rows}
    peak = {row["variant"]: row["peak MB"] for row in rows}
    best_peft = min((name for name in step if name.startswith("PEFT")), key=lambda name: step[name])
    frozen = min(step["frozen eager"], step["frozen grouped_mm"])
    report(
        rows,
        {
            "best_peft": best_peft,
            "speedup_vs_best_peft": step[best_peft] / step["hfedmoe"],
            "memory_vs_best_peft": peak["hfedmoe"] / peak[best_peft],
            "step_vs_frozen": step["hfedmoe"] / frozen,
        },
        options.json,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
