"""A small OLMoE model from nothing but packaged texts, whose experts belong to domains (`pools`).

The same seed gives the same model on the same machine. Training can be stopped at any time and goes on from its last
state: the order of the texts follows from the seed and the step alone.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.bases.pools import Pools
from hfedmoe.bases.texts import Piece, padded, pieces
from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing
from hfedmoe.files.whole import writing, written_whole

PAD, END = "<pad>", "<end>"
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that the model follows from."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 256
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    pool: int = 4
    words: int = 64
    tokens: int = 96
    batch: int = 32
    steps: int = 3000
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    balance: float = 0.05
    outside: float = 0.1
    seed: int = 0


Report = Callable[[int, int, float, float], None]
"""(step, steps, loss, seconds left)."""


def pretrain(out: Path, recipe: Recipe, report: Report, save_every: int = 250) -> None:
    """Train the base and write it as a transformers checkpoint.

    What is needed to go on lies in a folder beside `out` until it is done: call again to go on.

    Raises:
        UserError: the texts are not installed, `out` is not empty, or the state there is of another recipe.
    """
    texts = pieces("train", recipe.words)
    state = out.with_name(f".{out.name}.training")
    with written_whole(out) as scratch:
        with writing(out):
            state.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(texts, recipe, state)
        rows = _encoded(texts, tokenizer, recipe)
        torch.manual_seed(recipe.seed)
        model = _model(recipe, tokenizer)
        run = _Training(model, rows, recipe, state)
        run.go(report, save_every)
        with writing(out):
            model.to(torch.bfloat16)  # half the file; what was rounded away is below what training moves
            model.config.dtype = "bfloat16"
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            (scratch / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    for file in state.iterdir():
        file.unlink()
    state.rmdir()


class _Training:
    def __init__(self, model: Any, rows: list[Tensor], recipe: Recipe, state: Path) -> None:
        self.model, self.rows, self.recipe, self.state = model, rows, recipe, state
        self.pools = Pools(model, recipe.pool)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.done = self._resume()

    def go(self, report: Report, save_every: int) -> None:
        recipe, started, began = self.recipe, time.monotonic(), self.done
        self.model.train()
        while self.done < recipe.steps:
            loss = self._step(self.done)
            self.done += 1
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} in step {self.done}; choose a smaller learning rate")
            left = (time.monotonic() - started) / (self.done - began) * (recipe.steps - self.done)
            report(self.done, recipe.steps, loss, left)
            if self.done % save_every == 0 and self.done < recipe.steps:
                self._save()
        self.model.eval()

    def _step(self, step: int) -> float:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(step, recipe)
        tokens, mask = padded([self.rows[i] for i in _batch(step, len(self.rows), recipe)])
        with self.pools.routing(mask):
            hidden = self.model.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        wanted = mask[:, 1:]
        logits = self.model.lm_head(hidden[:, :-1][wanted])
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][wanted])
        balance, outside = self.pools.terms()
        (loss + recipe.balance * balance + recipe.outside * outside).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _save(self) -> None:
        from safetensors.torch import save

        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors["pools"] = self.pools.bias
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value.reshape(-1) for name, value in values.items()}
        with replacing(self.state / STATE) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        with replacing(self.state / PROGRESS) as file:
            file.write(json.dumps({"step": self.done, "recipe": asdict(self.recipe)}).encode())

    def _resume(self) -> int:
        from safetensors.torch import load_file

        if not (self.state / PROGRESS).is_file():
            return 0
        progress = json.loads((self.state / PROGRESS).read_text(encoding="utf-8"))
        if progress["recipe"] != asdict(self.recipe):
            raise UserError(
                f"{self.state}: was begun with another recipe; finish it with that one, or delete the folder"
            )
        tensors = load_file(self.state / STATE)
        self.pools.bias.copy_(tensors.pop("pools"))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, kind = name.split(".", 2)
                like = parameters[int(number)]
                states.setdefault(int(number), {})[kind] = tensor[0] if kind == "step" else tensor.view_as(like)
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return int(progress["step"])


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def _batch(step: int, number: int, recipe: Recipe) -> list[int]:
    """Which texts a step takes: every epoch goes through all in an order of its own."""
    per_epoch = number // recipe.batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch))
    return order[place * recipe.batch : (place + 1) * recipe.batch].tolist()


def _tokenizer(texts: list[Piece], recipe: Recipe, state: Path) -> Any:
    """A byte-level BPE of the texts; kept in `state`, so that going on does not train it again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = state / "tokenizer.json"
    if not file.is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[PAD, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((" " + piece.text for piece in texts), trainer)
        with replacing(file) as stream:
            stream.write(tokenizer.to_str().encode())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def _encoded(texts: list[Piece], tokenizer: Any, recipe: Recipe) -> list[Tensor]:
    end = tokenizer.eos_token_id
    rows = tokenizer([" " + piece.text for piece in texts])["input_ids"]
    return [torch.tensor([*row[: recipe.tokens - 1], end]) for row in rows]


def _model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model
