"""Mixtures: several datasets of posts as one, drawn with weights, and their configuration for YAML.

Guarantees: the same seed gives the same posts in the same order. The datasets need not have the same columns: a post has None
in a column that its own dataset does not have.
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
    """One entry of `datasets:`; fields that TRL's `DatasetConfig` also has mean the same.

    Args:
        path: a file, a folder or a Hub id, as `source` of `load_posts`.
        weight: how often the next post is drawn from this dataset, relative to the others; greater than 0.
        split: as in `load_posts`.
        image_dir: as in `load_posts`.
        format: as in `load_posts`.
        name: as in `load_posts`.
        data_dir: as in `load_posts`.
        data_files: as in `load_posts`.
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
    """Configuration of several datasets, as TRL's `DatasetMixtureConfig`.

    In YAML:

    ```yaml
    datasets:
      - {path: data/train.jsonl, image_dir: data/images, weight: 3}
      - {path: someone/posts, split: train, weight: 1}
    streaming: false
    ```

    Args:
        datasets: the datasets to mix, as [`PostSource`] or as a `dict` of its fields.
        streaming: whether to read the datasets during training.
        mixture_seed: seed of the draws.
        stopping_strategy: as in `mix_posts`.

    Raises:
        ValueError: if an entry has unknown fields or no path, or the strategy is unknown.
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
        raise ValueError(f"datasets: the entry {entry!r} is invalid ({error}); {PostSource.__doc__}") from error


def load_mixture(config: PostMixtureConfig, **validation: Any) -> Posts:
    """Load, validate and mix the datasets of a configuration.

    Each dataset is validated by itself, since a mixture repeats posts and two datasets may use the same ids.

    Args:
        config: the datasets.
        **validation: arguments of `validate_posts` for every dataset. If there are several, the name of `report_file` gets
            the number of the dataset before its suffix.

    Returns:
        The mixture, as `mix_posts` returns it.

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
    """Draw posts from several datasets, each time from one of them with a probability proportional to its weight.

    Args:
        weighted: datasets (or lists of posts) with their weights, greater than 0. If one is a stream, so is the result.
        seed: seed of the draws.
        stopping_strategy: `"first_exhausted"` ends when a dataset is drawn that has no more posts; `"all_exhausted"` ends
            when every dataset has been read once, the smaller ones repeatedly; `"all_exhausted_without_replacement"` reads
            every post exactly once.

    Returns:
        The mixture. Validate the datasets before, or the mixture with `validate_posts(..., unique_ids=False)`.

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
            raise ValueError(f"weight={weight!r} must be a positive number: remove a dataset that should not be drawn")
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
    """Cast columns of the same name to a common type."""
    common: dict[str, Any] = {}
    for dataset in posts:
        for name, kind in dataset.features.items():
            common[name] = _common_type(name, common[name], kind) if name in common else kind
    return [_retyped(dataset, Features(common)) for dataset in posts]


def _retyped(dataset: Posts, common: Features) -> Posts:
    if dataset.features == common:
        return dataset
    if isinstance(dataset, IterableDataset):  # `datasets` does not add missing columns to the rows of a stream
        return dataset.map(_filled, fn_kwargs={"columns": tuple(common)}, features=common)
    features = Features({name: common[name] for name in dataset.features})
    # Arrow cannot cast a struct to JSON text; `map` writes the values with the new types.
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
