"""Strides follow recorded cosines as computed by hand, belong to ids, and survive a checkpoint.

Holds: warm-up masks nothing; a stride changes once an epoch and only for the next; modalities and posts are independent;
a frozen stride stays while its post is still visited; the state is JSON, equal for any order of the dataset and of the
visits in an epoch, and refused for another dataset.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynkp.mechanics.stride_schedule import StrideSchedule

TEXT, IMAGE = 0.1, 0.4
# Cosines of one post over nine epochs, the first of them warm-up; (text masked, image masked).
COSINES = [None, (0.5, 0.9), (0.3, 0.41), (0.1, 0.4), (0.2, 0.8), (-0.2, 0.1), (-0.1, 0.1), (0.6, 0.1), (0.6, 0.9)]


def followed(**options: Any) -> tuple[list[int], list[int]]:
    """The strides of post "a" over COSINES, beside a post "b" that fares the other way round."""
    schedule = StrideSchedule(["a", "b"], **options)
    text, image = [], []
    for epoch, cosines in enumerate(COSINES):
        for strides, modality in ((text, "text"), (image, "image")):
            strides.append(schedule.strides(["a"], modality, epoch)[0])
        assert schedule.masks(epoch) == (epoch >= options.get("warmup_epochs", 1))
        for modality, cosine, threshold in zip(("text", "image"), cosines or (), (TEXT, IMAGE), strict=False):
            schedule.record("a", modality, cosine > threshold, epoch)
            schedule.record("b", modality, cosine <= threshold, epoch)
    return text, image


def test_adaptive() -> None:
    text, image = followed()
    #       -  pass  pass fail pass  fail fail pass pass
    assert text == [1, 2, 4, 8, 4, 8, 4, 2, 4]
    #       -  pass  pass fail pass fail fail fail pass
    assert image == [1, 2, 4, 8, 4, 8, 4, 2, 2]


def test_frozen_once_failed() -> None:
    """The authors' rule: the first failure lowers the stride and is the last change; modalities do not mix."""
    text, image = followed(freeze_failed=True)
    assert text == [1, 2, 4, 8, 4, 4, 4, 4, 4] == image
    schedule = StrideSchedule(["a"], freeze_failed=True, warmup_epochs=0)
    schedule.record("a", "text", False, 0)
    schedule.record("a", "image", True, 0)
    schedule.record("a", "text", True, 1)
    schedule.record("a", "image", True, 1)
    assert schedule.strides(["a"], "text", 2) == [2], "frozen"
    assert schedule.strides(["a"], "image", 2) == [8], "the image's own cosine decides, frozen text or not"


def test_linear_and_fixed_and_other_beginnings() -> None:
    assert followed(schedule="linear")[0] == [1, 2, 3, 4, 3, 4, 3, 2, 3]
    assert followed(schedule="fixed", initial_stride=4)[1] == [1] + [4] * 8
    assert followed(schedule="fixed", freeze_failed=True)[0] == [1] + [2] * 8
    assert followed(warmup_epochs=3, initial_stride=8)[0] == [1, 1, 1, 8, 4, 8, 4, 2, 4]
    schedule = StrideSchedule(["a"], warmup_epochs=0, initial_stride=3)
    assert schedule.strides(["a"], "text", 0) == [3]
    schedule.record("a", "text", False, 0)
    assert schedule.strides(["a"], "text", 1) == [2], "3 // 2 is below the lowest"
    schedule = StrideSchedule(["a"], "linear", warmup_epochs=0)
    schedule.record("a", "text", False, 0)
    assert schedule.strides(["a"], "text", 1) == [2], "and so is 2 - 1"


def test_a_stride_stays_within_its_epoch() -> None:
    schedule = StrideSchedule(["a"], warmup_epochs=0)
    schedule.record("a", "text", True, 0)
    schedule.record("a", "text", True, 0)  # a second visit, as when a sampler fills up the last batch
    schedule.record("a", "text", False, 0)
    assert [schedule.strides(["a"], "text", epoch) for epoch in (0, 1, 5)] == [[2], [4], [4]]
    schedule.record("a", "text", True, 5)  # epochs without a visit change nothing
    assert schedule.strides(["a"], "text", 6) == [8]


@given(st.data())
def test_order_does_not_matter(data: st.DataObject) -> None:
    ids = [f"post {number}" for number in range(6)]
    outcomes = {(post_id, epoch): data.draw(st.booleans()) for post_id in ids for epoch in range(4)}
    states = []
    for _ in range(2):
        schedule = StrideSchedule(data.draw(st.permutations(ids)), freeze_failed=True)
        for epoch in range(4):
            for post_id in data.draw(st.permutations(ids)):
                schedule.record(post_id, "image", outcomes[post_id, epoch], epoch)
        states.append(json.loads(json.dumps(schedule.state())))
    assert states[0] == states[1]


def test_resuming_in_the_middle_of_an_epoch_equals_going_on() -> None:
    going_on, before = (StrideSchedule(["a", "b"], freeze_failed=True) for _ in range(2))
    for schedule in (going_on, before):
        schedule.record("a", "text", True, 1)
        schedule.record("a", "text", False, 2)
        schedule.record("b", "text", True, 1)
    resumed = StrideSchedule(["b", "a"], freeze_failed=True)
    resumed.record("a", "image", True, 7)  # forgotten on loading
    resumed.load_state(json.loads(json.dumps(before.state())))
    for schedule in (going_on, resumed):
        schedule.record("b", "text", False, 2)
        schedule.record("a", "text", True, 3)
        schedule.record("a", "image", True, 3)
    assert resumed.state() == going_on.state()
    assert resumed.strides(["a", "b"], "text", 4) == [2, 2] and resumed.strides(["a"], "image", 4) == [4]
    assert before.strides(["b"], "text", 9) == [4], "the loaded state is a copy"


def test_another_dataset_is_refused() -> None:
    schedule = StrideSchedule(["a", "b"])
    schedule.record("a", "text", True, 1)
    state = json.loads(json.dumps(schedule.state()))
    with pytest.raises(ValueError, match="belong to 2 posts, among them 'a', which the dataset lacks; the dataset has 3"):
        StrideSchedule(["b", "c", "d"]).load_state(state)
    for ids in (["a"], ["a", "c"], ["a", "b", "c"]):
        other = StrideSchedule(ids)
        other.record("a", "image", True, 1)
        with pytest.raises(ValueError, match=f"belong to 2 posts; the dataset has {len(ids)}, and their ids differ"):
            other.load_state(state)
        assert other.strides(["a"], "image", 2) == [4], "left as it was"
    with pytest.raises(ValueError, match="their ids differ"):
        StrideSchedule(["ab", "c"]).load_state(StrideSchedule(["a", "bc"]).state())
    with pytest.raises(ValueError, match="post 'c' is not in the training dataset"):
        schedule.strides(["a", "c"], "text", 0)
    with pytest.raises(ValueError, match="post 'b' is in the dataset twice"):
        StrideSchedule(["b", "a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cubic"}, "`stride_schedule` is 'cubic': use one of adaptive, fixed, linear"),
        ({"initial_stride": 1}, "`initial_stride` is 1, which masks nothing"),
        ({"warmup_epochs": -1}, "`warmup_epochs` is -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrideSchedule(["a"], **options)
