"""How a device asks its server for the run, and what it says if the server does not answer as it should."""

import datetime
import ssl
from email.utils import parsedate_to_datetime

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from hfedmoe.errors import UserError
from hfedmoe.fleet.findings import PATH as REPORT_PATH
from hfedmoe.fleet.findings import Report
from hfedmoe.fleet.invite import Invitation
from hfedmoe.fleet.keys import signed
from hfedmoe.fleet.offer import PATH, VERSION_HEADER, Offer, versions

TIMEOUT_S = 15.0
MOST_BYTES, MOST_VERSIONS = 1 << 25, 80
AHEAD_S, BEHIND_S = SYSTEM_TIME_TOLERANCE - 1.0, TIMESTAMP_TOLERANCE - 1.0
"""How far a device's clock may differ: Flower accepts a signature for a short time, and a date has whole seconds."""


class VersionsError(UserError):
    """Server and device have other versions."""


class NoAnswerError(UserError):
    """The server cannot be reached now, or serves no run; it may be worth trying again."""


class ClockError(NoAnswerError):
    """The clocks of device and server differ; it is worth trying again, because clocks are set after a start."""


def ask(invitation: Invitation, key: ec.EllipticCurvePrivateKey) -> Offer:
    """The run that the server of an invitation serves.

    Raises:
        NoAnswerError: the server is away, or serves no run now; or clocks differ (ClockError).
        VersionsError: it has another version.
        UserError: the server is another one, or does not know this device; or the invitation is damaged.
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
    try:
        trust = ssl.create_default_context(cadata=invitation.ca)  # this fleet's authority and no other
    except (ssl.SSLError, ValueError):
        raise UserError(
            f"the certificate in the invitation of {invitation.name} is damaged; ask for it again"
        ) from None
    try:
        with httpx.Client(verify=trust, timeout=TIMEOUT_S, trust_env=False) as client:
            headers = signed(key) | {VERSION_HEADER: versions()}
            answer = client.request(method, f"https://{where}{path}", headers=headers, content=content)
    except httpx.InvalidURL as error:
        raise UserError(f"{where}: is no address of a server ({_reason(error)}); ask for a new invitation") from None
    except httpx.HTTPError as error:
        if "certificate is not yet valid" in str(error):
            now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
            raise ClockError(
                f"{where}: its certificate is not valid yet by this device's clock ({now}); set the clock"
            ) from None
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
        ahead = _seconds_ahead(answer)
        if not -BEHIND_S < ahead < AHEAD_S:
            apart = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
            raise ClockError(f"{where}: this device's clock is {apart} the server's; set the clock")
        raise UserError(f"{where}: does not know the key of {invitation.name}; ask for a new invitation")
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise NoAnswerError(f"{where}: answers, but serves no run now; try again when one is served")
    raise UserError(f"{where}: answers with {answer.status_code}; is it an hfedmoe server of this version?")


def _seconds_ahead(answer: httpx.Response) -> float:
    """By how much this device's clock is ahead of the server's."""
    try:
        there = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return 0.0
    return (datetime.datetime.now(datetime.UTC) - there).total_seconds()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
