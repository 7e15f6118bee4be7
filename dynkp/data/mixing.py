"""Several datasets of posts as one, drawn with weights: `mix_posts`, and its configuration for YAML.

Holds: with equal seed the same posts come in the same order; the datasets' columns need not be the same, a post has
None in a column that its own dataset lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value, interleave_datasets

from dynkp.data.posts import validate_posts
from dynkp.data.rows import Posts, normalise_posts
from dynkp.data.sources import load_posts

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


@dataclass
class PostSource:
    """One entry of `datasets:`; the fields that TRL's `DatasetConfig` has too mean the same.

    Args:
        path: what `load_posts` takes as `source`: a file, a folder or a Hub id.
        weight: how often the next post comes from here, relative to the others; greater than 0.
        split, name, data_dir, data_files, image_dir, format: as in `load_posts`.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    image_dir: str | None = None
    format: str = "auto"
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None


@dataclass
class PostMixtureConfig:
    """Several datasets, as TRL's `DatasetMixtureConfig`, in YAML:

    ```yaml
    datasets:
      - {path: data/train.jsonl, image_dir: data/pictures, weight: 3}
      - {path: someone/posts, split: train, weight: 1}
    streaming: false
    ```
    """

    datasets: list[PostSource] = field(
        default_factory=list, metadata={"help": "Datasets to mix: path, weight, split, image_dir, format, name, ..."}
    )
    streaming: bool = field(default=False, metadata={"help": "Whether to read the datasets while training."})
    mixture_seed: int = field(default=0, metadata={"help": "Seed of the draws that mix several datasets."})
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "When a mixture ends: 'first_exhausted', 'all_exhausted' (posts of the smaller datasets come "
            "again) or 'all_exhausted_without_replacement'."
        },
    )

    def __post_init__(self) -> None:
        self.datasets = [_post_source(entry) for entry in self.datasets]
        if self.stopping_strategy not in STOPPING_STRATEGIES:
            raise ValueError(f"stopping_strategy={self.stopping_strategy!r} is not known: use {', '.join(STOPPING_STRATEGIES)}")


def _post_source(entry: Any) -> PostSource:
    if isinstance(entry, PostSource):
        return entry
    try:
        return PostSource(**entry)
    except TypeError as error:
        raise ValueError(f"datasets: the entry {entry!r} does not fit ({error}); {PostSource.__doc__}") from error


def load_mixture(config: PostMixtureConfig, **validation: Any) -> Posts:
    """Load, validate and mix the datasets of a configuration.

    Each is validated by itself, for a mixture repeats posts and two datasets may use the same ids.

    Args:
        config: the datasets.
        **validation: arguments of `validate_posts`, for every dataset. `report_file` gets the dataset's number before
            its suffix if there are several.

    Raises:
        ValueError: if there is no dataset, or as in `load_posts`, `validate_posts` and `mix_posts`.
    """
    if not config.datasets:
        raise ValueError("datasets is empty: name at least one, such as {path: train.jsonl}")
    report_file = validation.pop("report_file", None)
    weighted: list[tuple[Posts, float]] = []
    for number, source in enumerate(config.datasets):
        if report_file is not None:
            stem, dot, suffix = str(report_file).rpartition(".")
            validation["report_file"] = f"{stem}-{number}{dot}{suffix}" if len(config.datasets) > 1 else report_file
        posts = load_posts(
            source.path,
            image_dir=source.image_dir,
            split=source.split,
            streaming=config.streaming,
            format=source.format,
            name=source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
        )
        weighted.append((validate_posts(posts, **validation)[0], source.weight))
    return mix_posts(weighted, seed=config.mixture_seed, stopping_strategy=config.stopping_strategy)


def mix_posts(weighted: Sequence[tuple[Any, float]], seed: int = 0, stopping_strategy: str = "first_exhausted") -> Posts:
    """Draw posts from several datasets, each time from one of them with probability proportional to its weight.

    Args:
        weighted: datasets (or lists of posts) with their weights, greater than 0. If one is a stream, the result is.
        seed: seed of the draws.
        stopping_strategy: `"first_exhausted"` ends when a draw falls on a dataset that has no more posts;
            `"all_exhausted"` when each has been read once, the smaller ones from the start again;
            `"all_exhausted_without_replacement"` reads every post exactly once.

    Returns:
        The mixture. Validate the datasets before, or with `validate_posts(..., unique_ids=False)` afterwards.

    Raises:
        ValueError: if there is no dataset, a weight is not positive and finite, or a column has incompatible types.

    Example:
        >>> one, two = [{"id": "a", "text": "x"}], [{"id": "b", "text": "y"}]
        >>> mixed = mix_posts([(one, 1), (two, 1)], stopping_strategy="all_exhausted_without_replacement")
        >>> sorted(mixed["id"])
        ['a', 'b']
    """
    if not weighted:
        raise ValueError("there is nothing to mix: pass at least one (dataset, weight)")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(f"stopping_strategy={stopping_strategy!r} is not known: use {', '.join(STOPPING_STRATEGIES)}")
    weights = [float(weight) for _, weight in weighted]
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight={weight!r} must be a positive number: leave out a dataset that is not wanted")
    posts = [normalise_posts(dataset) for dataset, _ in weighted]
    if len(posts) == 1:
        return posts[0]
    if any(isinstance(dataset, IterableDataset) for dataset in posts):
        posts = [data.to_iterable_dataset() if isinstance(data, Dataset) else data for data in posts]
    posts = _aligned(posts)
    total = sum(weights)
    probabilities = [weight / total for weight in weights]
    return interleave_datasets(posts, probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy)


def _aligned(posts: list[Posts]) -> list[Posts]:
    """Give columns of the same name the same type."""
    common: dict[str, Any] = {}
    for dataset in posts:
        for name, kind in dataset.features.items():
            common[name] = _common_type(name, common[name], kind) if name in common else kind
    return [_retyped(dataset, Features(common)) for dataset in posts]


def _retyped(dataset: Posts, common: Features) -> Posts:
    if dataset.features == common:
        return dataset
    if isinstance(dataset, IterableDataset):  # a stream's rows do not get the columns they lack by themselves
        return dataset.map(_filled, fn_kwargs={"columns": tuple(common)}, features=common)
    features = Features({name: common[name] for name in dataset.features})
    # Arrow cannot cast a struct to JSON text; the values themselves pass through a `map` to the new types.
    if any(kind == Json() != dataset.features[name] for name, kind in features.items()):
        return dataset.map(dict, features=features)
    return dataset.cast(features)


def _filled(post: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: post.get(name) for name in columns}


def _common_type(name: str, one: Any, other: Any) -> Any:
    if one == other or other == Value("null"):
        return one
    if one == Value("null"):
        return other
    if isinstance(one, Json) or isinstance(other, Json):
        return Json()
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        return List(_common_type(name, one.feature, other.feature))
    if isinstance(one, Value) and isinstance(other, Value):
        for family in (("string", "large_string"), ("int", "uint"), ("int", "uint", "float")):
            if one.dtype.startswith(family) and other.dtype.startswith(family):
                return Value({2: "int64", 3: "float64"}[len(family)] if family[0] == "int" else "string")
    raise ValueError(
        f"the column {name!r} is {one} in one dataset and {other} in another: rename, cast or remove it in one of them"
    )
