"""A post's images are found exactly in its padded prompt.

Holds for every vision family that has image tokens: grids have the model's own height and width, image by image or tile by
tile, and hold all image tokens; a cell is made from its own part of the image; other families are refused.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dynkp.batches.image_grids import ImageGrid, image_grids
from tests.support.layouts import located
from tests.support.posts import picture, rows
from tests.support.tiny_models import build


def test_frames_of_one_image_are_grids_of_their_own() -> None:
    processor = SimpleNamespace(image_token_id=9, image_processor=SimpleNamespace(merge_size=2))
    prompt = {"input_ids": torch.tensor([[1, *[9] * 4, 1]]), "image_grid_thw": torch.tensor([[2, 2, 4]])}
    grids = image_grids(processor, prompt)
    assert grids == [(ImageGrid((1, 2), 1, 2), ImageGrid((3, 4), 1, 2))]


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("llava", (70, 42), [(4, 4)]),
        ("qwen2_vl", (56, 56), [(4, 4)]),
        ("qwen2_vl", (112, 28), [(2, 8)]),  # wide images, height first
        ("qwen2_5_vl", (28, 56), [(4, 2)]),
        ("qwen3_vl", (28, 56), [(4, 2)]),
        ("internvl", (28, 28), [(2, 2)]),
        ("internvl", (56, 28), [(2, 2)] * 3),  # two tiles and a thumbnail
        ("idefics3", (56, 28), [(2, 2)] * 3),
        ("smolvlm", (56, 56), [(2, 2)] * 5),
        ("gemma3", (70, 42), [(2, 2)]),
    ],
)
def test_grids_of_one_and_two_images(family: str, size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    model, processor = build(family)
    posts = [
        {"id": str(n), "text": "goal", "keyphrases": ["k"], "images": [picture(n, size)] * count}
        for n, count in enumerate((1, 0, 2))
    ]
    layouts, prompt, _ = located(processor, posts)
    for layout, ids, count in zip(layouts, prompt["input_ids"], (1, 0, 2), strict=True):
        assert [(grid.height, grid.width) for grid in layout.grids] == expected * count
        slots = [slot for grid in layout.grids for slot in grid.slots]
        assert slots == (ids == model.config.image_token_id).nonzero().flatten().tolist()
        assert all(len(grid.slots) == grid.height * grid.width for grid in layout.grids)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "idefics3", "gemma3"])
def test_a_cell_shows_its_part_of_the_image(family: str) -> None:
    """Whitening one corner of the image changes the first pixels the grid's corner cell is made from."""
    model, processor = build(family)
    model.double()
    features = []
    for corner in (False, True):
        image = picture(3, (56, 56) if family == "qwen2_vl" else (28, 28))
        if corner:
            image.paste((255, 255, 255), (image.width - 7, 0, image.width, 7))
        layouts, prompt, _ = located(processor, [{"id": "1", "text": "x", "keyphrases": ["k"], "images": [image]}])
        grid = layouts[0].grids[-1]
        pixels = {key: value for key, value in prompt.items() if key in ("pixel_values", "image_grid_thw")}
        if family == "idefics3":
            pixels["pixel_attention_mask"] = prompt["pixel_attention_mask"]
        # Attention spreads the change over all cells: look at what the tower is given.
        for module in model.modules():
            if type(module).__name__.endswith(("EncoderLayer", "VisionLayer", "VisionBlock", "VisionEncoderLayer")):
                module.forward = lambda hidden_states, *args, **kwargs: hidden_states
        with torch.no_grad():
            output = model.base_model.get_image_features(
                **{key: value.double() if value.is_floating_point() else value for key, value in pixels.items()},
                return_dict=True,
            ).pooler_output
        flat = output.flatten(0, -2) if isinstance(output, torch.Tensor) else torch.cat(list(output))
        features.append(flat[-len(grid.slots) :])
    changed = (features[0] - features[1]).abs().amax(dim=-1) > 1e-9
    assert changed.any() and not changed.all()
    assert set(changed.nonzero().flatten().tolist()) == {grid.width - 1}, "top right: first row, last column"


def test_mllama_has_no_image_tokens() -> None:
    _, processor = build("mllama")
    with pytest.raises(ValueError, match="Mllama have no tokens in the prompt.*mask_image=False"):
        located(processor, rows("mllama"))
    layouts, _, _ = located(processor, rows("mllama"), ("text",))
    assert layouts[0].text and not layouts[0].grids


def test_unknown_and_mismatching_grids_are_refused() -> None:
    _, processor = build("llava")
    _, prompt, _ = located(processor, rows("llava")[:1])
    with pytest.raises(ValueError, match="the layout of PixtralProcessor's image tokens is unknown"):
        image_grids(type("PixtralProcessor", (), {"image_token_id": processor.image_token_id})(), prompt)
    processor.patch_size = 4
    with pytest.raises(ValueError, match="do not account for"):
        image_grids(processor, prompt)
