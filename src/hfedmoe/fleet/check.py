"""The check of a device before it joins: nothing is trained, and nothing about its rows is sent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.invite import Invitation, key_of
from hfedmoe.fleet.offer import Offer, versions
from hfedmoe.fleet.reach import ask

if TYPE_CHECKING:
    from hfedmoe.config import RunConfig
    from hfedmoe.data.task import Task
    from hfedmoe.data.terms import Terms


@dataclass(frozen=True)
class Finding:
    """One line of the check."""

    fits: bool
    text: str

    @property
    def line(self) -> str:
        """As it is shown."""
        return f"{'ok' if self.fits else 'FAILS':6}{self.text}"


def check(invitation: Invitation, key: Path | None, allowed: Allowed) -> Iterator[Finding]:
    """All that can be known before training, in the order in which it is found out.

    Args:
        key: the device's own private key, if the invitation has none.
    """
    try:
        offer = ask(invitation, key_of(invitation, key))
    except UserError as error:
        yield Finding(False, str(error))
        return
    yield Finding(True, f"{invitation.address} answers and knows {invitation.name}")
    yield from check_offer(offer, allowed)


def check_offer(offer: Offer, allowed: Allowed) -> Iterator[Finding]:
    """What can be known of a run and this device."""
    here = versions()
    if offer.versions != here:
        yield Finding(False, f"the server has {offer.versions}, this device {here}; install the server's versions")
        return
    yield Finding(True, f"both have {here}")
    from hfedmoe.data.terms import Terms

    try:
        config, terms = allowed.config_of(offer.config), Terms.from_json(offer.terms)
    except UserError as error:
        yield Finding(False, str(error))
        return
    except ValueError as error:
        yield Finding(False, f"the server's task cannot be read ({error})")
        return
    rows: list[Task] = []
    for part in (
        lambda: _weights(config, offer),
        lambda: _rows(config, terms, allowed, rows),
        lambda: _tokens(config, offer, terms, rows),
        lambda: _budget(config, allowed),
    ):
        yield _finding(part)


def _finding(part: Callable[[], str]) -> Finding:
    try:
        return Finding(True, part())
    except UserError as error:
        return Finding(False, " ".join(str(error).split()))


def _weights(config: "RunConfig", offer: Offer) -> str:
    from hfedmoe.models.digest import base_digest

    if base_digest(config) != offer.base:
        raise UserError(f"{config.model.name}: its weights are not the server's; get the same model")
    return f"{config.model.name}: has the server's weights"


def _rows(config: "RunConfig", terms: "Terms", allowed: Allowed, found: "list[Task]") -> str:
    from hfedmoe.data.terms import own_task

    task = own_task(str(allowed.data.expanduser()), config.data, terms, allowed.form())
    found.append(task)
    return f"{allowed.data}: {len(task.train)} rows can be read"


def _tokens(config: "RunConfig", offer: Offer, terms: "Terms", rows: "list[Task]") -> str:
    from hfedmoe.data.fits import check_task
    from hfedmoe.models.digest import tokenizer_digest
    from hfedmoe.models.loading import load
    from hfedmoe.prepare import encoder_of
    from hfedmoe.server.evaluation import room_of

    loaded = load(config.model, config.seed, carve=True)
    if tokenizer_digest(loaded.tokenizer) != offer.tokenizer:
        raise UserError(f"{config.model.name}: its tokenizer is not the server's; get the same model")
    warnings: list[str] = []
    for task in rows:
        encoder = encoder_of(loaded, task, config.data)
        encoder.first_token_only = terms.first_token_only
        warnings += check_task(task, [], encoder, room_of(loaded.model, loaded.tokenizer))
    return "; ".join([f"{config.model.name}: has the server's tokenizer", *warnings])


def _budget(config: "RunConfig", allowed: Allowed) -> str:
    from hfedmoe.device.capacity import experts_of
    from hfedmoe.device.planner import Planner
    from hfedmoe.method.methods import METHODS
    from hfedmoe.models.loaded import device_of

    planner = Planner(config)
    total = sum(planner.num_experts)
    if METHODS[config.method.name].ignores_budgets(config.method):
        return f"{config.method.name} holds all {total} experts on every device, whatever its budget"
    device = str(device_of(config.model.device))
    held = experts_of(allowed.budget, planner.num_experts, planner.top_k, lambda: planner, device)
    return f"{allowed.budget} holds {held} of {total} experts"
