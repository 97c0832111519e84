"""All clients must have the server's base model and tokenizer. Neither is sent, so digests of them are compared."""

from dataclasses import dataclass

from hfedmoe.errors import UserError
from hfedmoe.wire.trouble import BASE, TOKENIZER


@dataclass(frozen=True, slots=True)
class Digests:
    """Of one side's model (`models.digest`); both are empty where all clients are of the server's process."""

    base: str = ""
    """Of the frozen weights, and of the random numbers for new ones."""
    tokenizer: str = ""


NO_DIGESTS = Digests()


class OtherModelError(UserError):
    """A device's base model or tokenizer is not the server's; the text names the model of the device.

    Args:
        code: one of `trouble.CODES`, which is all that the server is told.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


def require_base(name: str, own: str, servers: str) -> None:
    """Raise OtherModelError if the digest of a device's base model `name` is not the server's."""
    if own != servers:
        raise OtherModelError(f"{name}: its weights are not the server's; get the same model", BASE)


def require_tokenizer(name: str, own: str, servers: str) -> None:
    """Raise OtherModelError if the digest of a device's tokenizer, that of model `name`, is not the server's."""
    if own != servers:
        raise OtherModelError(f"{name}: its tokenizer is not the server's; get the same model", TOKENIZER)
