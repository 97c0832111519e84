"""How a device asks its server for the run, and what it says if the server does not answer as it should."""

import datetime
import ssl
from email.utils import parsedate_to_datetime

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from hfedmoe.errors import UserError
from hfedmoe.fleet.findings import PATH as REPORT_PATH
from hfedmoe.fleet.findings import Report
from hfedmoe.fleet.invite import Invitation
from hfedmoe.fleet.keys import signed
from hfedmoe.fleet.offer import PATH, VERSION_HEADER, Offer, versions

TIMEOUT_S = 15.0
MOST_BYTES, MOST_VERSIONS = 1 << 25, 80
CLOCK_S = 30.0
"""Seconds that two clocks may differ; Flower accepts a signature only for a short time."""


class VersionsError(UserError):
    """Server and device have other versions."""


class NoAnswerError(UserError):
    """The server cannot be reached now, or serves no run; it may be worth trying again."""


def ask(invitation: Invitation, key: ec.EllipticCurvePrivateKey) -> Offer:
    """The run that the server of an invitation serves.

    Raises:
        NoAnswerError: the server is away, or serves no run now.
        VersionsError: it has another version.
        UserError: the server is another one, or does not know this device.
    """
    answer = _call(invitation, key, "GET", PATH)
    try:
        return Offer.from_json(answer.text)
    except ValueError:
        raise UserError(f"{invitation.address}: answers, but not as an hfedmoe server of this version does") from None


def tell(invitation: Invitation, key: ec.EllipticCurvePrivateKey, report: Report) -> None:
    """Tell the server what the check of a run found. Raises as `ask`."""
    _call(invitation, key, "POST", REPORT_PATH, report.to_json())


def _call(
    invitation: Invitation, key: ec.EllipticCurvePrivateKey, method: str, path: str, content: str | None = None
) -> httpx.Response:
    """A good answer of the server."""
    where = invitation.address
    trust = ssl.create_default_context(cadata=invitation.ca)  # this fleet's authority and no other
    try:
        with httpx.Client(verify=trust, timeout=TIMEOUT_S, trust_env=False) as client:
            headers = signed(key) | {VERSION_HEADER: versions()}
            answer = client.request(method, f"https://{where}{path}", headers=headers, content=content)
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(
                f"{where}: is not the server of this invitation, or this device's clock is wrong "
                f"({_reason(error)}); ask for a new invitation"
            ) from None
        raise NoAnswerError(f"{where}: cannot be reached ({_reason(error)}); is `hfedmoe serve` running?") from None
    if answer.status_code == httpx.codes.OK and len(answer.content) <= MOST_BYTES:
        return answer
    if answer.status_code == httpx.codes.CONFLICT:
        theirs = "".join(letter for letter in answer.text[:MOST_VERSIONS] if letter.isprintable())
        raise VersionsError(f"the server has {theirs}, this device {versions()}; install the server's versions")
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        off = _seconds_off(answer)
        if off > CLOCK_S:
            raise UserError(f"{where}: this device's clock and the server's differ by {off:.0f} s; set the clock")
        raise UserError(f"{where}: does not know the key of {invitation.name}; ask for a new invitation")
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise NoAnswerError(f"{where}: answers, but serves no run now; try again when one is served")
    raise UserError(f"{where}: answers with {answer.status_code}; is it an hfedmoe server of this version?")


def _seconds_off(answer: httpx.Response) -> float:
    try:
        there = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return 0.0
    return abs((datetime.datetime.now(datetime.UTC) - there).total_seconds())


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
