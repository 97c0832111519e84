"""Frozen experts stored in 32, 16, 8 and 4 bit: bytes, time of a LoRA training step, and loss of accuracy.

    python -m benchmarks.expert_storage [--rounds 3] [--threads N] [--json FILE]

Memory and time: a stack of 4 layers with 16 experts each, in the shape of OLMoE-1B-7B (hidden 2048, intermediate 1024),
with random weights that exist only in the stored form, top-8, LoRA rank 8. All computation is in float32; a step is
forward, backward and AdamW. A batch has 4 x 64 tokens (128 per expert); the small batch has 64 (32 per expert), where
dequantising costs the largest share. Every variant has its own process, and the processes take their steps in turn.
Peak memory is the operating system's figure for the whole process. CPU seconds of all threads are measured too: with
`--threads 1` they hardly depend on other users of the machine. Freed memory is given back at once, as in a client with
a budget, so every dequantised matrix is mapped again: most of the cost of storage below float32 comes from this.

Accuracy: the change of the stack's output, and the packaged SmolLM2-135M-Instruct with its feed-forward matrices stored
like experts: the language-modelling loss on Reuters-R8 test documents, and its increase in per cent over float32. (The
package has that model in another 4-bit format already; "float32" means the values that this format stands for.)

In the summary "16bit" is bfloat16; `memory` compares whole processes, `time`, `small_batch_time` and `cpu_time` compare
medians; `loss_increase` is in per cent.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import in_own_process, parser, report
from hfedmoe.device.peak import peak_process_bytes

MODULE = "benchmarks.expert_storage"
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, RANK = 4, 16, 2048, 1024, 8, 8
SHAPES = {"up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
TOKENS, FEW_TOKENS = 256, 64
DOCUMENTS, LENGTH, BATCH = 16, 128, 4
STORAGES = ("float32", "bfloat16", "float16", "8bit", "4bit")
SIXTEEN = "bfloat16"


class DrawnExperts:
    """Experts with random weights: every read draws the same weights again."""

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return dict(SHAPES)

    def read(self, layer: int, expert: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(layer * EXPERTS + expert)
        return {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in SHAPES.items()}


class Stack:
    """Expert layers one after the other, x + experts(norm(x)), with the same random routing in every pass."""

    def __init__(self, storage: str) -> None:
        import torch

        from hfedmoe.moe.experts.activation import Gate
        from hfedmoe.moe.experts.frozen import SeparateBase
        from hfedmoe.moe.experts.kernel import ExpertMath
        from hfedmoe.moe.experts.quantised import store_as
        from hfedmoe.moe.experts.store import ExpertStore, HeldWeights
        from hfedmoe.moe.experts.trained import lora_experts

        source, device = DrawnExperts(), torch.device("cpu")
        store = ExpertStore(source, [EXPERTS] * LAYERS, storage, torch.float32, device)
        store.reside([torch.ones(EXPERTS, dtype=torch.bool)] * LAYERS)
        self.layers, self.trained = [], []
        for layer in range(LAYERS):
            base = SeparateBase(*(HeldWeights(store, layer, name, transposed=False) for name in SHAPES))
            trained = lora_experts(EXPERTS, SHAPES["up"], SHAPES["down"], RANK, 2 * RANK, layer, device)
            self.layers.append(ExpertMath(base, Gate(_silu_gate, silu=True), scale=trained.scale))
            self.trained.append(trained)
        self.bytes_per_expert = store.nbytes / (LAYERS * EXPERTS)
        exact = source.read(0, 0)  # all experts have the same distribution
        self.weight_error = statistics.mean(
            float((store_as(weight, storage, torch.float32)(torch.float32) - weight).norm() / weight.norm())
            for weight in exact.values()
        )
        leaves = [leaf for trained in self.trained for leaf in trained.parameters()]
        self.optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=True)

    def __call__(self, tokens: int) -> Any:
        """The sum of what the layers add to their input, [tokens, HIDDEN]."""
        import torch

        from hfedmoe.moe.experts.groups import group_pairs
        from hfedmoe.moe.experts.kernel import experts_forward

        generator = torch.Generator().manual_seed(1)
        x = start = torch.randn(tokens, HIDDEN, generator=generator)
        for math, trained in zip(self.layers, self.trained, strict=True):
            weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
            groups = group_pairs(index.reshape(-1), EXPERTS, TOP_K)
            leaves = trained.of([expert for expert, _, _ in groups.spans])
            normed = torch.nn.functional.rms_norm(x, (HIDDEN,))
            gates = (weights / weights.sum(1, keepdim=True)).reshape(-1)
            x = x + experts_forward(math, normed, gates, groups, trained.stacks, leaves)
        return x - start

    def step(self, tokens: int) -> dict[str, float]:
        """Seconds of one training step, as wall time and as CPU time."""
        start, processor = time.perf_counter(), time.process_time()
        self(tokens).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}


def _silu_gate(u: Any) -> Any:
    import torch

    gate, up = u.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def worker(storage: str, output: Path, threads: int) -> None:
    """Build the stack, write its output to a file and report; then take a step for every number of tokens on stdin."""
    import torch
    from safetensors.torch import save_file

    from hfedmoe.device.allocator import give_back_freed_memory

    if threads:
        torch.set_num_threads(threads)
    give_back_freed_memory()  # as a client with a memory budget does
    stack = Stack(storage)
    with torch.no_grad():
        save_file({"output": stack(TOKENS)}, output)
    print(json.dumps({"bytes": stack.bytes_per_expert, "error": stack.weight_error}), flush=True)
    for line in sys.stdin:
        print(json.dumps(stack.step(int(line)) | {"peak_bytes": peak_process_bytes()}), flush=True)


class Worker:
    """A worker process and its answers."""

    def __init__(self, storage: str, output: Path, threads: int) -> None:
        command = [sys.executable, "-m", MODULE, "--worker", storage, str(output), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.built = self._answer()
        self.steps: dict[int, list[dict[str, float]]] = {TOKENS: [], FEW_TOKENS: []}

    def step(self, tokens: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return self._answer()

    def seconds(self, tokens: int, kind: str = "seconds") -> list[float]:
        return [step[kind] for step in self.steps[tokens]]

    @property
    def peak_bytes(self) -> float:
        return max(step["peak_bytes"] for steps in self.steps.values() for step in steps)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} exited with {self.process.wait()}")  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def language_losses() -> dict[str, float]:
    """Mean loss per token of SmolLM2 on Reuters documents, for every storage of its feed-forward matrices."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfedmoe.data.sources import read
    from hfedmoe.models.packaged import smollm2_folder
    from hfedmoe.moe.experts.quantised import store_as

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = (tokenizer(text)["input_ids"] for text in read("reuters-r8", ["text"], "test").columns["text"])
    long = [tokens[:LENGTH] for tokens in documents if len(tokens) >= LENGTH][:DOCUMENTS]
    batches = torch.tensor(long).split(BATCH)
    original = [
        (layer.mlp, torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]), layer.mlp.down_proj.weight)
        for layer in model.model.layers
    ]
    losses = {}
    with torch.no_grad():
        for storage in STORAGES:
            for mlp, up, down in original:
                gate_up = store_as(up, storage, torch.float32)(torch.float32)
                mlp.gate_proj.weight, mlp.up_proj.weight = map(torch.nn.Parameter, gate_up.chunk(2))
                mlp.down_proj.weight = torch.nn.Parameter(store_as(down, storage, torch.float32)(torch.float32))
            found = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in batches]
            losses[storage] = statistics.mean(found)
    return losses


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="timed steps of every variant, taken in turn")
    arguments.add_argument("--threads", type=int, default=0, help="threads of every timed process; 0: torch decides")
    options = arguments.parse_args()
    losses = in_own_process(MODULE, ["--losses"])
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {storage: Path(folder) / f"{storage}.safetensors" for storage in STORAGES}
        try:
            for storage, file in files.items():
                workers[storage] = Worker(storage, file, options.threads)
            for one in workers.values():
                one.step(FEW_TOKENS)  # warms up
            for _ in range(options.rounds):
                for tokens in (TOKENS, FEW_TOKENS):
                    for one in workers.values():
                        one.steps[tokens].append(one.step(tokens))
        finally:
            for one in workers.values():
                one.close()
        changes = output_changes(files)
    exact = losses["float32"]
    rows = [
        {
            "stored": storage,
            "MB/expert": one.built["bytes"] / 1e6,
            "peak MB": one.peak_bytes / 1e6,
            "s/step min": min(one.seconds(TOKENS)),
            "s/step median": statistics.median(one.seconds(TOKENS)),
            "CPU s/step": statistics.median(one.seconds(TOKENS, "cpu_seconds")),
            "small batch min": min(one.seconds(FEW_TOKENS)),
            "small batch median": statistics.median(one.seconds(FEW_TOKENS)),
            "weight error %": 100 * one.built["error"],
            "output change %": 100 * changes[storage],
            "SmolLM2 loss": losses[storage],
            "increase %": 100 * (losses[storage] - exact) / exact,
        }
        for storage, one in workers.items()
    ]
    by_storage = {str(row["stored"]): row for row in rows}
    columns = {
        "bytes": "MB/expert",
        "memory": "peak MB",
        "time": "s/step median",
        "small_batch_time": "small batch median",
        "cpu_time": "CPU s/step",
    }
    summary: dict[str, Any] = {
        f"{key}_{small}_vs_16bit": by_storage[small][column] / by_storage[SIXTEEN][column]
        for small in ("4bit", "8bit")
        for key, column in columns.items()
    }
    summary |= {f"loss_increase_{small}": by_storage[small]["increase %"] for small in ("4bit", "8bit")}
    report(rows, summary, options.json)


def output_changes(files: dict[str, Path]) -> dict[str, float]:
    """||y - y of float32|| / ||y of float32|| of the untrained stacks' outputs."""
    from safetensors.torch import load_file

    outputs = {storage: load_file(file)["output"] for storage, file in files.items()}
    exact = outputs["float32"]
    return {storage: ((output - exact).norm() / exact.norm()).item() for storage, output in outputs.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--losses"]:
        print(json.dumps(language_losses()))
    else:
        main()
