"""Invariants of `SizeCheck`:

- the processor itself decides about sizes that are unusual, and is not run for others;
- its answer for a size is kept.
"""

from __future__ import annotations

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dynkp.batches.image_sizes import SizeCheck
from dynkp.data.posts import InvalidPostsError, validate_posts


def test_qwens_processor_refuses_ratios_above_200():
    check = SizeCheck(Qwen2VLImageProcessorPil())
    assert check((640, 480)) is None
    assert check((1990, 10)) is None
    assert "ratio" in str(check((2010, 10)))
    assert "ratio" in str(check((10, 2010)))


def test_a_size_is_tried_once_and_usual_ones_never():
    asked = []

    def processor(images, return_tensors):
        asked.extend(image.size for image in images)

    check = SizeCheck(processor)
    for size in [(640, 480), (64, 64), (640, 64), (641, 64), (641, 64), (63, 63)]:
        assert check(size) is None
    assert asked == [(641, 64), (63, 63)]


@pytest.mark.parametrize("turned", [False, True])
def test_posts_with_such_an_image_are_found_and_skipped(turned):
    from PIL import Image

    narrow = Image.new("RGB", (10, 3000) if turned else (3000, 10))
    posts = [
        {"id": "good", "text": "a", "keyphrases": ["b"], "image": Image.new("RGB", (64, 64))},
        {"id": "narrow", "text": "a", "keyphrases": ["b"], "image": narrow},
    ]
    refuses = SizeCheck(Qwen2VLImageProcessorPil())
    with pytest.raises(InvalidPostsError, match="post 'narrow': unprocessable_image: .*ratio"):
        validate_posts(posts, refuses=refuses, progress=False)
    kept, _ = validate_posts(posts, refuses=refuses, on_invalid="skip", progress=False)
    assert kept["id"][:] == ["good"]
