"""The client of a chat server: sends a request, repeats it after transient failures, and paces all requests.

- The API key is read from the environment, and removed from everything the server returns before any other code sees it.
- A request that fails for a transient reason (429, 5xx, timeout, closed connection, incomplete body, invalid JSON) is sent
  again after a growing pause, at most `max_attempts` times. By default this takes more than two minutes, longer than a
  server's restart.
- 429 and Retry-After slow all requests down; 429 does not count as an attempt.
- Redirects are not followed, and the size of answers is limited (`dynkp.chat.http`).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dynkp.chat.http import AnswerTooLarge, bounded_http_client, is_loopback
from dynkp.chat.pacing import AdaptiveConcurrency
from dynkp.chat.request import ChatAnswer, ChatRequest, read_answer
from dynkp.files.terminal import printable

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
# The pauses between so many attempts, of which the longest are a minute, are 150 s in all at least.
MAX_ATTEMPTS = 12
# The one host that OPENAI_ORG_ID and OPENAI_PROJECT_ID are meant for.
_OPENAI_HOST = "api.openai.com"
# The key that is sent to servers without authentication.
_NO_KEY = "none"
# Shorter ones are placeholders such as "EMPTY": no secrets, and possibly words of an answer.
_SHORTEST_KEY = 8
_REDACTED = "[key]"
# Keys as a server's error may quote them, in full or in part.
_LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|key|xai|gsk)-[\w*-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)
_TRANSIENT_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
# With 401 and 402 all other requests will fail too. 403, 404 and 405 may concern one post once others have been answered.
_FINAL_STATUSES, _FINAL_STATUSES_AT_FIRST = {401, 402}, {403, 404, 405}
# The server behind a proxy is not running, or is not reached.
_UNREACHABLE_STATUSES = {502, 503, 504, 521, 522, 523}
_LONGEST_PAUSE = 60.0
_LONGEST_RETRY_AFTER = 600.0


class RequestFailed(Exception):
    """A request has no answer, and will not be sent again. The message gives the reason and contains no API key.

    Args:
        reason: The reason.
        unreachable: Whether the server could not be reached, so that the failure says nothing about the request.
    """

    def __init__(self, reason: str, *, unreachable: bool = False):
        super().__init__(reason)
        self.unreachable = unreachable


class ServerUnusable(Exception):
    """The server answers no request, so the run must stop. The message gives the reason and contains no API key."""


class RunStopped(Exception):
    """The run was stopped before the request was answered; the request itself did not fail."""


class _TransientFailure(Exception):
    """A failure after which the request is sent again.

    Args:
        reason: What happened, without the API key.
        retry_after: Seconds to wait that the server asks for, or None.
        rate_limit: Whether the server refused the request because of too many requests (429).
        unreachable: Whether the server could not be reached.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, rate_limit: bool = False, unreachable: bool = False):
        super().__init__(reason)
        self.unreachable = unreachable
        self.retry_after = retry_after
        self.rate_limit = rate_limit


class ChatClient:
    """Client of an OpenAI-compatible chat server: the `openai` package with the retry rules of this module.

    Create and use it inside one event loop:

    ```python
    client = ChatClient("http://127.0.0.1:8000/v1", concurrency=8)
    answer = await client.ask(ChatRequest([{"role": "user", "content": "Hello"}], {"model": "m"}))
    await client.close()
    ```

    Args:
        base_url: The server's address up to `/v1`.
        concurrency: Maximum number of requests at once, at least 1.
        timeout: Seconds to wait for an answer, above 0.
        max_attempts: Number of times a request is sent before it fails, at least 1. Answers with status 429 do not count. With
            the default and the default of `first_pause`, a request fails after at least 150 s.
        key_variable: Name of the environment variable that holds the API key. For a server without authentication the
            variable may be missing.
        first_pause: Seconds before the second attempt; doubled for each further one, with jitter, up to a minute.
        patience: Seconds without any answer after which a server that refuses requests by rate limits is unusable.

    Attributes:
        pace: The limit on concurrent requests.
        sent: Number of requests sent, repetitions included.
        answered: Number of answers received.

    Raises:
        ImportError: If the package `openai` is not installed.
        ValueError: If `base_url` is not an address or contains a password, if `timeout` or `max_attempts` is out of range,
            if `key_variable` is set and not the name of an environment variable, or if its value cannot be a key.
    """

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        timeout: float = 120.0,
        max_attempts: int = MAX_ATTEMPTS,
        key_variable: str = KEY_VARIABLE,
        first_pause: float = 0.5,
        patience: float = 1800.0,
    ):
        if key_variable != KEY_VARIABLE and key_variable not in os.environ:
            # The value is left out of the message: it may be the key itself.
            raise ValueError("key_variable (--api-key-env) must be the name of an environment variable that holds the key")
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("base_url must be an address such as http://127.0.0.1:8000/v1")
        if address.password or address.username or address.query:
            raise ValueError(f"base_url must have no user, password or query: a key belongs into {key_variable}")
        if timeout <= 0 or max_attempts < 1:
            raise ValueError(f"timeout={timeout!r} must be above 0, and max_attempts={max_attempts!r} at least 1")
        try:
            import openai
        except ImportError as error:
            raise ImportError("a teacher is asked through the openai client: pip install 'dynkp[teacher]'") from error
        key = os.environ.get(key_variable, "").strip() or _NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{key_variable} must hold a key: one line of ASCII characters")
        self._key_pattern = _spellings_of(key) if len(key) >= _SHORTEST_KEY else None
        self.key_variable = key_variable
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.first_pause = first_pause
        self.patience = patience
        self.pace = AdaptiveConcurrency(concurrency)
        self.sent = self.answered = 0
        self._last_answer = time.monotonic()
        self._outage_logged = False
        self._address = f"{address.scheme}://{address.netloc}"
        self._openai = openai
        if key != _NO_KEY and address.scheme == "http" and not is_loopback(base_url):
            logger.warning(
                "The key in %s is sent to %s without encryption, where others on the way can read it: use https, or leave the "
                "key out.",
                key_variable,
                address.hostname,
            )
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            timeout=timeout,
            max_retries=0,  # retried here, with regard to all other requests
            http_client=bounded_http_client(openai, base_url, timeout=timeout),
        )
        if address.hostname != _OPENAI_HOST:
            # Read from the environment by the package; None as an argument would not prevent that.
            self._client.organization = self._client.project = None

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    async def ask(self, request: ChatRequest, stop: asyncio.Event | None = None) -> ChatAnswer:
        """Send a request, again after transient failures, until it is answered.

        Args:
            request: The request.
            stop: Once this event is set, the answer to a request under way is awaited, but nothing is sent again.

        Returns:
            The answer.

        Raises:
            RequestFailed: If the request is not answered.
            ServerUnusable: If other requests will not be answered either.
            RunStopped: If `stop` was set before an answer came.
            ImageError: If an image of the request cannot be read.
        """
        # Images are read and encoded in another thread, before a slot is taken.
        body = await asyncio.get_running_loop().run_in_executor(None, request.body)
        attempts = pauses = 0
        while True:
            await self.pace.acquire(stop)
            try:
                if stop is not None and stop.is_set():
                    raise RunStopped
                sent_at = time.monotonic()
                return await self._send(body)
            except _TransientFailure as failure:
                self.pace.overloaded(sent_at, failure.retry_after)
                if failure.rate_limit:
                    if time.monotonic() - self._last_answer > self.patience:
                        raise ServerUnusable(f"no answer for {self.patience:.0f} s: {failure}") from None
                else:
                    attempts += 1
                    if attempts >= self.max_attempts:
                        reason = f"{attempts} attempts, the last: {failure}"
                        raise RequestFailed(reason, unreachable=failure.unreachable) from None
                    if failure.unreachable:
                        self._log_outage(failure)
                pauses += 1
                pause = min(_LONGEST_PAUSE, self.first_pause * 2 ** (pauses - 1)) * random.uniform(0.5, 1)
                if failure.retry_after is not None:  # the pace applies it to all requests
                    pause = failure.retry_after * random.uniform(1, 1.1)
            finally:
                self.pace.release()
            await _sleep(pause, stop)

    async def _send(self, body: Mapping[str, Any]) -> ChatAnswer:
        openai = self._openai
        messages, model = body["messages"], body["model"]
        rest = {name: value for name, value in body.items() if name not in ("messages", "model")}
        self.sent += 1
        try:
            # The client limits each wait for bytes only; a server that sends single bytes must not occupy a slot for ever.
            response = await asyncio.wait_for(
                self._client.chat.completions.with_raw_response.create(messages=messages, model=model, extra_body=rest),
                self.timeout,
            )
            content = response.content
        except (asyncio.TimeoutError, openai.APITimeoutError):  # noqa: UP041 (two classes in Python 3.10)
            raise _TransientFailure(f"no answer in {self.timeout:g} s", unreachable=not self.answered) from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.response.headers, error.response.text) from None
        except openai.APIConnectionError as error:
            # Whether the package wraps what its HTTP client raises depends on its version.
            if isinstance(error.__cause__, AnswerTooLarge):
                raise RequestFailed(str(error.__cause__)) from None
            # By name: which HTTP library the package uses depends on its version.
            unreachable = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
            reason = f"connection failed ({self._message(error.__cause__ or error)})"
            raise _TransientFailure(reason, unreachable=unreachable) from None
        except AnswerTooLarge as error:
            raise RequestFailed(str(error)) from None
        except Exception as error:  # of any library below: nothing that a server sends ends the run
            raise _TransientFailure(f"the client could not read the answer ({self._message(error)})") from None
        try:
            answer = read_answer(json.loads(self._redacted(content.decode("utf-8", "replace"))))
        except (ValueError, RecursionError) as error:
            raise _TransientFailure(f"the answer is unreadable ({self._message(error)})") from None
        self.answered += 1
        self._last_answer = time.monotonic()
        self._outage_logged = False
        self.pace.succeeded()
        return answer

    def _refusal(self, status: int, headers: Mapping[str, str], text: str) -> Exception:
        reason = f"status {status}: {self._message(text)}"
        if 300 <= status < 400:
            target = self._message(headers.get("location", "another address"))
            return RequestFailed(f"status {status}: redirects are not followed. If {target} is right, make it the base_url")
        first = not self.answered
        if (
            status in _FINAL_STATUSES
            or (status in _FINAL_STATUSES_AT_FIRST and first)
            or (status == 429 and "insufficient_quota" in text)
        ):
            remedy = f" (the key is read from the environment, {self.key_variable})" if status in (401, 403) else ""
            return ServerUnusable(f"the server refuses: {reason}{remedy}")
        if status in _TRANSIENT_STATUSES or status >= 500:
            return _TransientFailure(
                reason,
                retry_after=read_retry_after(headers),
                rate_limit=status == 429,
                unreachable=status in _UNREACHABLE_STATUSES,
            )
        return RequestFailed(reason)

    def _log_outage(self, failure: Exception) -> None:
        """Log that the server cannot be reached, once for each time that it is away."""
        if not self._outage_logged:
            self._outage_logged = True
            logger.warning(
                "%s cannot be reached: %s. Each request is sent up to %d times.", self._address, failure, self.max_attempts
            )

    def _message(self, error: object) -> str:
        """An error's text without the API key and control characters, on one line, at most 500 characters."""
        text = self._redacted(str(error) or type(error).__name__)
        text = " ".join(_LOOKS_LIKE_A_KEY.sub(_REDACTED, text).split())[:500]
        return printable(text)[:500]

    def _redacted(self, text: str) -> str:
        return self._key_pattern.sub(_REDACTED, text) if self._key_pattern else text


def _spellings_of(key: str) -> re.Pattern[str]:
    r"""Match a key in every spelling of JSON, Python strings and addresses: `a/b`, `a\/b`, `a\u002fb`, `a%2Fb`."""
    spellings = (rf"(?:\\{{0,4}}{re.escape(one)}|(?i:\\{{1,4}}u{ord(one):04x}|%{ord(one):02x}))" for one in key)
    return re.compile("".join(spellings))


def read_retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Read how long a response asks to wait.

    Args:
        headers: Headers of the response. Their names are in lower case, or the mapping ignores case.
        now: The time in seconds since 1970; the present if None.

    Returns:
        The seconds to wait, from 0 to 600, or None if the response does not say.

    Example:
        >>> read_retry_after({"retry-after": "20"}), read_retry_after({"retry-after-ms": "300"}), read_retry_after({})
        (20.0, 0.3, None)
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if seconds == seconds else None
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
    return min(max(date - (time.time() if now is None else now), 0.0), _LONGEST_RETRY_AFTER)


async def _sleep(seconds: float, stop: asyncio.Event | None) -> None:
    if stop is None:
        await asyncio.sleep(seconds)
        return
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except asyncio.TimeoutError:  # noqa: UP041 (two classes in Python 3.10)
        return
    raise RunStopped
