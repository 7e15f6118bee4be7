"""Asks a chat server, until it answers or will not.

Given   a request.
Gives   its answer, or why there is none.
Holds   the key comes from the environment, and is blotted out of whatever the server says before anything else sees it; a
        request that fails for a passing reason (429, 5xx, timeout, closed connection, half a body, invalid JSON) is sent
        again after a growing pause, at most `max_attempts` times; 429 and Retry-After slow all requests down, and do not
        count as the post's fault.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dynkp.chat.pacing import AdaptiveConcurrency
from dynkp.chat.request import ChatAnswer, ChatRequest, read_answer

KEY_VARIABLE = "OPENAI_API_KEY"
# What servers without authentication are sent.
_NO_KEY = "none"
_SHORTEST_KEY = 8
_BLOT = "[key]"
# Keys as they may be quoted, in full or in part, by a server's error.
_KEY_LIKE = re.compile(r"\b(sk|key|xai|gsk)-[\w*-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
# 401 and 402: so will all other requests be answered. 403 and 404 may be about one post once others have been answered.
_FINAL, _FINAL_AT_FIRST = {401, 402}, {403, 404, 405}
_LONGEST_PAUSE = 60.0
_LONGEST_RETRY_AFTER = 600.0


class RequestFailed(Exception):
    """A request that will not be answered. Its text is the reason, with no key in it."""


class ServerUnusable(Exception):
    """No request will be answered: the run should stop. Its text is the reason, with no key in it."""


class RunStopped(Exception):
    """The run was stopped before a request was answered; it was not the request's fault."""


class _Passing(Exception):
    """A failure that may not happen again."""

    def __init__(self, reason: str, *, retry_after: float | None = None, rate_limit: bool = False):
        super().__init__(reason)
        self.retry_after = retry_after
        self.rate_limit = rate_limit


class ChatClient:
    """The official `openai` client with this project's rules for failures.

    Args:
        base_url: the server's address up to `/v1`.
        concurrency: most requests at once.
        timeout: seconds to wait for an answer.
        max_attempts: how often a request is sent before it is given up, answers 429 not counted.
        key_variable: the environment variable that holds the key. A server without authentication needs none.
        first_pause: seconds before the second attempt; doubled each time, with jitter, up to a minute.
        patience: seconds without any answer after which the server counts as unusable, if it refuses by rate limits.

    Raises:
        ImportError: if `openai` is not installed.
        ValueError: if the address holds a password, or is none; if there is no such variable, or what it holds is no key.

    Example:
        >>> client = ChatClient("http://127.0.0.1:8000/v1", concurrency=8)
        >>> answer = await client.ask(ChatRequest([{"role": "user", "content": "Hello"}], {"model": "m"}))
    """

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int,
        timeout: float = 120.0,
        max_attempts: int = 6,
        key_variable: str = KEY_VARIABLE,
        first_pause: float = 0.5,
        patience: float = 1800.0,
    ):
        if key_variable != KEY_VARIABLE and key_variable not in os.environ:
            # Not repeated: it may be the key itself.
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
        # Placeholders such as "none" and "EMPTY" are no secrets, and may be words of an answer.
        self._secret = _pattern_of(key) if len(key) >= _SHORTEST_KEY else None
        self.key_variable = key_variable
        self.timeout = timeout
        self.max_attempts = max_attempts
        self.first_pause = first_pause
        self.patience = patience
        self.pace = AdaptiveConcurrency(concurrency)
        self.sent = self.answered = 0
        self._last_answer = time.monotonic()
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            timeout=timeout,
            max_retries=0,  # the rules here know of the other requests
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, request: ChatRequest, stop: asyncio.Event | None = None) -> ChatAnswer:
        """Send a request until it is answered.

        Args:
            request: the question.
            stop: once set, a request that is under way is waited for, and none is sent again.

        Raises:
            RequestFailed: if there is no answer.
            ServerUnusable: if there will be none to other requests either.
            RunStopped: if `stop` was set before an answer came.
        """
        # Pictures are read and encoded by another thread, before a slot is taken.
        body = await asyncio.get_running_loop().run_in_executor(None, request.body)
        attempts = pauses = 0
        while True:
            await self.pace.acquire(stop)
            try:
                if stop is not None and stop.is_set():
                    raise RunStopped
                sent_at = time.monotonic()
                return await self._send(body)
            except _Passing as failure:
                self.pace.overloaded(sent_at, failure.retry_after)
                if failure.rate_limit:
                    if time.monotonic() - self._last_answer > self.patience:
                        raise ServerUnusable(f"no answer for {self.patience:.0f} s: {failure}") from None
                else:
                    attempts += 1
                    if attempts >= self.max_attempts:
                        raise RequestFailed(f"{attempts} attempts, the last: {failure}") from None
                pauses += 1
                pause = min(_LONGEST_PAUSE, self.first_pause * 2 ** (pauses - 1)) * random.uniform(0.5, 1)
                if failure.retry_after is not None:  # for all requests alike, by the pace
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
            # The client's own limit is on each wait for bytes; a server that drips them must not hold a slot for ever.
            response = await asyncio.wait_for(
                self._client.chat.completions.with_raw_response.create(messages=messages, model=model, extra_body=rest),
                self.timeout,
            )
            content = response.content
        except (asyncio.TimeoutError, openai.APITimeoutError):  # noqa: UP041 (two classes in Python 3.10)
            raise _Passing(f"no answer in {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.response.headers, error.response.text) from None
        except openai.APIConnectionError as error:
            raise _Passing(f"connection failed ({self._clean(error.__cause__ or error)})") from None
        except (openai.OpenAIError, ValueError) as error:
            raise _Passing(f"the client could not read the answer ({self._clean(error)})") from None
        try:
            answer = read_answer(json.loads(self._blotted(content.decode("utf-8", "replace"))))
        except (ValueError, RecursionError) as error:
            raise _Passing(f"the answer is unreadable ({self._clean(error)})") from None
        self.answered += 1
        self._last_answer = time.monotonic()
        self.pace.succeeded()
        return answer

    def _refusal(self, status: int, headers: Mapping[str, str], text: str) -> Exception:
        reason = f"status {status}: {self._clean(text)}"
        first = not self.answered
        if status in _FINAL or (status in _FINAL_AT_FIRST and first) or (status == 429 and "insufficient_quota" in text):
            remedy = f" (the key is read from the environment, {self.key_variable})" if status in (401, 403) else ""
            return ServerUnusable(f"the server refuses: {reason}{remedy}")
        if status in _PASSING or status >= 500:
            return _Passing(reason, retry_after=read_retry_after(headers), rate_limit=status == 429)
        return RequestFailed(reason)

    def _clean(self, error: object) -> str:
        """An error's text, without the key, on one line, not too long."""
        text = self._blotted(str(error) or type(error).__name__)
        return " ".join(_KEY_LIKE.sub(_BLOT, text).split())[:500]

    def _blotted(self, text: str) -> str:
        return self._secret.sub(_BLOT, text) if self._secret else text


def _pattern_of(key: str) -> re.Pattern[str]:
    r"""Finds a key however it is spelt in JSON, a Python string or an address: `a/b`, `a\/b`, `a\u002fb`, `a%2Fb`."""
    spellings = (rf"(?:\\{{0,4}}{re.escape(one)}|(?i:\\{{1,4}}u{ord(one):04x}|%{ord(one):02x}))" for one in key)
    return re.compile("".join(spellings))


def read_retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a response asks to wait for, at most ten minutes.

    Args:
        headers: of the response, names in lower case or a mapping that does not mind.
        now: the time in seconds since 1970; the present if None.

    Returns:
        The seconds, or None if it does not say.

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
