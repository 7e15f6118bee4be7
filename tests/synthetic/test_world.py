"""Invariants of drawn posts:

- the same seed gives the same posts; the division of compositions holds in every split;
- the icon depends on text and image together, on neither alone; the rationale leads to the keyphrase;
- descriptions, for the first stage of training, contain no slogan.
"""

from collections import Counter

import numpy as np
import pytest

from dynkp.synthetic.world import (
    COLOURS,
    SHAPES,
    SLOGANS,
    compositions,
    describe_posts,
    draw_posts,
)


@pytest.fixture(scope="module")
def train():
    return draw_posts(800, split="train", seed=1)


@pytest.fixture(scope="module")
def test():
    return draw_posts(800, split="test", seed=1)


def pairs(posts, kind):
    return {tuple(post["keyphrases"][0].split()) for post in posts.remove_columns("images") if post["kind"] == kind}


def test_compositions_partition_all_pairs():
    groups = compositions()
    assert {name: len(group) for name, group in groups.items()} == {"frequent": 16, "rare": 64, "unseen": 24, "never": 24}
    assert len({pair for group in groups.values() for pair in group}) == len(SHAPES) * len(SLOGANS) == 128
    for group in ("frequent", "rare", "unseen"):
        assert {shape for shape, _ in groups[group]} == set(SHAPES)
        assert {slogan for _, slogan in groups[group]} == set(SLOGANS)


def test_same_seed_same_posts_and_pixels():
    first, second, other = (draw_posts(5, split="test", seed=seed) for seed in (4, 4, 5))
    assert first.to_list() == second.to_list()
    assert first.to_list() != other.to_list()
    assert describe_posts(5, seed=4).to_list() == describe_posts(5, seed=4).to_list()


def test_splits_do_not_share_draws():
    texts = [draw_posts(20, split=split, seed=0)["text"] for split in ("train", "test")]
    assert texts[0] != texts[1]


def test_unseen_compositions_are_held_out_of_training(train, test):
    groups = compositions()
    trained = pairs(train, "seen") | pairs(train, "noise")
    assert trained <= set(groups["frequent"]) | set(groups["rare"])
    assert pairs(test, "unseen") <= set(groups["unseen"])
    assert not pairs(test, "unseen") & trained
    # ... but their words are all seen.
    assert {word for pair in pairs(test, "unseen") for word in pair} <= {word for pair in trained for word in pair}


def test_shares_of_kinds(train, test):
    kinds = Counter(train["kind"])
    assert set(kinds) == {"seen", "noise"}
    assert kinds["noise"] / len(train) == pytest.approx(0.15, abs=0.05)
    kinds = Counter(test["kind"])
    assert kinds["unseen"] / len(test) == pytest.approx(0.4, abs=0.06)
    assert kinds["noise"] / len(test) == pytest.approx(0.6 * 0.15, abs=0.04)


def test_keyphrase_follows_from_image_and_text_except_in_noise(train, test):
    cues = {cue: slogan for slogan, words in SLOGANS.items() for cue in words}
    for posts in (train, test):
        for post in posts.remove_columns("images"):
            scene, words = post["scene"], post["text"].split()
            assert 4 <= len(words) <= 6
            icons = {scene[side][key]: scene[side]["shape"] for side in ("left", "right") for key in ("colour",)}
            icons |= {side: scene[side]["shape"] for side in ("left", "right")}
            shapes = {icons[word] for word in words if word in icons}
            slogans = {cues[word] for word in words if word in cues}
            gold = post["keyphrases"][0].split()
            if post["kind"] == "noise":
                assert (not shapes) != (not slogans)
            else:
                assert [shapes, slogans] == [{gold[0]}, {gold[1]}]
            # Neither the text nor the slogan names an icon: the image is needed.
            assert not set(words) & set(SHAPES)


def test_the_two_icons_can_be_told_apart(train):
    for scene in train["scene"]:
        assert scene["left"]["colour"] != scene["right"]["colour"]
        assert scene["left"]["shape"] != scene["right"]["shape"]


def test_text_alone_does_not_tell_the_icon(train):
    sides = Counter((scene["meant"], scene["reference"]) for scene in train["scene"])
    for colour in COLOURS:
        left, right = sides["left", colour], sides["right", colour]
        assert left and right
    shapes_of_red = {scene[scene["meant"]]["shape"] for scene in train["scene"] if scene["reference"] == "red"}
    assert len(shapes_of_red) > 8


def test_image_shows_the_scene(train):
    for post in train.select(range(30)):
        picture = np.asarray(post["images"][0], dtype=float)
        assert picture.shape == (32, 32, 3)
        for side, columns in (("left", slice(0, 16)), ("right", slice(16, 32))):
            distance = np.abs(picture[:, columns] - np.array(COLOURS[post["scene"][side]["colour"]])).sum(axis=2)
            assert (distance < 12).sum() > 15


def test_every_shape_looks_different():
    pictures = {}
    for post in draw_posts(600, seed=2):
        for side, columns in (("left", slice(0, 16)), ("right", slice(16, 32))):
            mask = np.asarray(post["images"][0].convert("L"), dtype=float)[:, columns] < 215
            rows, cols = np.where(mask)
            cut = mask[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
            pictures.setdefault(post["scene"][side]["shape"], Counter())[cut.shape, cut.tobytes()] += 1
    assert set(pictures) == set(SHAPES)
    commonest = {shape: counts.most_common(1)[0][0] for shape, counts in pictures.items()}
    assert len(set(commonest.values())) == len(SHAPES)


def test_rationale_names_icons_slogan_and_nothing_else(train):
    for post in train.remove_columns("images"):
        scene = post["scene"]
        words = post["rationale"].replace(",", " ").replace(".", " ").split()
        assert [word for word in words if word in SHAPES][:2] == [scene["left"]["shape"], scene["right"]["shape"]]
        assert [word for word in words if word in SHAPES][-1] == post["keyphrases"][0].split()[0]
        assert words[-1] == post["keyphrases"][0].split()[1]


def test_description_rows_answer_the_question_and_hold_no_slogan():
    rows = describe_posts(60, seed=0)
    forbidden = set(SLOGANS) | {cue for cues in SLOGANS.values() for cue in cues}
    for number, row in enumerate(rows):
        answer = row["completion"][0]["content"]
        assert not forbidden & set((row["prompt"][0]["content"] + " " + answer).split())
        assert len(set(SHAPES) & set(answer.split())) == (1 if number % 2 else 2)
        assert len(row["images"]) == 1


@pytest.mark.parametrize(("count", "split", "message"), [(0, "train", "`count` is 0"), (1, "dev", "`split` is 'dev'")])
def test_wrong_arguments_are_named(count, split, message):
    with pytest.raises(ValueError, match=message):
        draw_posts(count, split=split)


def test_describing_no_posts_is_an_error():
    with pytest.raises(ValueError, match="`count` is 0"):
        describe_posts(0)
