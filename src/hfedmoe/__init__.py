"""hfedmoe: unequal devices fine-tune one Mixture-of-Experts language model together, without sharing data.

`hfedmoe.run` runs a federation and `hfedmoe.open_run` opens one that has run (docs/python.md). They are imported when
they are first used, so that `import hfedmoe` and the command line start at once; `__init__.pyi` has their types.
"""

import importlib
import os
from typing import Any

# Flower and huggingface_hub report usage by default; a tool for private data must not.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# If the hub cannot be reached, huggingface_hub logs many retries; the error after them is enough.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
# On processors with 16-bit products, oneDNN keeps code for every number of rows, which differs for each expert and
# batch. With its default limit of 1,024 a device grew by a gigabyte in 60 steps; with this limit it is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Fast tokenizers warn about every fork after their first use, as in simulations; their threads do not help here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"

__all__ = ["Experts", "Run", "RunConfig", "UserError", "__version__", "load_config", "open_run", "resume", "run"]
_FROM = {
    **dict.fromkeys(("Experts", "Run", "open_run", "resume", "run"), "hfedmoe.api"),
    **dict.fromkeys(("RunConfig", "load_config"), "hfedmoe.config"),
    "UserError": "hfedmoe.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
