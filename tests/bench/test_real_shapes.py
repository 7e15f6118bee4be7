"""The shapes of `dynkp bench --suite gpu` are the published models'; its batches are the collators'."""

from __future__ import annotations

import pytest
import torch
import transformers

from dynkp.bench.real_shapes import SHAPES, TINY, Lengths, build_model, config_of, draw_batch, labelled_inputs


@pytest.mark.parametrize(("name", "billions"), [(SHAPES[0], 3.75), (SHAPES[1], 7.06), (SHAPES[2], 7.94)])
def test_shapes_are_the_published_ones(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config_of(name, tiny=False))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)
    assert Lengths().side ** 2 == 576


def test_a_batch_by_hand() -> None:
    device = torch.device("cpu")
    model = build_model(SHAPES[1], trained="lora", attention="sdpa", tiny=True, device=device)
    batch = draw_batch(SHAPES[1], model, 3, TINY, easy=1)
    assert batch["has_rationale"].tolist() == [True, False, False] and batch["id"] == ["0", "1", "2"]
    assert batch["reasoning"]["lengths"] == [TINY.reasoning, 0, 0] and batch["direct"]["lengths"] == [TINY.direct] * 3
    assert batch["reasoning"]["mask"].sum(dim=1).tolist() == [TINY.reasoning, 0, 0]
    assert batch["prompt"]["input_ids"].shape == (3, TINY.prompt)
    layout = batch["layouts"][0]
    image_token = model.get_base_model().config.image_token_id
    assert all(batch["prompt"]["input_ids"][0, slot] == image_token for slot in layout.grids[0].slots)
    assert len(layout.grids[0].slots) == TINY.side**2 and len(layout.text) == TINY.text
    inputs = labelled_inputs(batch["prompt"], batch["direct"])
    assert inputs["labels"].shape == inputs["input_ids"].shape == (3, TINY.prompt + TINY.direct)
    assert (inputs["labels"][:, : TINY.prompt] == -100).all()
    assert torch.equal(inputs["labels"][:, TINY.prompt :], batch["direct"]["input_ids"])
