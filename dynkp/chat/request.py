"""What is asked of a chat server, and what it answers.

Given   chat messages whose pictures are files or bytes, and the settings of the model.
Gives   a request with a key, and the JSON body that is sent.
Holds   the key depends on all that the answer depends on (messages, pictures byte by byte and how they are resized, model,
        sampling), and on nothing else: not on file names, addresses or time. The body, with its encoded pictures, is made
        only when a request is sent. Pictures are local files; none is fetched here.
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

from dynkp.data.images import IMAGE_FORMATS, ImageError, check_image, open_image

KEY_BYTES = 16
# Sent as they are, if small enough; every server reads these.
_SENT_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_JPEG_QUALITY = 90
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class RequestImage:
    """A picture of a request.

    Args:
        source: a path, encoded bytes, or an address that the server is to fetch.
        digest: of the picture's bytes; the address itself where it is one.
        max_side: longest side in pixels; a larger picture is shrunk before it is sent.

    Example:
        >>> RequestImage.of("cat.jpg", max_side=1024)  # doctest: +SKIP
    """

    source: str | bytes = field(repr=False)
    digest: str
    max_side: int

    @classmethod
    def of(cls, source: str | bytes, max_side: int) -> RequestImage:
        """Read a picture's bytes for its digest; they are not kept, unless they were given.

        Raises:
            ImageError: if the file cannot be read.
        """
        return cls(source, hashlib.blake2b(_bytes(source), digest_size=KEY_BYTES).hexdigest(), max_side)

    @classmethod
    def at(cls, url: str) -> RequestImage:
        """A picture that the server fetches from its address."""
        return cls(url, url, 0)

    def url(self) -> str:
        """What stands for the picture in the body: its address, or the picture itself as a data URL.

        Raises:
            ImageError: if the picture cannot be read.
        """
        return self.digest if not self.max_side else _encoded(self)


def post_images(post: Mapping[str, Any], max_side: int) -> list[RequestImage]:
    """A post's pictures: its files, then its `image_urls`; one that it has twice is sent once.

    Args:
        post: a post of `dynkp.chat.post_stream`.
        max_side: as in `RequestImage`.

    Raises:
        ImageError: if a file cannot be read.
    """
    images = [RequestImage.of(image["bytes"] or image["path"], max_side) for image in post.get("images") or []]
    return list(dict.fromkeys([*images, *map(RequestImage.at, post.get("image_urls") or [])]))


def encode_image(source: str | bytes, max_side: int) -> tuple[str, bytes]:
    """Make of a picture what is sent: upright, in a format that every server reads, no side longer than asked.

    Args:
        source: a path, or encoded bytes.
        max_side: longest side in pixels, at least 1.

    Returns:
        The media type and the bytes: the file's own where nothing needs to change, else a JPEG.

    Raises:
        ImageError: as `dynkp.data.images.open_image`.
    """
    data = _bytes(source)
    if (error := check_image(data)) is not None:
        raise error
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as original:
        upright = original.getexif().get(_EXIF_ORIENTATION, 1) == 1
        if upright and original.format in _SENT_AS_IS and max(original.size) <= max_side:
            return _SENT_AS_IS[original.format], data
    image = open_image(data)
    if max(image.size) > max_side:
        # Not `ImageOps.contain`, which leaves nothing of the shorter side of a line.
        shrink = max_side / max(image.size)
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return "image/jpeg", out.getvalue()


def _bytes(source: str | bytes) -> bytes:
    """An encoded picture.

    Raises:
        ImageError: if it is a file that cannot be read, or no regular one: a named pipe would be waited for without end.
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
    """The last pictures that were encoded, by digest: several posts often have one picture. Bounded in bytes."""

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
    """One question to the server.

    Args:
        messages: chat messages; a picture is a content part `{"type": "image", "image": RequestImage}`.
        settings: the rest of the body: `model`, `max_tokens`, sampling, and what a server takes beyond the standard.
        stage: what the question is for, where a post is asked several; it is recorded with the answer, and not sent.

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
        """What the answer depends on, as `KEY_BYTES` bytes."""

        def identity(image: RequestImage) -> dict[str, Any]:
            return {"digest": image.digest, "max_side": image.max_side}

        content = [self.messages, self.settings]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=identity)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()

    def body(self) -> dict[str, Any]:
        """The JSON body, pictures encoded.

        Raises:
            ImageError: if a picture cannot be read.
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
    """What the server said.

    Attributes:
        text: the answer, without reasoning.
        reasoning: the model's own reasoning, where the server or `<think>` separates it; None where there is none.
        finish_reason: `stop`, or `length` where the answer was cut off.
        prompt_tokens, completion_tokens: as the server counts them; 0 where it does not.
    """

    text: str
    reasoning: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


def read_answer(body: Any) -> ChatAnswer:
    """Read the JSON body of a chat completion.

    Args:
        body: the parsed body.

    Returns:
        Its first choice. Reasoning is taken from `reasoning_content` (vLLM, SGLang, DeepSeek) or `reasoning`
        (OpenRouter, newer vLLM), or else from a `<think>` block at the text's beginning.

    Raises:
        ValueError: if the body is no chat completion.

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
        return ChatAnswer(
            _encodable(text).strip(),
            None if reasoning is None else _encodable(str(reasoning)),
            choice.get("finish_reason"),
            max(0, int(usage.get("prompt_tokens") or 0)),
            max(0, int(usage.get("completion_tokens") or 0)),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a chat completion ({type(error).__name__}: {error}): {body!r:.200}") from error


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which can neither be written to a file nor be sent again."""
    return text.encode("utf-8", "replace").decode("utf-8")
