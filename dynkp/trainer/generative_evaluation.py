"""Evaluation by generating: metrics of a model's outputs, computed while it trains.

F1, MAP, subsets, share of reasoning and length of the outputs are those that `dynkp predict` and `dynkp evaluate` compute for
the same weights and posts. Prompts are made of text and images alone, and no limit depends on a gold answer. Ranks share the
posts and have equal metrics afterwards. Posts are scored as they are generated and not stored, so memory does not grow with
their number.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput

from dynkp.data.tasks import KeyphraseTask
from dynkp.mmkp_f1.scoring import KeyphraseScorer
from dynkp.prediction.generation import generate_keyphrases
from dynkp.trainer.recorded_metrics import RecordedMetrics

# Logged for every subset; for all posts, the measures of the composite too.
SUBSET_MEASURES = ("f1@1",)
COMPOSITE = ("f1@1", "f1@3", "map@5")
# Predictions scored together: scoring one by one would cost more.
_SCORED_AT_A_TIME = 256


class GenerativeEvaluation(RecordedMetrics):
    """The part of a trainer that generates for the evaluation posts and scores the outputs.

    It follows the options `eval_generation_posts`, `eval_max_new_tokens` and `eval_convention`.
    """

    task: Any
    train_dataset: Any

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate the loss on a set of posts, then generate for them and score.

        Args:
            dataloader (`torch.utils.data.DataLoader`): of the set.
            *args: as in `transformers.Trainer.evaluation_loop`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): prefix of the metrics' names.
            **kwargs: as in `transformers.Trainer.evaluation_loop`.

        Returns:
            [`~transformers.trainer_utils.EvalLoopOutput`]: with the scores among its metrics, equal on every rank.
        """
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.eval_generation_posts == 0:
            return output
        # On several ranks, a stream arrives as this rank's share of it.
        posts = dataloader.dataset.dataset if isinstance(dataloader.dataset, IterableDatasetShard) else dataloader.dataset
        metrics = self.generative_metrics(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            posts,
            limit=self.args.eval_generation_posts,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.args.eval_max_new_tokens,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            gather=self.gather_list,
            progress=self.accelerator.is_main_process and not self.args.disable_tqdm,
        )
        # Before Trainer logs them, and before it chooses the best checkpoint and stops early by them.
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def generative_metrics(self, model: Any, processor: Any, posts: Any, **options: Any) -> dict[str, float]:
        """Generate for posts and score the outputs; here, keyphrases.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): its processor.
            posts (`Iterable`): evaluation posts, the same on every rank.
            **options: as in [`generative_metrics`].

        Returns:
            `dict[str, float]`: metrics, equal on every rank.
        """
        train_keyphrases = keyphrases_of(self.train_dataset)
        convention = self.args.eval_convention
        return generative_metrics(
            model, processor, posts, task=self.task, train_keyphrases=train_keyphrases, convention=convention, **options
        )


def generative_metrics(
    model: Any,
    processor: Any,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: KeyphraseTask,
    train_keyphrases: Iterable[str] | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    convention: str,
    rank: int,
    ranks: int,
    gather: Callable[[list[Any]], list[Any]],
    progress: bool,
    generate: Callable[..., Iterator[Any]] = generate_keyphrases,
) -> dict[str, float]:
    """Generate keyphrases for posts and score all of them.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): its processor or tokenizer.
        posts (`Iterable`): evaluation posts, the same on every rank; a stream is possible.
        task ([`~dynkp.data.tasks.KeyphraseTask`]): prompt and separator.
        train_keyphrases (`Iterable[str]` or `None`): keyphrases of the training posts, for the subsets seen and unseen, which
            `None` leaves out.
        limit (`int` or `None`): number of posts from the start that are generated for; all, if `None`.
        batch_size (`int`): posts per batch.
        max_new_tokens (`int`): greatest length of an output in tokens, for every post alike.
        convention (`str`): scoring convention.
        rank (`int`): index of this process.
        ranks (`int`): number of processes.
        gather (`Callable`): joins the lists of all ranks; called on every rank.
        progress (`bool`): show a progress bar.
        generate (`Callable`, *optional*): generates the predictions, as
            [`~dynkp.prediction.generation.generate_keyphrases`] does.

    Returns:
        `dict[str, float]`: equal on every rank: `f1@1`, `f1@3`, `map@5` and their sum `composite` over all posts,
        `SUBSET_f1@1`, `generated_posts`, `generated_reasoning_share`, `output_words`, `output_tokens`, `empty_share`. Empty if
        there is no post.
    """
    gold: deque[tuple[list[str], str]] = deque()  # of posts generated for and not yet scored

    def mine() -> Iterator[Mapping[str, Any]]:
        if isinstance(posts, Dataset):  # reads only this rank's rows
            rows: Iterable[Any] = posts.select(range(rank, len(posts) if limit is None else min(limit, len(posts)), ranks))
        else:
            rows = islice(posts, rank, limit, ranks)
        for row in rows:
            gold.append((gold_keyphrases(row, task), row.get("text") or ""))
            yield row

    predictions = generate(
        model, processor, mine(), task=task, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    subsets = ["all", "present", "absent"] + (["seen", "unseen"] if train_keyphrases is not None else [])
    own, whole = (KeyphraseScorer(convention=convention, subsets=subsets, train_keyphrases=train_keyphrases) for _ in range(2))
    sums: Counter[str] = Counter()
    while rows := list(islice(predictions, _SCORED_AT_A_TIME)):
        references, texts = zip(*(gold.popleft() for _ in rows), strict=True)
        own.add_batch([row["keyphrases"] for row in rows], references, texts)
        sums["posts"] += len(rows)
        sums["empty"] += sum(not row["keyphrases"] for row in rows)
        for column in ("reasoned", "output_words", "output_tokens"):
            sums[column] += sum(row[column] for row in rows)
    gathered = gather([(own.totals(), sums)])
    sums = Counter()
    for totals, counts in gathered:
        whole.add_totals(totals)
        sums.update(counts)
    if not (count := sums["posts"]):
        return {}
    scores = whole.compute()
    metrics = {name: scores["all"][name] for name in COMPOSITE}
    metrics["composite"] = sum(metrics.values())
    for subset in subsets[1:]:
        # A subset without posts has no score; zero would be one.
        metrics |= {f"{subset}_{name}": scores[subset][name] for name in SUBSET_MEASURES if scores[subset]["posts"]}
    return metrics | {
        "generated_posts": count,
        "generated_reasoning_share": sums["reasoned"] / count,
        "output_words": sums["output_words"] / count,
        "output_tokens": sums["output_tokens"] / count,
        "empty_share": sums["empty"] / count,
    }


def gold_keyphrases(row: Mapping[str, Any], task: KeyphraseTask) -> list[str]:
    """Return the gold keyphrases of a post.

    Args:
        row (`Mapping`): a post, or a row in TRL's prompt-completion format, whose keyphrases are read from its completion.
        task ([`~dynkp.data.tasks.KeyphraseTask`]): parses the completion.
    """
    if row.get("keyphrases"):
        return list(row["keyphrases"])
    completion = row["completion"]
    return task.parse(completion if isinstance(completion, str) else completion[0]["content"]).keyphrases


def keyphrases_of(posts: Any) -> set[str] | None:
    """Collect the keyphrases of a training set.

    Args:
        posts (`Dataset` or `IterableDataset`): the set.

    Returns:
        `set[str]` or `None`: `None` for a stream, and for rows without the column `keyphrases`.

    Example:
        >>> sorted(keyphrases_of(Dataset.from_list([{"keyphrases": ["cup", "goal"]}, {"keyphrases": ["goal"]}])))
        ['cup', 'goal']
    """
    if not isinstance(posts, Dataset) or "keyphrases" not in posts.column_names:
        return None
    return {phrase for phrases in posts["keyphrases"] for phrase in phrases or ()}
