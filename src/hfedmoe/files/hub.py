"""Check once and quickly if the hub can be reached: its own client retries for minutes."""

import functools
import logging
import sys

logger = logging.getLogger(__name__)

TIMEOUT_S = 6.0


@functools.cache
def hub_problem() -> str | None:
    """Why the hub does not answer; this process then uses only the cache, as with HF_HUB_OFFLINE=1. None: it does."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        constants.HF_HUB_OFFLINE = True
        datasets = sys.modules.get("datasets")
        if datasets is not None:
            datasets.config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT}: {str(error) or type(error).__name__}"
    return None


@functools.cache
def reach_hub() -> None:
    """Call it before a possible download. One warning says why the hub cannot be reached, if nobody wished that."""
    problem = hub_problem()
    if problem is not None and not problem.startswith("HF_HUB_OFFLINE"):
        logger.warning(
            "the hub cannot be reached (%s); only cached files are used; check the network and HTTPS_PROXY", problem
        )


def why_not_on_hub(name: str, file: str, revision: str | None) -> str | None:
    """Why a file of a hub repository cannot be had: it is not in the cache, and the hub does not answer.

    None: it is cached, or the hub can be asked; whether that has it is not looked at here.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:
        return "it is no hub id"
    problem = None if isinstance(cached, str) else hub_problem()
    return None if problem is None else f"it is not in the cache, and the hub cannot be reached ({problem})"
