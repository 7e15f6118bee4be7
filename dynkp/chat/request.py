"""Requests to a chat server, and answers.

A request's key depends on everything the answer depends on (messages, the bytes of images and how they are resized, model,
sampling), and on nothing else: not on file names, server addresses or time. The JSON body, with its encoded images, is built
only when the request is sent. Images are local files; nothing is fetched here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from dynkp.data.images import IMAGE_FORMATS, ImageError, check_image, is_plain_rgb, open_image

KEY_BYTES = 16
# Formats that every server reads: media types of the images that are sent unchanged if they are small enough.
_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_JPEG_QUALITY = 90
_EXIF_ORIENTATION = 0x0112
# What servers write where a model ended its answer itself: OpenAI and most others, Anthropic, text-generation-inference.
_WHOLE = {"stop", "end_turn", "stop_sequence", "eos_token"}
# What servers write where they, not the model, ended the answer: the request is sent again.
_SERVER_FAILED = {"error", "abort", "aborted"}
_LONGEST_FINISH_REASON = 100
_MOST_TOKENS = (1 << 32) - 1  # of one answer; larger claims of a server would overflow prices and sums


@dataclass(frozen=True)
class RequestImage:
    """An image of a request. Create it with `load` or `from_url`.

    Args:
        source: A path, an encoded image, or an address that the server fetches.
        digest: Digest of the encoded image; for an address, the address itself.
        max_side: Longest side in pixels; a larger image is shrunk before it is sent. 0 for an address.

    Example:
        >>> RequestImage.load(b"an encoded image", max_side=1024).digest
        'fce9603ae75baf89526bfc2d62ab5402'
        >>> RequestImage.from_url("https://example.org/cat.jpg").url()
        'https://example.org/cat.jpg'
    """

    source: str | bytes = field(repr=False)
    digest: str
    max_side: int

    @classmethod
    def load(cls, source: str | bytes, max_side: int) -> RequestImage:
        """Read an image for its digest. Of a file, the content is not kept.

        Args:
            source: A path, or an encoded image.
            max_side: Longest side in pixels.

        Raises:
            ImageError: If the file cannot be read.
        """
        return cls(source, hashlib.blake2b(_bytes(source), digest_size=KEY_BYTES).hexdigest(), max_side)

    @classmethod
    def from_url(cls, url: str) -> RequestImage:
        """Name an image by its address, from which the server fetches it.

        Args:
            url: The address.
        """
        return cls(url, url, 0)

    def url(self) -> str:
        """The image's URL for the body of a request: its address, or a data URL with the image itself.

        Raises:
            ImageError: If the image cannot be read.
        """
        return self.digest if not self.max_side else _encoded(self)


def post_images(post: Mapping[str, Any], max_side: int) -> list[RequestImage]:
    """Collect a post's images: its files, then its `image_urls`. An image that occurs twice is sent once.

    Args:
        post: A post, as `SourcePost.post` returns it.
        max_side: As in `RequestImage`.

    Returns:
        The images.

    Raises:
        ImageError: If a file cannot be read.
    """
    images = [RequestImage.load(image["bytes"] or image["path"], max_side) for image in post.get("images") or []]
    return list(dict.fromkeys([*images, *map(RequestImage.from_url, post.get("image_urls") or [])]))


def encode_image(source: str | bytes, max_side: int) -> tuple[str, bytes]:
    """Encode an image for a request: upright, in a format that every server reads, no side longer than `max_side`.

    Args:
        source: A path, or an encoded image.
        max_side: Longest side in pixels, at least 1.

    Returns:
        The media type and the encoded image: the file's own content if nothing needs to change, otherwise a JPEG.

    Raises:
        ImageError: If the image cannot be read, as for `dynkp.data.images.open_image`.
    """
    data = _bytes(source)
    if (error := check_image(data)) is not None:
        raise error
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as original:
        upright = original.getexif().get(_EXIF_ORIENTATION, 1) == 1
        plain = is_plain_rgb(original)  # otherwise the teacher would see another image than the model
        if upright and plain and original.format in _MEDIA_TYPES and max(original.size) <= max_side:
            return _MEDIA_TYPES[original.format], data
    image = open_image(data)
    if max(image.size) > max_side:
        # `ImageOps.contain` would make the shorter side of a very narrow image 0 pixels long.
        shrink = max_side / max(image.size)
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return "image/jpeg", out.getvalue()


def _bytes(source: str | bytes) -> bytes:
    """The encoded image.

    Raises:
        ImageError: If the file cannot be read, or is not a regular file: reading a named pipe may never end.
    """
    if isinstance(source, bytes):
        return source
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ImageError(f"image {source!r:.200} is not a regular file")
        return Path(source).read_bytes()
    except OSError as error:
        raise ImageError(f"image {source!r:.200} cannot be read ({error})", "missing_file") from error


class _EncodedImages:
    """A cache of data URLs, by digest, since several posts often share an image.

    Args:
        max_bytes: Maximum size of all URLs together.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self.lock = threading.Lock()
        self.urls: OrderedDict[tuple[str, int], str] = OrderedDict()

    def __call__(self, image: RequestImage) -> str:
        key = (image.digest, image.max_side)
        with self.lock:
            if key in self.urls:
                self.urls.move_to_end(key)
                return self.urls[key]
        kind, data = encode_image(image.source, image.max_side)
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        with self.lock:
            if key not in self.urls:
                self.urls[key] = url
                self.size += len(url)
            while self.size > self.max_bytes:
                self.size -= len(self.urls.popitem(last=False)[1])
        return url


_encoded = _EncodedImages()


@dataclass(frozen=True)
class ChatRequest:
    """A request to a chat server.

    Args:
        messages: Chat messages. An image is a content part `{"type": "image", "image": RequestImage}`.
        settings: The rest of the body: `model`, `max_tokens`, sampling, and parameters of one server.
        stage: The purpose of the request where a post needs several; recorded with the answer, not sent.

    Example:
        >>> request = ChatRequest([{"role": "user", "content": "Why?"}], {"model": "m", "max_tokens": 9})
        >>> request.body()
        {'messages': [{'role': 'user', 'content': 'Why?'}], 'model': 'm', 'max_tokens': 9}
        >>> request.key == ChatRequest([{"role": "user", "content": "Why not?"}], {"model": "m", "max_tokens": 9}).key
        False
    """

    messages: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    stage: str = ""

    @cached_property
    def key(self) -> bytes:
        """Digest of everything the answer depends on, `KEY_BYTES` bytes long."""

        def identity(image: RequestImage) -> dict[str, Any]:
            return {"digest": image.digest, "max_side": image.max_side}

        content = [self.messages, self.settings]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=identity)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()

    def body(self) -> dict[str, Any]:
        """Build the JSON body, with encoded images.

        Raises:
            ImageError: If an image cannot be read.
        """
        return {"messages": [self._message(message) for message in self.messages], **self.settings}

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": part["image"].url()}} if part["type"] == "image" else dict(part)
                for part in content
            ]
        return {**message, "content": content}


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of a chat server.

    Attributes:
        text: The answer, without reasoning.
        reasoning: The model's own reasoning, if the server or `<think>` separates it; otherwise None.
        finish_reason: Why the answer ended, as the server reports it: `stop`, or `length` at the token limit; None if the
            server does not report it. `is_whole` says which values mean that the answer is complete.
        prompt_tokens: Tokens of the request, as the server counts them; 0 if it does not.
        completion_tokens: Tokens of the answer, reasoning included.
    """

    text: str
    reasoning: str | None = None
    finish_reason: str | None = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


def is_whole(finish_reason: str | None) -> bool:
    """Return whether an answer is complete, by the reason for its end.

    Only reasons that are known to be good count: `content_filter`, `length`, `max_tokens`, `tool_calls`, no reason and reasons
    that a later server may invent do not.

    Args:
        finish_reason: The reason, as the server reports it. Case does not matter.

    Example:
        >>> is_whole("stop"), is_whole("STOP"), is_whole("content_filter"), is_whole(None)
        (True, True, False, False)
    """
    return finish_reason is not None and finish_reason.lower() in _WHOLE


def read_answer(body: Any) -> ChatAnswer:
    """Read the JSON body of a chat completion.

    Args:
        body: The parsed body.

    Returns:
        Its first choice. Reasoning is taken from `reasoning_content` (vLLM, SGLang, DeepSeek) or `reasoning`
        (OpenRouter, newer vLLM), or else from a `<think>` block at the beginning of the text.

    Raises:
        ValueError: If the body is not a chat completion, or the server ended the answer because of its own failure
            (`finish_reason` `error` or `abort`).

    Example:
        >>> read_answer({"choices": [{"message": {"content": "<think>A dog.</think>Beagles."}}]}).text
        'Beagles.'
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content")
        usage = body.get("usage") or {}
        if text is None:
            text = message.get("refusal") or ""
        if isinstance(text, list):  # content parts
            text = "".join(part.get("text", "") for part in text)
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        if reasoning is None and "</think>" in text:
            # The opening tag may stand in the chat template, and so not in the text.
            before, _, text = text.partition("</think>")
            reasoning = before.strip().removeprefix("<think>").strip() or None
        finish_reason = choice.get("finish_reason")
        if finish_reason is not None:
            finish_reason = _without_surrogates(str(finish_reason))[:_LONGEST_FINISH_REASON]
        if (finish_reason or "").lower() in _SERVER_FAILED:
            raise ValueError(f"the server did not complete the answer, finish_reason {finish_reason!r}")
        return ChatAnswer(
            _without_surrogates(text).strip(),
            None if reasoning is None else _without_surrogates(str(reasoning)),
            finish_reason,
            _token_count(usage.get("prompt_tokens")),
            _token_count(usage.get("completion_tokens")),
        )
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        try:
            quoted = f"{body!r:.200}"
        except RecursionError:
            quoted = "(JSON that is nested too deep)"
        raise ValueError(f"not a chat completion ({type(error).__name__}: {error}): {quoted}") from error


def _token_count(value: Any) -> int:
    return min(max(0, int(value or 0)), _MOST_TOKENS)


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can contain, and which can neither be written to a file nor be sent."""
    return text.encode("utf-8", "replace").decode("utf-8")
