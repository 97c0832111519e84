"""Whether it matters which experts of a model a text is given: what a base for experiments must pass.

Everything is measured on held-out texts whose domains are known (`texts`), as the loss of the next token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hfedmoe.bases.texts import Piece, padded
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks

LEAST_INFORMATION = 0.1
"""Of the normalised mutual information of domain and expert, the mean over the layers."""
LEAST_GAIN = 0.05
"""Nats per token: what the router, and what the choice of experts, must be worth."""
DEAD = 0.1
"""An expert with less than this multiple of its even share of the routed tokens is dead."""


@dataclass(frozen=True)
class Check:
    """One requirement."""

    name: str
    value: float
    wanted: str
    passed: bool


@dataclass(frozen=True)
class Kept:
    """The loss when each domain's texts may use only a share of the experts."""

    share: float
    chosen: float
    """With the experts that the domain's other texts use most."""
    random: float


@dataclass(frozen=True)
class Findings:
    """What was measured, and the requirements."""

    texts: int
    loss: float
    """Nats per token, with the model as it is."""
    random_routing: float
    """With the experts of every token drawn at random, with the same weights."""
    information: list[float]
    """Per layer, the normalised mutual information of a text's domain and its most probable expert."""
    least_used: list[float]
    """Per layer, the share of routed tokens of the least used expert, as a multiple of 1 / E."""
    kept: list[Kept]

    @property
    def checks(self) -> list[Check]:
        """The requirements."""
        information, least = fmean(self.information), min(self.least_used)
        quarter = next((kept for kept in self.kept if kept.share == 0.25), None)
        router = self.random_routing - self.loss
        found = [
            Check(
                "information of domain and expert",
                information,
                f">= {LEAST_INFORMATION}",
                information >= LEAST_INFORMATION,
            ),
            Check("loss that the router saves", router, f">= {LEAST_GAIN}", router >= LEAST_GAIN),
            Check("least used expert, times its even share", least, f">= {DEAD}", least >= DEAD),
        ]
        if quarter is not None:
            gain = quarter.random - quarter.chosen
            found.append(Check("loss that choosing a quarter saves", gain, f">= {LEAST_GAIN}", gain >= LEAST_GAIN))
        return found

    @property
    def passed(self) -> bool:
        """Whether all requirements are met."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"checks": [asdict(check) for check in self.checks], "passed": self.passed}

    def as_text(self) -> str:
        """For people."""
        lines = [
            f"{self.texts} held-out texts; loss {self.loss:.3f}, with random routing {self.random_routing:.3f}",
            "",
        ]
        lines += ["share of experts kept   chosen   random"]
        lines += [f"{kept.share:21.1%} {kept.chosen:8.3f} {kept.random:8.3f}" for kept in self.kept]
        lines += [
            "",
            *(f"{'passed' if c.passed else 'FAILED':7} {c.name}: {c.value:.3f} ({c.wanted})" for c in self.checks),
        ]
        return "\n".join(lines)


SHARES = (0.5, 0.25, 0.125)
"""Of the experts that are kept."""


def texts_read(known: Sequence[Piece], held_out: Sequence[Piece]) -> int:
    """How many texts `check` passes through the model; a text counts as often as it is read."""
    return len(known) + len(held_out) * (2 + 2 * len(SHARES))


def check(
    model: Any,
    tokenizer: Any,
    known: Sequence[Piece],
    held_out: Sequence[Piece],
    seed: int = 0,
    note: Callable[[int], None] = lambda number: None,
) -> Findings:
    """Measure a model with MoE layers.

    Args:
        known: texts to choose each domain's experts by; held_out: others, to measure on.
        seed: of random experts and random routing.
        note: told after every batch how many texts have been read, of `texts_read`.
    """
    wrapped = MoEModel(model.eval(), experts="frozen", router=False)
    probe = _Probe(wrapped, tokenizer, note)
    usage = {domain: probe.usage(_of(known, domain)) for domain in sorted({piece.domain for piece in held_out})}
    loss, shares, tops = probe.measured(held_out)
    generator = torch.Generator().manual_seed(seed)
    with _random_routing(wrapped, generator):
        random_routing, *_ = probe.measured(held_out)
    numbers, least = wrapped.num_experts, max(layer.top_k for layer in wrapped.layers)
    kept = []
    for share in SHARES:
        sizes = [max(least, round(number * share)) for number in numbers]
        chosen = {
            domain: [_top(layer, n) for layer, n in zip(own, sizes, strict=True)] for domain, own in usage.items()
        }
        drawn = {
            domain: [_top(torch.rand(number, generator=generator), n) for number, n in zip(numbers, sizes, strict=True)]
            for domain in usage
        }
        kept.append(Kept(share, probe.loss_with(held_out, chosen), probe.loss_with(held_out, drawn)))
    domains = [piece.domain for piece in held_out]
    return Findings(
        texts=len(held_out),
        loss=loss,
        random_routing=random_routing,
        information=[mutual_information(domains, own) for own in tops],
        least_used=[float(layer.min() * len(layer)) for layer in shares],
        kept=kept,
    )


class _Probe:
    """Passes of texts through a model, with what its routers do."""

    def __init__(
        self, model: MoEModel, tokenizer: Any, note: Callable[[int], None], batch: int = 32, longest: int = 128
    ) -> None:
        self.model, self.tokenizer, self.batch, self.longest = model, tokenizer, batch, longest
        self._note, self._read = note, 0

    def usage(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Per layer [E], the mean routing probability over the texts."""
        sums = [torch.zeros(number) for number in self.model.num_experts]
        for _ in self._passes(pieces):
            for total, routing in zip(sums, self.model.routing, strict=True):
                assert routing.evidence is not None
                total += routing.evidence.g.sum(0).cpu()
        return [total / max(1, len(pieces)) for total in sums]

    def measured(self, pieces: Sequence[Piece]) -> tuple[float, list[Tensor], list[list[int]]]:
        """Loss per token; per layer the shares of routed tokens [E], and each text's most probable expert."""
        losses, tokens = 0.0, 0
        counts = [torch.zeros(number) for number in self.model.num_experts]
        tops: list[list[int]] = [[] for _ in self.model.num_experts]
        for loss, number in self._passes(pieces):
            losses, tokens = losses + loss, tokens + number
            for layer, routing in enumerate(self.model.routing):
                assert routing.evidence is not None
                counts[layer] += routing.evidence.routed.cpu()
                tops[layer] += routing.evidence.g.argmax(1).tolist()
        return losses / tokens, [count / count.sum() for count in counts], tops

    def loss_with(self, pieces: Sequence[Piece], experts: dict[str, list[Tensor]]) -> float:
        """Loss per token when the texts of each domain may use only these experts, bool [E] per layer."""
        losses, tokens = 0.0, 0
        for domain, resident in experts.items():
            self.model.set_resident(resident)
            for loss, number in self._passes(_of(pieces, domain)):
                losses, tokens = losses + loss, tokens + number
        self.model.set_resident(None)
        return losses / tokens

    @torch.no_grad()
    def _passes(self, pieces: Sequence[Piece]) -> Iterator[tuple[float, int]]:
        """(sum of the losses, tokens) of each batch; its evidence is in the model's routing until the next."""
        for start in range(0, len(pieces), self.batch):
            texts = [" " + piece.text for piece in pieces[start : start + self.batch]]
            rows = [torch.tensor(row[: self.longest]) for row in self.tokenizer(texts)["input_ids"]]
            ids, mask = padded(rows)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            self.model.watch(TokenMasks(mask))
            logits = self.model.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1][mask[:, 1:]]
            wanted = ids[:, 1:][mask[:, 1:]]
            self._read += len(texts)
            self._note(self._read)
            yield float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")), len(wanted)
        self.model.watch(None)


def mutual_information(left: Sequence[object], right: Sequence[object]) -> float:
    """Of two labellings, over the mean of their entropies: 0 independent, 1 the same up to names."""
    both, total = list(zip(left, right, strict=True)), len(left)
    entropies = [_entropy(values, total) for values in (list(left), list(right), both)]
    mean = (entropies[0] + entropies[1]) / 2
    return 0.0 if mean == 0 else (entropies[0] + entropies[1] - entropies[2]) / mean


def _entropy(values: Sequence[object], total: int) -> float:
    counts: dict[object, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return -sum(count / total * math.log(count / total) for count in counts.values())


def _of(pieces: Sequence[Piece], domain: str) -> list[Piece]:
    return [piece for piece in pieces if piece.domain == domain]


def _top(scores: Tensor, number: int) -> Tensor:
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.topk(number).indices] = True
    return keep


@contextmanager
def _random_routing(model: MoEModel, generator: torch.Generator) -> Iterator[None]:
    """Every token gets other experts, each layer's in an order of its own, with the weights that it had."""
    before = [state.compute for state in model.states]
    for state in model.states:
        number, compute = state.layer.num_experts, state.compute

        def drawn(
            hidden: Tensor, index: Tensor, weights: Tensor, number: int = number, compute: Any = compute
        ) -> Tensor:
            noise = torch.rand(len(index), number, generator=generator)
            return compute(hidden, noise.topk(index.shape[1], dim=1).indices.to(index.device), weights)

        state.compute = drawn  # type: ignore[method-assign]
    try:
        yield
    finally:
        for state, compute in zip(model.states, before, strict=True):
            state.compute = compute  # type: ignore[method-assign]
