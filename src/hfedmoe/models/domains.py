"""SmolLM2-135M-Instruct with experts that belong to domains, made once from the packaged model and shipped changes.

The changes are of low rank and ship with hfedmoe (`shipped/README.md`); the whole model is kept in the cache, as a
transformers folder. `python -m hfedmoe.models.domains` makes it in advance.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfedmoe.errors import UserError
from hfedmoe.files.cache import cache_folder, made_once
from hfedmoe.models.packaged import smollm2_folder

if TYPE_CHECKING:
    from torch import Tensor

NAME = "smollm2-domains"
SHIPPED = Path(__file__).parent / "shipped" / f"{NAME}.safetensors"
SHA256 = "b12298f03c2837544ce7bfda1a57de83413e6e262e12f0f5be2a7c565226b03b"
"""Of the shipped file. Another one makes another model, in another folder of the cache."""


def domains_folder() -> Path:
    """The transformers folder of the model in float32; made if it does not exist yet.

    Raises:
        UserError: the package of the dense model is not installed, the shipped file is damaged, or the cache cannot be
            written.
    """
    dense = smollm2_folder()
    return made_once(kept_folder(dense), lambda scratch: _make(dense, scratch))


def kept_folder(dense: Path) -> Path:
    """The path of the transformers folder that is made from the dense model's; it may not exist yet."""
    return cache_folder() / f"{NAME}-{SHA256[:12]}-of-{dense.name}"


def write_changes(file: Path, changes: "Mapping[str, Tensor]", top_k: int) -> None:
    """Write the changes and routers that `with_changes` takes."""
    from safetensors.torch import save_file

    held = {name: tensor.contiguous() for name, tensor in changes.items()}
    save_file(held, file, metadata={"top_k": str(top_k)})


def _make(dense: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfedmoe.moe.branching import with_changes

    changes, top_k = _read_changes(SHIPPED)
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with_changes(model, changes, top_k).save_pretrained(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)


def _read_changes(file: Path) -> "tuple[dict[str, Tensor], int]":
    """The shipped changes, and experts per token. Raises UserError if they are not what was shipped."""
    from safetensors import safe_open

    try:
        same = hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); install hfedmoe again") from None
    if not same:
        raise UserError(f"{file}: is not the file that hfedmoe ships; install hfedmoe again")
    with safe_open(file, "pt") as found:
        return {name: found.get_tensor(name) for name in found.keys()}, int(found.metadata()["top_k"])  # noqa: SIM118


if __name__ == "__main__":
    print(domains_folder())
