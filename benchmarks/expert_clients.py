"""Clients made of texts whose domains are known; part of `python -m benchmarks.expert_scores`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.bases.texts import Piece
from hfedmoe.seeds import generator

BLOCK = 20
"""Pieces in a row, as they come: parts of one document follow each other, so blocks hardly share documents."""


@dataclass
class Client:
    """One client's texts as tokens."""

    number: int
    domains: dict[str, int]
    """Its own and its held-out texts of each domain together."""
    own: list[Tensor]
    held_out: list[Tensor]

    @property
    def about(self) -> str:
        """For people."""
        return ", ".join(sorted(self.domains, key=lambda name: -self.domains[name])[:3])


def clients_of(
    pieces: list[Piece],
    encode: Callable[[list[str]], list[Tensor]],
    number: int,
    seed: int,
    alpha: float | None,
    own: int,
    held_out: int,
) -> Iterator[Client]:
    """Clients with `own` and `held_out` texts each (fewer where a domain has not enough), drawn by the seed.

    Every second block of a domain's texts is for clients' own texts, the others are held out. Clients of one domain
    each go through the domains in an order drawn by the seed; with `alpha`, each draws its shares of the domains.
    """
    places: dict[str, tuple[list[str], list[str]]] = {}
    for piece in pieces:
        texts = places.setdefault(piece.domain, ([], []))
        texts[(len(texts[0]) + len(texts[1])) // BLOCK % 2].append(piece.text)
    domains = sorted(places)
    order = torch.randperm(len(domains), generator=generator(seed, "domains")).tolist()
    for client in range(number):
        draws = generator(seed, "texts", client)
        if alpha is None:
            shares = torch.zeros(len(domains))
            shares[order[client % len(domains)]] = 1.0
        else:
            gamma = torch.distributions.Gamma(torch.full((len(domains),), alpha), torch.ones(len(domains)))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=draws)))
                shares = gamma.sample()
        drawn: tuple[list[str], list[str]] = ([], [])
        counted: dict[str, int] = {}
        for side, wanted in enumerate((own, held_out)):
            some = torch.multinomial(shares, wanted, replacement=True, generator=draws).bincount(minlength=len(domains))
            for domain, count in zip(domains, some.tolist(), strict=True):
                there = places[domain][side]
                chosen = torch.randperm(len(there), generator=draws)[:count].tolist()
                drawn[side].extend(there[place] for place in chosen)
                if chosen:
                    counted[domain] = counted.get(domain, 0) + len(chosen)
        rows = [encode(texts) for texts in drawn]
        shuffled = [rows[0][place] for place in torch.randperm(len(rows[0]), generator=draws).tolist()]
        yield Client(client, counted, shuffled, rows[1])
