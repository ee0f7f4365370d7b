"""The limits of a server, API keys, and how many requests each client has left in this minute."""

import dataclasses
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from flax_transformer.serving.refusals import Refusal

MINUTE_S = 60.0
CLIENTS = 10_000  # so many are remembered, the last ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may have, and all of them together.

    Attributes:
        body_bytes: the largest body.
        queue_bytes: the bodies of all requests that are being read or answered; one alone may be larger.
        characters: the characters of all texts of a request.
        texts: the texts in one list.
        sentences: the sentences of a request.
        queue_sentences: the sentences of all requests that are waiting or being translated.
        alternatives: the alternatives of each text.
        deadline_s: seconds from the end of reading a request to its answer.
        read_s: seconds to read a request, and to take an answer.
        requests_a_minute: of each client; 0 for any number. A list of texts counts as many.
    """

    body_bytes: int = 4 * 2**20
    queue_bytes: int = 64 * 2**20
    characters: int = 500_000
    texts: int = 1000
    sentences: int = 10_000
    queue_sentences: int = 20_000
    alternatives: int = 3
    deadline_s: float = 300.0
    read_s: float = 30.0
    requests_a_minute: int = 0


class Keys:
    """API keys, of which only digests are kept."""

    def __init__(self, keys: Iterable[str]):
        """Takes the keys that are allowed."""
        self._digests = [_digest(key) for key in keys]

    def __contains__(self, key: str) -> bool:
        """Whether a key is allowed; it takes the same time for each key, so that time tells nothing about them."""
        found, given = False, _digest(key)
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found


def read_keys(text: str, name: str) -> Keys:
    """Reads a file of keys: one in each line; blank lines, and lines that begin with "#", are passed over.

    Args:
        text: what is in the file.
        name: the name of the file, for the error.

    Raises:
        ValueError: there is no key, or one has white space inside or fewer than 8 characters.
    """
    lines = (line.strip() for line in text.splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{name} has no keys: write one in each line, or leave the option out")
    for number, key in enumerate(keys, 1):
        if len(key) < 8 or len(key.split()) > 1:  # the key itself must not appear in an error
            raise ValueError(
                f"key {number} in {name} has {len(key)} characters or white space inside: use 8 characters or more "
                "without spaces, for example the output of `openssl rand -hex 16`"
            )
    return Keys(keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Meter:
    """Counts the requests of each client: it has a minute's worth at first, and gets more as time goes on."""

    def __init__(self, a_minute: int, clock: Callable[[], float] = time.monotonic):
        """Takes the requests a minute, 0 for any number, and a clock that tells seconds."""
        self._a_minute, self._clock = a_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, client: str, cost: int = 1) -> None:
        """Counts a request.

        Args:
            client: whose request it is: an address, or the digest of a key.
            cost: as how many requests it counts.

        Raises:
            Refusal: with status 429; the client has had its requests.
        """
        if not self._a_minute:
            return
        now, rate = self._clock(), self._a_minute / MINUTE_S
        left, then = self._left.pop(client, (float(self._a_minute), now))
        left = min(self._a_minute, left + (now - then) * rate)
        cost = min(cost, self._a_minute)  # or a long list would never be let in
        enough = left >= cost
        self._left[client] = left - cost if enough else left, now
        while len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        if not enough:
            raise Refusal(
                429,
                f"too many requests: {self._a_minute} a minute are allowed, and each text of a list counts; "
                "wait, or ask the server's operator for more",
                reason="rate",
                retry_after=(cost - left) / rate,
            )
