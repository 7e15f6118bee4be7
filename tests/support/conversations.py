"""Conversations with a chat server about posts: one request, or a second one after the first answer."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from dynkp.chat.request import ChatAnswer, ChatRequest


def question(text: str, stage: str = "") -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], {"model": "m"}, stage)


def once(post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
    if not post["text"]:
        raise ValueError("the post is empty")
    yield question(post["text"])


def twice(post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
    answer = yield question(post["text"], "first")
    if "even" in post["text"]:
        yield question(f"{post['text']} again: {answer.text}", "second")
