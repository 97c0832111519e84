"""Check once and quickly if the hub can be reached: its own client retries for minutes."""

import functools
import logging
import sys

logger = logging.getLogger(__name__)

TIMEOUT_S = 6.0


@functools.cache
def reach_hub() -> bool:
    """Whether the hub answers; if not, this process then uses only the cache, as with HF_HUB_OFFLINE=1.

    Call it before a possible download. One warning says why the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        logger.warning(
            "the hub (%s) cannot be reached (%s); only cached files are used; check the network and HTTPS_PROXY",
            constants.ENDPOINT,
            str(error) or type(error).__name__,
        )
    else:
        return True
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        datasets.config.HF_HUB_OFFLINE = True
    return False
