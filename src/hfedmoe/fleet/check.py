"""The check of a device before it joins: nothing is trained, and nothing about its rows is sent."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.findings import BUDGET, MODEL, ROWS, RUN, SERVER, TOKENIZER, VERSIONS, Finding, Report, failing
from hfedmoe.fleet.invite import Invitation, key_of
from hfedmoe.fleet.offer import Offer, versions
from hfedmoe.fleet.reach import VersionsError, ask, tell

if TYPE_CHECKING:
    from hfedmoe.config import RunConfig
    from hfedmoe.data.task import Task
    from hfedmoe.data.terms import Terms

logger = logging.getLogger(__name__)
MOST_LETTERS = 200
"""Of an error that nobody expected."""


def check(invitation: Invitation, key: Path | None, allowed: Allowed, telling: bool = False) -> Iterator[Finding]:
    """All that can be known before training, in the order in which it is found out.

    Args:
        key: the device's own private key, if the invitation has none.
        telling: whether the server is told codes and counts at the end (`findings.Report`).
    """
    try:
        private = key_of(invitation, key)
        offer = ask(invitation, private)
    except UserError as error:
        yield failing(VERSIONS if isinstance(error, VersionsError) else SERVER, str(error))
        return
    yield Finding(True, SERVER, f"{invitation.address} answers and knows {invitation.name}")
    found = []
    for finding in check_offer(offer, allowed):
        found.append(finding)
        yield finding
    if telling:
        try:
            tell(invitation, private, Report(offer.run, tuple(found)))
        except UserError as error:
            logger.warning("the server does not know what was found: %s", error)


def check_offer(offer: Offer, allowed: Allowed) -> Iterator[Finding]:
    """What can be known of a run and this device."""
    here = versions()
    if offer.versions != here:
        yield failing(VERSIONS, f"the server has {offer.versions}, this device {here}; install the server's versions")
        return
    yield Finding(True, VERSIONS, f"both have {here}")
    try:
        config, terms = _run(offer, allowed)
    except Exception as error:
        yield _failed(RUN, error)
        return
    rows: list[Task] = []
    for about, part in (
        (MODEL, lambda: _weights(config, offer)),
        (ROWS, lambda: _rows(config, terms, allowed, rows)),
        (TOKENIZER, lambda: _tokens(config, offer, terms, rows)),
        (BUDGET, lambda: _budget(config, allowed)),
    ):
        yield _finding(about, part)


def _finding(about: str, part: Callable[[], tuple[str, int, int]]) -> Finding:
    try:
        text, count, of = part()
        return Finding(True, about, text, count, of)
    except Exception as error:
        return _failed(about, error)


def _failed(about: str, error: Exception) -> Finding:
    """The one line of an error of any kind: what else goes wrong in a check is also for its owner to read."""
    from hfedmoe.client.app import trouble_of

    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        logger.debug("this was not expected", exc_info=error)
        text = f"the {about} cannot be checked ({type(error).__name__}: {text[:MOST_LETTERS]})"
    return failing(about, text, trouble_of(error).code)


def _run(offer: Offer, allowed: Allowed) -> "tuple[RunConfig, Terms]":
    from hfedmoe.data.terms import Terms

    config = allowed.config_of(offer.config)
    try:
        return config, Terms.from_json(offer.terms)
    except ValueError as error:
        raise UserError(f"the server's task cannot be read ({error})") from None


def _weights(config: "RunConfig", offer: Offer) -> tuple[str, int, int]:
    from hfedmoe.models.digest import base_digest
    from hfedmoe.wire.same import require_base

    require_base(config.model.name, base_digest(config), offer.base)
    return f"{config.model.name}: has the server's weights", 0, 0


def _rows(config: "RunConfig", terms: "Terms", allowed: Allowed, found: "list[Task]") -> tuple[str, int, int]:
    from hfedmoe.data.terms import own_task

    allowed.check_task(config.data, terms)
    task = own_task(str(allowed.data.expanduser()), config.data, terms, allowed.form())
    found.append(task)
    allowed.policy.check_rows(len(task.train))
    return f"{allowed.data}: {len(task.train)} rows can be read", len(task.train), 0


def _tokens(config: "RunConfig", offer: Offer, terms: "Terms", rows: "list[Task]") -> tuple[str, int, int]:
    from hfedmoe.data.fits import check_task
    from hfedmoe.models.digest import tokenizer_digest
    from hfedmoe.models.loading import load
    from hfedmoe.prepare import encoder_of
    from hfedmoe.server.evaluation import room_of
    from hfedmoe.wire.same import require_tokenizer

    loaded = load(config.model, config.seed, carve=True)
    require_tokenizer(config.model.name, tokenizer_digest(loaded.tokenizer), offer.tokenizer)
    warnings: list[str] = []
    for task in rows:
        encoder = encoder_of(loaded, task, config.data)
        encoder.first_token_only = terms.first_token_only
        warnings += check_task(task, [], encoder, room_of(loaded.model, loaded.tokenizer))
    return "; ".join([f"{config.model.name}: has the server's tokenizer", *warnings]), 0, 0


def _budget(config: "RunConfig", allowed: Allowed) -> tuple[str, int, int]:
    from hfedmoe.device.capacity import experts_of
    from hfedmoe.device.planner import Planner
    from hfedmoe.method.methods import METHODS
    from hfedmoe.models.loaded import device_of

    planner, policy = Planner(config), allowed.policy
    total = sum(planner.num_experts)
    if METHODS[config.method.name].ignores_budgets(config.method):
        policy.experts(total, total)
        return f"{config.method.name} holds all {total} experts on every device, whatever its budget", total, total
    device = str(device_of(config.model.device))
    held = experts_of(allowed.budget, planner.num_experts, planner.top_k, lambda: planner, device)
    most = policy.experts(held, max(planner.top_k) * len(planner.top_k))
    limited = "" if most == held else f"; max-experts is {most}"
    return f"{allowed.budget} holds {held} of {total} experts{limited}", most, total
