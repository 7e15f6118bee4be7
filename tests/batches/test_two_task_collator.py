"""Invariants of the collator of both tasks:

- the shared beginning plus the end of a branch is exactly the prompt that the model is asked at prediction;
- targets are the renderers'; prompts that do not begin with the same tokens, or whose images come late, stay whole;
- rows are not changed; an error names the post at fault.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dynkp.batches.two_task_collator import TwoTaskCollator
from tests.support.reasoning_trainers import InstructionFirst, reasoning_rows
from tests.support.tiny_models import FAMILIES, build

SEQUENCE = ("input_ids", "attention_mask")


def whole(branches: Any, kind: str, row: int) -> list[int]:
    """A post's prompt without its padding."""
    if kind in branches["separate"]:
        ids, mask = (branches["separate"][kind][name][row] for name in SEQUENCE)
    else:
        prompt, end, shared = branches["prompt"], branches["ends"][kind], branches["shared"]
        ids, mask = (torch.cat([prompt[name][row, :shared], end[name][row]]) for name in SEQUENCE)
    return ids[mask.bool()].tolist()


def as_asked(collator: TwoTaskCollator, kind: str, post: dict[str, Any]) -> list[int]:
    renderer = collator.renderers[kind]
    pictures = renderer.images(post)
    kwargs = {"images": [pictures] if pictures else None} if renderer.takes_images else {}
    text = [renderer.prompt(post, len(pictures))]
    return renderer.processor(text=text, add_special_tokens=False, **kwargs)["input_ids"][0]


@pytest.mark.parametrize("task", ["msc", "masc"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_the_model_is_asked(family: str, task: str) -> None:
    _, processor = build(family)
    collator, posts = TwoTaskCollator(processor, task), reasoning_rows(family)
    before = copy.deepcopy([{key: value for key, value in post.items() if key != "images"} for post in posts])
    batch = collator(posts)
    assert [{key: value for key, value in post.items() if key != "images"} for post in posts] == before
    assert not batch["prompts"]["separate"]
    for kind in ("label", "chain"):
        for row, post in enumerate(posts):
            assert whole(batch["prompts"], kind, row) == list(as_asked(collator, kind, post))
    shared = batch["prompts"]["shared"]
    texts = processor.batch_decode(batch["prompts"]["prompt"]["input_ids"][:, :shared])
    assert all(post["text"] in text for post, text in zip(posts, texts, strict=True)), "text and pictures come in front"


def test_targets_are_the_renderers() -> None:
    _, processor = build("qwen2_5_vl")
    collator, posts = TwoTaskCollator(processor, "masc"), reasoning_rows("qwen2_5_vl")
    batch = collator(posts)
    assert batch["has_rationale"].tolist() == [True, True, False, True] and batch["id"] == [post["id"] for post in posts]
    for kind in ("label", "chain"):
        for row, post in enumerate(posts):
            length = batch[kind]["lengths"][row]
            written = processor.tokenizer.decode(batch[kind]["input_ids"][row, :length])
            assert written == (collator.renderers[kind].target(post, len(post["images"])) or "")
            assert batch[kind]["mask"][row].sum() == length
    assert processor.tokenizer.decode(batch["label"]["input_ids"][0][: batch["label"]["lengths"][0]]).startswith(
        '"Prediction": positive'
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "llama"])
def test_prompts_that_do_not_begin_alike_stay_whole(family: str) -> None:
    _, processor = build(family)
    task = InstructionFirst("late", "How?", {"Text_analysis": "why"})
    collator, posts = TwoTaskCollator(processor, task), reasoning_rows(family)
    batch = collator(posts)
    assert set(batch["prompts"]["separate"]) == {"label", "chain"} and batch["prompts"]["shared"] == 0
    for kind in ("label", "chain"):
        for row, post in enumerate(posts):
            assert whole(batch["prompts"], kind, row) == list(as_asked(collator, kind, post))


def test_max_length_cuts_targets_and_names_posts_that_leave_no_token() -> None:
    _, processor = build("llama")
    posts = reasoning_rows("llama")
    free = TwoTaskCollator(processor, "masc")(posts)
    longest = max(len(whole(free["prompts"], "chain", row)) for row in range(len(posts)))
    batch = TwoTaskCollator(processor, "masc", max_length=longest + 9)(posts)
    assert max(batch["chain"]["lengths"]) > 9 or batch["chain"]["lengths"] != free["chain"]["lengths"]
    for row in range(len(posts)):
        remaining = longest + 9 - len(whole(free["prompts"], "chain", row))
        assert batch["chain"]["lengths"][row] == min(free["chain"]["lengths"][row], remaining)
    assert batch["label"]["lengths"] == free["label"]["lengths"]
    with pytest.raises(ValueError, match=r"post 'post-1': its chain prompt has \d+ tokens"):
        TwoTaskCollator(processor, "masc", max_length=longest)(posts[1:2])


@pytest.mark.parametrize(
    ("fault", "message"), [({"label": "angry"}, "post 'post-0'.*angry"), ({"aspect": ""}, "post 'post-0'.*aspect")]
)
def test_a_post_that_does_not_fit_is_named(fault: dict[str, Any], message: str) -> None:
    _, processor = build("llama")
    posts = reasoning_rows("llama")
    with pytest.raises(ValueError, match=message):
        TwoTaskCollator(processor, "masc")([posts[0] | fault])
