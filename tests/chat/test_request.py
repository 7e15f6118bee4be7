"""Invariants of requests and answers:

- the key changes with every thing the answer depends on, image bytes included, and not with file names;
- an image that is small, upright and of a common format is sent as it is; others are shrunk, turned and sent as JPEG;
- an image is encoded once for all posts that have it;
- reasoning is separated from the answer in each way that servers have; what is no chat completion is a `ValueError`.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynkp.chat import request as chat_request
from dynkp.chat.request import ChatAnswer, ChatRequest, RequestImage, encode_image, is_whole, read_answer
from dynkp.data.images import ImageError
from tests.support.posts import picture


def request(text: str = "Why?", image: RequestImage | None = None, stage: str = "", **settings: Any) -> ChatRequest:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    return ChatRequest([{"role": "user", "content": content}], {"model": "m", "max_tokens": 9, **settings}, stage)


def saved(folder: Path, name: str, size: tuple[int, int] = (56, 42), **options: Any) -> str:
    picture(3, size).save(folder / name, **options)
    return str(folder / name)


def test_the_key_is_that_of_what_the_answer_depends_on(tmp_path: Path) -> None:
    one = saved(tmp_path, "one.png")
    shutil.copy(one, tmp_path / "same.png")
    other = str(tmp_path / "other.png")
    picture(4).save(other)
    image = RequestImage.load(one, 64)
    base = request(image=image)
    assert base.key == request(image=RequestImage.load(str(tmp_path / "same.png"), 64)).key
    assert base.key == request(image=image, stage="predict").key
    different = [
        request("Why not?", image),
        request(),
        request(image=RequestImage.load(other, 64)),
        request(image=RequestImage.load(one, 32)),
        request(image=RequestImage.from_url("http://somewhere/one.png")),
        request(image=image, model="n"),
        request(image=image, max_tokens=10),
        request(image=image, temperature=0.5),
        request(image=image, seed=1),
    ]
    keys = {base.key, *(one.key for one in different)}
    assert len(keys) == 1 + len(different)
    assert {len(key) for key in keys} == {16}


def test_half_a_surrogate_pair_has_a_key() -> None:
    assert request("\ud83d").key != request("?").key


def test_the_body_has_images_as_data_urls(tmp_path: Path) -> None:
    name = saved(tmp_path, "one.png")
    body = request(image=RequestImage.load(name, 64)).body()
    assert body["model"] == "m" and body["max_tokens"] == 9 and "stage" not in body
    first, second = body["messages"][0]["content"]
    head, _, data = first["image_url"]["url"].partition(",")
    assert (first["type"], head) == ("image_url", "data:image/png;base64")
    assert base64.b64decode(data) == Path(name).read_bytes()
    assert second == {"type": "text", "text": "Why?"}


def test_an_address_is_handed_on() -> None:
    part = request(image=RequestImage.from_url("https://somewhere/a.jpg")).body()["messages"][0]["content"][0]
    assert part["image_url"]["url"] == "https://somewhere/a.jpg"


@pytest.mark.parametrize(("name", "kind"), [("a.png", "image/png"), ("a.jpg", "image/jpeg"), ("a.webp", "image/webp")])
def test_a_small_image_is_sent_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    path = saved(tmp_path, name)
    assert encode_image(path, 56) == (kind, Path(path).read_bytes())


def test_a_large_image_is_shrunk(tmp_path: Path) -> None:
    kind, data = encode_image(saved(tmp_path, "a.png", (560, 420)), 100)
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (100, 75)


def test_an_uncommon_format_becomes_a_jpeg(tmp_path: Path) -> None:
    kind, data = encode_image(saved(tmp_path, "a.gif"), 100)
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (56, 42)


@pytest.mark.parametrize(("mode", "color"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("I;16", 65535)])
def test_the_teacher_sees_what_the_model_sees(tmp_path: Path, mode: str, color: Any) -> None:
    Image.new(mode, (8, 8), color).save(tmp_path / "a.png")
    kind, data = encode_image(str(tmp_path / "a.png"), 100)
    assert kind == "image/jpeg"
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_a_turned_image_is_sent_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    kind, data = encode_image(saved(tmp_path, "a.jpg", exif=exif), 100)
    sent = Image.open(io.BytesIO(data))
    assert (kind, sent.size, dict(sent.getexif())) == ("image/jpeg", (42, 56), {})


def test_a_broken_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="in a supported format"):
        request(image=RequestImage.load(str(tmp_path / "a.png"), 64)).body()
    with pytest.raises(ImageError, match="cannot be read"):
        RequestImage.load(str(tmp_path / "missing.png"), 64)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_a_line_is_an_image(tmp_path: Path, size: tuple[int, int]) -> None:
    _, data = encode_image(saved(tmp_path, "line.png", size), 100)
    assert sorted(Image.open(io.BytesIO(data)).size) == [1, 100]


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # to open it would take until someone writes
    for name in ("pipe.png", "."):
        with pytest.raises(ImageError, match="is not a regular file"):
            RequestImage.load(str(tmp_path / name), 64)
    with pytest.raises(ImageError, match="cannot be read"):  # as if deleted since its digest was made
        encode_image(str(tmp_path / "missing.png"), 64)


def test_an_image_is_encoded_once_for_all_posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    monkeypatch.setattr(chat_request, "encode_image", lambda *given: encoded.append(given) or ("image/png", b"x" * 100))
    images = chat_request._EncodedImages(max_bytes=1000)
    one, two = (RequestImage(name, digest, 64) for name, digest in (("a", "1"), ("b", "2")))
    copy = RequestImage("c", "1", 64)
    assert images(one) == images(copy) == images(one) != ""
    assert len(encoded) == 1
    images(two)
    images(RequestImage("a", "1", 32))
    assert len(encoded) == 3
    for number in range(100):
        images(RequestImage("d", f"d{number}", 64))
    assert images.size <= 1000 and images.size == sum(map(len, images.urls.values()))


def completion(**message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": " A dog. "}, "A dog.", None),
        ({"content": "A dog.", "reasoning_content": "Hm."}, "A dog.", "Hm."),
        ({"content": "A dog.", "reasoning": "Hm."}, "A dog.", "Hm."),
        ({"content": "<think>Hm.</think>\nA dog."}, "A dog.", "Hm."),
        ({"content": "Hm.</think>A dog."}, "A dog.", "Hm."),
        ({"content": "<think>cut off"}, "<think>cut off", None),
        ({"content": [{"type": "text", "text": "A dog."}]}, "A dog.", None),
        ({"content": None, "refusal": "I can't."}, "I can't.", None),
        ({"content": None}, "", None),
        ({"content": "A \ud83d dog.", "reasoning": "\ude00"}, "A ? dog.", "?"),
    ],
)
def test_answers_are_read(message: dict[str, Any], text: str, reasoning: str | None) -> None:
    assert read_answer(completion(**message)) == ChatAnswer(text, reasoning, "stop", 7, 2)


def test_a_server_need_not_count_tokens() -> None:
    assert read_answer({"choices": [{"message": {"content": "x"}}], "usage": None}) == ChatAnswer("x", finish_reason=None)


@pytest.mark.parametrize(("said", "tokens"), [(-5, 0), (0, 0), ("7", 7), (2.0, 2), (10**40, 2**32 - 1)])
def test_counts_of_tokens_are_bounded(said: Any, tokens: int) -> None:
    usage = {"prompt_tokens": said, "completion_tokens": said}
    answer = read_answer({"choices": [{"message": {"content": "x"}}], "usage": usage})
    assert (answer.prompt_tokens, answer.completion_tokens) == (tokens, tokens)


@pytest.mark.parametrize("said", [float("inf"), float("nan"), "many", []])
def test_a_count_of_tokens_that_is_none(said: Any) -> None:
    usage = {"prompt_tokens": said or "", "completion_tokens": [said]}
    with pytest.raises(ValueError, match="not a chat completion"):
        read_answer({"choices": [{"message": {"content": "x"}}], "usage": usage})


@pytest.mark.parametrize("reason", ["error", "abort", "Aborted"])
def test_an_answer_that_the_server_gave_up_is_no_answer(reason: str) -> None:
    body = completion(content="A do")
    body["choices"][0]["finish_reason"] = reason
    with pytest.raises(ValueError, match="the server did not complete the answer"):
        read_answer(body)


@pytest.mark.parametrize("reason", ["x" * 5000, {"type": "stop"}, ["stop"], 7, True])
def test_reasons_of_any_shape(reason: Any) -> None:
    body = completion(content="A dog.")
    body["choices"][0]["finish_reason"] = reason
    found = read_answer(body).finish_reason
    assert found is not None and len(found) <= 100 and not is_whole(found)


@pytest.mark.parametrize(
    "body",
    [None, [], "x", {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}, {"error": {}}],
)
def test_what_is_no_completion_is_an_error(body: Any) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        read_answer(body)
