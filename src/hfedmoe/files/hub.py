"""Whether the model hub can be reached, asked once and briefly: its own client tries again for minutes."""

import functools
import logging
import sys

logger = logging.getLogger(__name__)

TIMEOUT_S = 6.0


@functools.cache
def reach_hub() -> bool:
    """Whether the hub answers; if not, the rest of this process uses only what is cached, as with HF_HUB_OFFLINE=1.

    Call it before something may be downloaded. Says in one warning why the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        logger.warning(
            "the hub (%s) cannot be reached (%s); only what is cached here is used; check the network and HTTPS_PROXY",
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
