"""The metric as a module of the `evaluate` library.

`evaluate.load` copies this file and the files that it imports relatively, one import per line, so all files of the folder
that are used are imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

from .answers import parse_answer as parse_answer
from .evaluation import evaluate_keyphrases
from .outputs import list_statistics as list_statistics
from .porter import porter_stem as porter_stem
from .scoring import check_gold, check_lengths, checked_phrase_lists, checked_strings
from .semantic import semantic_scores as semantic_scores
from .significance import bootstrap_interval as bootstrap_interval

DESCRIPTION = """\
Keyphrase prediction scored as the multi-modal keyphrase papers do: P, R, F1, MAP and NDCG at k over Porter-stemmed
phrases, by one of four conventions that do not agree with each other, for all, present, absent, seen and unseen
keyphrases, with bootstrap confidence intervals.
"""

INPUTS = """
Args:
    predictions: Per post the predicted keyphrases, best first; with `parse=True` the model's raw output.
    references: Per post the gold keyphrases, at least one.
    texts: Per post the text, for the subsets present and absent.
    train_keyphrases: The training set's keyphrases, for the subsets seen and unseen.
    convention: "cmkp" (default), "aimkp", "padded" or "unpadded".
    k: The cut-offs, (1, 3, 5) by default.
    subsets: The subsets to score, including intersections such as "present&unseen"; by default `all` and the single kinds
        that the inputs allow.
    confidence: The confidence of bootstrap intervals, such as 0.95; None (default) for no intervals.
    resamples: The number of bootstrap resamples, 10,000 by default.
    seed: The seed of the bootstrap, 0 by default.
    parse: Whether predictions are raw outputs, `k1; k2` or `<think>...</think><answer>k1; k2</answer>`.
    separator: The separator of keyphrases in raw outputs, ";" by default.
    count_tokens: A function that returns the number of tokens of a raw output.
    semantic_model: A sentence-transformers model (name, folder or object), for semantic P, R and F1.
Returns:
    `convention`, `posts`, `subsets` (per subset `posts`, `phrases` and `p@k`, `r@k`, `f1@k`, `map@k`, `ndcg@k` as
    fractions), shares and lengths of the outputs, and `intervals`.
Examples:
    >>> metric = evaluate.load("dynkp/mmkp_f1")
    >>> results = metric.compute(predictions=[["dogs", "cats"], ["sun"]], references=[["dog"], ["rain"]])
    >>> results["subsets"]["all"]["f1@1"]
    0.5
"""

CITATION = """\
@inproceedings{wang-etal-2020-cross-media,
    title = "Cross-Media Keyphrase Prediction: A Unified Framework with Multi-Modality Multi-Head Attention and Image Wordings",
    author = "Wang, Yue and Li, Jing and Lyu, Michael R. and King, Irwin",
    booktitle = "Proceedings of EMNLP",
    year = "2020"
}
"""

_LISTS = datasets.Features(
    {
        "predictions": datasets.Sequence(datasets.Value("large_string")),
        "references": datasets.Sequence(datasets.Value("large_string")),
        "texts": datasets.Value("large_string"),
    }
)
_RAW = datasets.Features({**_LISTS, "predictions": datasets.Value("large_string")})


class MmkpF1(evaluate.Metric):
    """Keyphrase scores; README.md beside this file is the metric card.

    Batches are stored on disk until `compute` is called, as `evaluate` does; options are given to `compute`.

    Example:
        >>> metric = load_metric()
        >>> metric.add_batch(predictions=[["dogs"]], references=[["dog"]])
        >>> metric.add_batch(predictions=[["sun"]], references=[["rain"]])
        >>> metric.compute(k=[1])["subsets"]["all"]["f1@1"]
        0.5
    """

    # Whether the batches added so far have texts; None before the first batch.
    _with_texts: bool | None = None

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[_LISTS, _RAW],
            reference_urls=["https://aclanthology.org/2020.emnlp-main.268", "https://github.com/yuewang-cuhk/CMKP"],
        )

    def add_batch(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        texts: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add posts: all of them, or none if one cannot be scored.

        Args:
            predictions: Per post the predicted keyphrases, or the model's raw output.
            references: Per post the gold keyphrases.
            texts: Per post the text; given with all batches or with none.
            **kwargs: Nothing else is accepted: options are given to `compute`.

        Raises:
            TypeError: If something other than strings is given for keyphrases or texts, or options are given.
            ValueError: If numbers of posts differ, or a post has no gold keyphrase.
        """
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)}: add_batch takes predictions, references and texts; options go to compute")
        predictions = _listed(predictions)
        # Checked here, because `datasets` would write a NaN as the string "nan".
        raw = _is_raw(predictions)
        check = checked_strings if raw else checked_phrase_lists
        predicted: Any = check("predictions", predictions)
        gold = checked_phrase_lists("references", references)
        listed = None if texts is None else checked_strings("texts", texts)
        check_lengths(gold, predictions=predicted, texts=listed)
        check_gold(gold)
        if self._with_texts not in (None, listed is not None):
            raise ValueError("texts were given with some batches and not with others: give them with all or none")
        if not gold:
            return
        if self.selected_feature_format is not None and raw != (self.selected_feature_format == _RAW):
            raise TypeError("predictions are raw outputs in some batches and lists of keyphrases in others: use one")
        self._with_texts = listed is not None
        evaluate.Metric.add_batch(self, predictions=predicted, references=gold, texts=listed or [""] * len(gold))

    def add(self, *, prediction: Any = None, reference: Any = None, text: str | None = None, **kwargs: Any) -> None:
        """Add one post.

        Args:
            prediction: The predicted keyphrases, or the model's raw output.
            reference: The gold keyphrases.
            text: The text.
            **kwargs: Nothing else is accepted.

        Raises:
            TypeError: As in `add_batch`.
            ValueError: As in `add_batch`.
        """
        texts = None if text is None else [text]
        self.add_batch(predictions=[prediction], references=[reference], texts=texts, **kwargs)

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        texts: Any = None,
        **options: Any,
    ) -> dict[str, Any] | None:
        """Score the posts given here and those added before.

        Args:
            predictions: Per post the predicted keyphrases; with `parse=True` the model's raw output.
            references: Per post the gold keyphrases.
            texts: Per post the text.
            **options: The other inputs: `train_keyphrases`, `convention`, `k`, `subsets`, `confidence`, `resamples`, `seed`,
                `parse`, `separator`, `count_tokens`, `semantic_model`; see `evaluate_keyphrases`.

        Returns:
            The scores, as `evaluate_keyphrases` returns them; `None` on all processes but the first.

        Raises:
            TypeError: If an input or option has the wrong type; the posts added before are kept.
            ValueError: If an input or option has a wrong value; the posts added before are kept.
        """
        if options.get("train_keyphrases") is not None:
            options["train_keyphrases"] = checked_strings("train_keyphrases", options["train_keyphrases"])
        given = predictions is not None or references is not None
        predictions = _listed(predictions)
        # Options are tried on one post first: an error after the posts are read would lose those added before.
        raw = _is_raw(predictions) if given else self.selected_feature_format == _RAW
        if raw and not options.get("parse"):
            found = f"predictions[0]={predictions[0]!r:.80}" if given else "a prediction of the batches added"
            raise TypeError(f"{found} is a string: give a list of keyphrases per post, or parse=True for raw outputs")
        tried = {**options, "semantic_model": None}
        with_texts = texts is not None if given else self._with_texts
        first = "a" if raw else ["a"]
        self._scores([first], [["a"]], ["a"] if with_texts else None, **tried)
        if given:
            self.add_batch(predictions=predictions, references=references, texts=texts)
        if self.writer is None and self.num_process == 1:  # `evaluate` cannot read a file without posts
            return self._scores([], [], None, **options)
        result = evaluate.Metric.compute(self, **options)
        self._with_texts = None
        return result

    def _compute(
        self, *, predictions: Sequence[Any], references: Sequence[Sequence[str]], texts: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        return self._scores(predictions, references, texts if self._with_texts else None, **options)

    @staticmethod
    def _scores(
        predictions: Sequence[Any],
        references: Sequence[Sequence[str]],
        texts: Sequence[str] | None,
        k: Sequence[int] = (1, 3, 5),
        **options: Any,
    ) -> dict[str, Any]:
        return evaluate_keyphrases(predictions, references, texts=texts, ks=k, **options)


def _listed(predictions: Any) -> Any:
    """A column of a dataset, an array or a generator as a list; other values unchanged, for the checks that follow."""
    listable = isinstance(predictions, Iterable) and not isinstance(predictions, (str, bytes, Mapping))
    return list(predictions) if listable else predictions


def _is_raw(predictions: Any) -> bool:
    return isinstance(predictions, list) and len(predictions) > 0 and isinstance(predictions[0], str)


def load_metric(**settings: Any) -> MmkpF1:
    """Load the metric from the installed package: as `evaluate.load("dynkp/mmkp_f1")`, but offline and from any folder.

    Args:
        **settings: Arguments of `evaluate.load`: `experiment_id`, `num_process`, `process_id`, `cache_dir`, `keep_in_memory`.

    Returns:
        The metric.

    Example:
        >>> metric = load_metric()
        >>> metric.compute(predictions=[["dogs"]], references=[["dog"]])["subsets"]["all"]["f1@1"]
        1.0
    """
    return MmkpF1(**settings)
