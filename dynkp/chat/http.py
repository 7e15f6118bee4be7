"""The HTTP client below the `openai` package, with limits that hold whatever the server sends.

- The decoded body of an answer has at most `MAX_ANSWER_BYTES`, whatever its size in transit: it is read as a stream, and a
  compressed one is decompressed by steps, so that a compression bomb takes no more memory than the limit.
- Redirects are not followed: the posts go to the address that the user named, and to no other.
- The environment's proxies are not used for loopback addresses.
"""

from __future__ import annotations

import ipaddress
import zlib
from typing import Any
from urllib.parse import urlsplit

# A rationale has a few kilobytes; answers with log-probabilities a megabyte.
MAX_ANSWER_BYTES = 8 << 20
# Encodings that are decompressed here; all others are refused, since no other is requested.
_GZIP, _IDENTITY = {"gzip", "x-gzip"}, {"", "identity"}


class AnswerTooLarge(Exception):
    """An answer has more bytes than the limit. Sending the request again would not help."""


class UndecodableAnswer(Exception):
    """An answer's body is not complete, or is not in the encoding that its headers name."""


def is_loopback(url: str) -> bool:
    """Return whether an address belongs to this machine.

    Args:
        url: The address.

    Example:
        >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://[::1]/v1"), is_loopback("http://10.0.0.7/v1")
        (True, True, False)
    """
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class BodyDecoder:
    """Decodes a body that arrives in pieces, up to a limit.

    Args:
        encoding: The header `Content-Encoding`.
        limit: Maximum number of decoded bytes.

    Raises:
        UndecodableAnswer: If the encoding is not supported.

    Example:
        >>> decoder = BodyDecoder("gzip", limit=1000)
        >>> decoder.add(zlib.compress(b"A dog.", wbits=31))
        >>> decoder.finish()
        b'A dog.'
    """

    def __init__(self, encoding: str = "", *, limit: int = MAX_ANSWER_BYTES):
        encoding = encoding.strip().lower()
        if encoding not in _GZIP | _IDENTITY:
            raise UndecodableAnswer(f"the answer's encoding {encoding!r:.50} was not asked for")
        self.limit = limit
        self._gzip = zlib.decompressobj(wbits=31) if encoding in _GZIP else None
        self._body = bytearray()

    def add(self, piece: bytes) -> None:
        """Decode a piece.

        Args:
            piece: The next bytes of the body, as they arrived.

        Raises:
            AnswerTooLarge: If the decoded body exceeds the limit.
            UndecodableAnswer: If the piece is not valid in its encoding.
        """
        if self._gzip is not None:
            try:
                piece = self._gzip.decompress(piece, self.limit + 1 - len(self._body))
            except zlib.error as error:
                raise UndecodableAnswer(f"the answer is not valid gzip ({error})") from error
        if len(self._body) + len(piece) > self.limit:
            raise AnswerTooLarge(f"the answer has more than {self.limit:,} bytes")
        self._body += piece

    def finish(self) -> bytes:
        """Return the decoded body.

        Raises:
            UndecodableAnswer: If a compressed body is not complete.
        """
        if self._gzip is not None and not self._gzip.eof:
            raise UndecodableAnswer("the answer's gzip stream is not complete")
        return bytes(self._body)


def bounded_http_client(openai: Any, base_url: str, *, timeout: float) -> Any:
    """Create the HTTP client for `openai.AsyncOpenAI`.

    Args:
        openai: The package `openai`, which brings its HTTP library with it (`httpx` or `httpx2`, by version).
        base_url: The server's address.
        timeout: Seconds to wait for each step of a request.

    Returns:
        An `AsyncClient` of that library.
    """

    class BoundedClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            response = await super().send(request, **{**options, "stream": True})
            try:
                # Several headers are joined by commas, and then no known encoding: a body compressed twice is refused.
                decoder = BodyDecoder(response.headers.get("content-encoding", ""))
                async for piece in response.aiter_raw():
                    decoder.add(piece)
                body = decoder.finish()
            finally:
                await response.aclose()
            dropped = ("content-encoding", "content-length", "transfer-encoding")
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in dropped]
            return type(response)(response.status_code, headers=headers, content=body, request=request)

    return BoundedClient(
        timeout=timeout,
        follow_redirects=False,
        trust_env=not is_loopback(base_url),
        headers={"accept-encoding": "gzip"},
    )
