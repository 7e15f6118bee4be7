"""Invariants of mixtures:

- posts are drawn with the given weights, and equal seeds give equal mixtures;
- each post keeps its columns, whatever columns the other datasets have; streams and files can be mixed;
- the YAML configuration is read by TRL's parser.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset, Value
from trl import TrlParser

from dynkp.data.mixing import PostMixtureConfig, PostSource, load_mixture, mix_posts
from dynkp.data.posts import InvalidPostsError, normalise_posts, validate_posts


def posts(name: str, count: int, **columns):
    return [{"id": f"{name}{n}", "text": name, "keyphrases": [name], **columns} for n in range(count)]


def stream(rows) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("form", [list, Dataset.from_list, stream])
def test_weights_are_kept_and_seeds_repeat(form):
    weighted = [(form(posts("a", 2000)), 3), (form(posts("b", 2000)), 1)]
    mixed = mix_posts(weighted, seed=1)
    assert isinstance(mixed, IterableDataset) == (form is stream)
    drawn = [post["id"] for post in mixed]
    share = Counter(post_id[0] for post_id in drawn)["a"] / len(drawn)
    assert abs(share - 0.75) < 0.04
    assert drawn == [post["id"] for post in mix_posts(weighted, seed=1)]
    assert drawn != [post["id"] for post in mix_posts(weighted, seed=2)]
    assert len(set(drawn)) == len(drawn)


def test_when_a_mixture_ends():
    weighted = [(posts("a", 30), 1), (posts("b", 3), 1)]
    first, every, once = (
        Counter(mix_posts(weighted, stopping_strategy=strategy)["id"])
        for strategy in ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
    )
    assert first.total() < 33 and max(first.values()) == 1
    assert len(every) == 33 and max(every.values()) > 1
    assert once.total() == len(once) == 33


def test_columns_need_not_be_the_same():
    conversation = {
        "id": "c",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    rows = [
        posts("a", 1, score=1, note=None),
        posts("b", 1, score=0.5, rationale="why", image=b"x"),
        [conversation],
        Dataset.from_list([{**conversation, "id": "d", "prompt": [{"role": "user", "content": "q"}]}]),
        posts("e", 1, note="n"),
    ]
    for kind in (normalise_posts, lambda data: normalise_posts(data).to_iterable_dataset()):
        mixed = mix_posts([(kind(data), 1) for data in rows], stopping_strategy="all_exhausted_without_replacement")
        by_id = {post["id"]: post for post in mixed}
        assert sorted(by_id) == ["a0", "b0", "c", "d", "e0"]
        assert (by_id["a0"]["score"], by_id["b0"]["score"], by_id["e0"]["score"]) == (1.0, 0.5, None)
        assert (by_id["a0"]["note"], by_id["e0"]["note"], by_id["b0"]["rationale"]) == (None, "n", "why")
        assert by_id["c"]["prompt"] == conversation["prompt"] and by_id["a0"]["prompt"] is None
        assert by_id["d"]["prompt"] == [{"role": "user", "content": "q"}]
        assert by_id["b0"]["images"] == [{"bytes": b"x", "path": None}] and by_id["c"]["images"] == []
        valid, report = validate_posts(mixed, check_images=False, progress=False)
        assert len(list(valid)) == 5 and not report.findings and report.conversations == 2


def test_a_dataset_and_a_stream_give_a_stream():
    mixed = mix_posts([(posts("a", 5), 1), (stream(posts("b", 5)), 1)], stopping_strategy="all_exhausted_without_replacement")
    assert isinstance(mixed, IterableDataset)
    assert sorted(post["id"] for post in mixed) == [f"{name}{n}" for name in "ab" for n in range(5)]


def test_one_dataset_is_itself():
    assert list(mix_posts([(posts("a", 3), 0.1)])) == list(normalise_posts(posts("a", 3)))


def test_repeats_of_a_mixture_are_no_finding_when_asked():
    mixed = mix_posts([(posts("a", 30), 1), (posts("b", 3), 1)], stopping_strategy="all_exhausted")
    with pytest.raises(InvalidPostsError, match="repeated_id"):
        validate_posts(mixed, progress=False)
    assert len(validate_posts(mixed, unique_ids=False, progress=False)[0]) == len(mixed)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_weights_must_be_positive(weight):
    with pytest.raises(ValueError, match="must be a positive number"):
        mix_posts([(posts("a", 1), 1), (posts("b", 1), weight)])


def test_what_cannot_be_mixed_is_named():
    with pytest.raises(ValueError, match="nothing to mix"):
        mix_posts([])
    with pytest.raises(ValueError, match="stopping_strategy='never'"):
        mix_posts([(posts("a", 1), 1)], stopping_strategy="never")
    with pytest.raises(ValueError, match="stopping_strategy='never'"):
        PostMixtureConfig(stopping_strategy="never")
    with pytest.raises(ValueError, match="the column 'score' is Value.* in one dataset and Value.* in another"):
        mix_posts([(posts("a", 1, score=1), 1), (posts("b", 1, score="one"), 1)])
    with pytest.raises(ValueError, match="datasets: the entry {'file': 'x'} is invalid"):
        PostMixtureConfig(datasets=[{"file": "x"}])
    with pytest.raises(ValueError, match="datasets is empty"):
        load_mixture(PostMixtureConfig())


def test_types_of_one_kind_find_a_common_one():
    small = normalise_posts(posts("a", 1, n=[1])).cast_column("n", [Value("int8")])
    mixed = mix_posts([(small, 1), (posts("b", 1, n=[2]), 1)], stopping_strategy="all_exhausted_without_replacement")
    assert sorted(mixed["n"]) == [[1], [2]]


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_the_yaml_form(tmp_path, streaming):
    for name in ("a", "b"):
        bad = {"id": "bad", "text": "t", "keyphrases": []}
        lines = [json.dumps(row) for row in [*posts(name, 20, image=f"{name}.png"), bad]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text(
        f"""
datasets:
  - {{path: {tmp_path}/a.jsonl, weight: 2, image_dir: {tmp_path}}}
  - {{path: {tmp_path}/b.jsonl}}
streaming: {streaming}
mixture_seed: 4
stopping_strategy: all_exhausted_without_replacement
"""
    )
    [config] = TrlParser(PostMixtureConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert config.datasets[0] == PostSource(f"{tmp_path}/a.jsonl", weight=2, image_dir=str(tmp_path))
    assert config.datasets[1].weight == 1.0
    with pytest.raises(InvalidPostsError, match="no_keyphrases"):
        list(load_mixture(config, use_images=False, progress=False))
    mixed = list(
        load_mixture(config, use_images=False, progress=False, on_invalid="skip", report_file=tmp_path / "invalid.jsonl")
    )
    assert Counter(post["id"][0] for post in mixed) == {"a": 20, "b": 20}
    assert all(len(post["images"]) == (post["id"][0] == "a") for post in mixed)
    # A name that was not found stays a finding, for a reader that uses images.
    assert {item["code"] for post in mixed if post["id"][0] == "b" for item in post["load_findings"]} == {"no_image_dir"}
    for number in range(2):
        [finding] = (tmp_path / f"invalid-{number}.jsonl").read_text().splitlines()
        assert json.loads(finding)["code"] == "no_keyphrases"
