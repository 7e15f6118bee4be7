"""The assistant's soft labels on disk, so that a student trains without the assistant in memory.

Given   posts' answers in tokens, and the assistant's likeliest tokens at each of them.
Gives   a folder: `meta.json` (who wrote the labels and how), `tokenizer/` (what their ids mean), `labels-*.safetensors`
        (many posts each, memory-mapped when read).
Holds   labels are found by a post's id and its answer's tokens: those of another answer are never used; a file appears when
        it is complete, so a killed run loses the posts since the last file and goes on behind it; labels of different
        assistants, temperatures or tasks never meet in one folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynkp.batches.targets import Targets
from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.distillation.assistant import Assistant
from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import read_json, write_json
from dynkp.files.locks import OutputLock
from dynkp.models.checkpoints import find_checkpoint
from dynkp.models.fingerprints import weights_fingerprint
from dynkp.objectives.distillation import SoftLabels, soft_label_divergence, truncate
from dynkp.prediction.batch_plan import plan_batches, prompt_size

logger = logging.getLogger(__name__)

_META = "meta.json"
_TOKENIZER = "tokenizer"
# Posts' answers per file: what a killed run computes again, at most.
_ANSWERS_PER_FILE = 256


class Place(NamedTuple):
    """Where a post's labels are: file, first row, number of rows."""

    file: str
    start: int
    length: int


def assistant_fingerprint(name: str) -> str:
    """What tells an assistant from another one: its weights', and its adapter's, wherever its folder lies."""
    checkpoint = find_checkpoint(name)
    parts = [weights_fingerprint(part) for part in (checkpoint.model, checkpoint.adapter) if part is not None]
    return " + ".join(parts)


def task_fingerprint(task: ReasoningTask) -> str:
    """The task's name, and a checksum of all that its prompts are made of."""
    return f"{task.name} {hashlib.sha256(repr(task).encode()).hexdigest()[:16]}"


class SoftLabelWriter:
    """Fills a folder with soft labels; goes on where another one stopped.

    Args:
        folder: made if it does not exist.
        settings: what the labels depend on besides the answers: `assistant`, `task`, `temperature`, `top_k`, `vocabulary`, ...
        tokenizer: what the ids mean; a student is trained from labels that tell.
        rank: of this process among those that write to the folder.

    Raises:
        BlockingIOError: if another run is writing to the folder.
        ValueError: if the folder was begun with other settings, saying which.

    Example:
        >>> writer = SoftLabelWriter("labels", {"assistant": "...", "top_k": 64, ...}, tokenizer)
        >>> if not writer.has("7", "chain"): writer.add("7", "chain", token_ids, labels)
        >>> writer.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        rank: int = 0,
    ):
        self.folder = Path(folder)
        self.rank = rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = OutputLock(self.folder / f"writer-{rank}.lock")
        settings = json.loads(json.dumps(settings))
        if (self.folder / _META).exists():
            _compare(self.folder, _settings(self.folder), settings)
        else:
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder / _TOKENIZER)
            write_json(self.folder / _META, {"settings": settings})
        self.places = _places(self.folder)
        self._pending: list[tuple[str, str, torch.Tensor, SoftLabels]] = []

    def has(self, post_id: str, task: str) -> bool:
        """Whether the labels of a post's answer are on the disk."""
        return (post_id, task) in self.places

    def add(self, post_id: str, task: str, token_ids: torch.Tensor, labels: SoftLabels) -> None:
        """Take in one answer: its tokens, (N,), and what the assistant says about them."""
        self._pending.append((post_id, task, token_ids, labels))
        if len(self._pending) >= _ANSWERS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken in, in one step."""
        if not self._pending:
            return
        entries: list[tuple[str, str, int, int]] = []
        start = 0
        for post_id, task, token_ids, _ in self._pending:
            entries.append((post_id, task, start, len(token_ids)))
            start += len(token_ids)
        tensors = {
            "tokens": torch.cat([token_ids for _, _, token_ids, _ in self._pending]).int(),
            "ids": torch.cat([labels.ids for *_, labels in self._pending]).int(),
            "log_probs": torch.cat([labels.log_probs for *_, labels in self._pending]).float(),
            "rest": torch.cat([labels.rest for *_, labels in self._pending]).float(),
        }
        number = len(list(self.folder.glob(f"labels-{self.rank}-*.safetensors")))
        path = self.folder / f"labels-{self.rank}-{number:05}.safetensors"
        placed = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_files(path) as (partial,):
            save_file(placed, partial, metadata={"entries": json.dumps(entries)})
        self.places |= {(post_id, task): Place(path.name, first, length) for post_id, task, first, length in entries}
        self._pending.clear()

    def close(self) -> None:
        """Write what is left, and let other runs have the folder."""
        self.flush()
        self._lock.close()


class SoftLabelCache:
    """Reads what [`SoftLabelWriter`] wrote.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing was written to it.

    Example:
        >>> cache = SoftLabelCache("labels")
        >>> cache.of_batch(["7"], {"label": batch["label"]})["label"]["log_probs"].shape
        torch.Size([9, 64])
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / _META).is_file():
            raise FileNotFoundError(f"`soft_labels` {str(folder)!r} holds none; write them with `dynkp distill cache`.")
        self.settings = _settings(self.folder)
        self.places = _places(self.folder)
        self._files: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # an open file does not travel to a data loader's worker

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the ids mean."""
        return AutoTokenizer.from_pretrained(self.folder / _TOKENIZER)

    def check(self, task: ReasoningTask, temperature: float, vocabulary: int, assistant: str | None = None) -> None:
        """Refuse labels that are not for this training.

        Args:
            task: of the training.
            temperature: T of the training; probabilities are kept as they are at T.
            vocabulary: number of the student's ids.
            assistant: folder or Hub id of who must have written the labels; anybody, if None.

        Raises:
            ValueError: naming what differs.
        """
        wanted: dict[str, Any] = {"task": task_fingerprint(task), "temperature": temperature}
        if assistant is not None:
            wanted["assistant"] = assistant_fingerprint(assistant)
        _compare(self.folder, {name: self.settings.get(name) for name in wanted}, wanted)
        if self.settings["vocabulary"] > vocabulary:
            raise ValueError(
                f"`soft_labels` {str(self.folder)!r} spread over {self.settings['vocabulary']} token ids, and the student has "
                f"{vocabulary}. Write them again with `dynkp distill cache --student`, which cuts to the ids both have."
            )

    def check_posts(self, posts: Any) -> None:
        """Refuse a training set with posts that have no labels.

        Args:
            posts: rows with `id` and, for the chain, `rationale`.

        Raises:
            ValueError: with the first ids and the remedy.
        """
        rationales = posts["rationale"] if "rationale" in posts.column_names else [None] * len(posts)
        missing = [
            (post_id, task)
            for post_id, rationale in zip(posts["id"], rationales, strict=True)
            for task in ("label", "chain")
            if (task == "label" or (rationale or "").strip()) and (post_id, task) not in self.places
        ]
        if missing:
            raise ValueError(self._missing(missing))

    def of_batch(self, ids: Sequence[str], answers: Mapping[str, Targets]) -> dict[str, dict[str, Any]]:
        """The soft labels of a batch's answers.

        Args:
            ids: the B posts'.
            answers: per task their [`Targets`], which may be cut at their end.

        Returns:
            Per task the parts of [`~dynkp.objectives.distillation.SoftLabels`], in the order of the answers' tokens; a task
            that no post has is left out.

        Raises:
            ValueError: naming the post, if it has no labels, or those of another answer.
        """
        batch = {}
        for task, targets in answers.items():
            rows = [
                self._of_answer(post_id, task, targets["input_ids"][row, :length])
                for row, (post_id, length) in enumerate(zip(ids, targets["lengths"], strict=True))
                if length
            ]
            if rows:
                parts = {name: torch.cat([row[name] for row in rows]) for name in ("ids", "log_probs", "rest")}
                batch[task] = {**parts, "vocabulary": self.settings["vocabulary"]}
        return batch

    def _of_answer(self, post_id: str, task: str, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if (place := self.places.get((post_id, task))) is None:
            raise ValueError(self._missing([(post_id, task)]))
        file = self._files.get(place.file)
        if file is None:
            file = self._files[place.file] = safe_open(self.folder / place.file, framework="pt")
        rows = slice(place.start, place.start + min(len(token_ids), place.length))
        if len(token_ids) > place.length or not torch.equal(file.get_slice("tokens")[rows], token_ids.int()):
            raise ValueError(
                f"post {post_id!r}: `soft_labels` {str(self.folder)!r} has those of another {task} than the post's. Write the "
                "labels of these posts to another folder with `dynkp distill cache`."
            )
        return {name: file.get_slice(name)[rows] for name in ("ids", "log_probs", "rest")}

    def _missing(self, missing: Sequence[tuple[str, str]]) -> str:
        shown = ", ".join(f"{post_id!r} ({task})" for post_id, task in missing[:5])
        return (
            f"`soft_labels` {str(self.folder)!r} has nothing for {len(missing)} answers: {shown}. Run `dynkp distill cache` on "
            "these posts; it goes on where it stopped."
        )


def write_soft_labels(
    writer: SoftLabelWriter,
    assistant: Assistant,
    collator: TwoTaskCollator,
    posts: Any,
    *,
    top_k: int,
    temperature: float,
    vocabulary: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> int:
    """Have the assistant say what it thinks of the posts' answers; those already in the folder are passed over.

    Args:
        writer: where to.
        assistant: on its device.
        collator: of the assistant's own processor.
        posts: rows of the collator's task; a sequence.
        top_k: K, tokens kept of each distribution.
        temperature: T.
        vocabulary: number of ids that student and assistant share; the assistant's, if None.
        batch_size: posts at a time.
        progress: whether to show a progress bar.

    Returns:
        The number of answers written.
    """
    todo = [
        index
        for index, (post_id, rationale) in enumerate(zip(posts["id"], posts["rationale"], strict=True))
        if not writer.has(post_id, "label") or ((rationale or "").strip() and not writer.has(post_id, "chain"))
    ]
    written = 0
    sizes = [prompt_size(row) for row in posts.select_columns(["text", "images"]).select(todo)]
    with tqdm(total=len(todo), desc="Soft labels", unit="post", disable=not progress) as bar:
        for batch in plan_batches(sizes, batch_size):
            rows = collator([posts[todo[index]] for index in batch])
            answers = {task: rows[task] for task in ("label", "chain")}
            for task, logits in assistant.logits(rows["prompts"], answers).items():
                labels = truncate(logits[:, :vocabulary].float(), top_k, temperature)
                lengths = answers[task]["lengths"]
                parts = [part.split(lengths) for part in (labels.ids, labels.log_probs, labels.rest)]
                for row, (post_id, length) in enumerate(zip(rows["id"], lengths, strict=True)):
                    if length and not writer.has(post_id, task):
                        token_ids = answers[task]["input_ids"][row, :length]
                        ids, log_probs, rest = (part[row] for part in parts)
                        writer.add(post_id, task, token_ids, SoftLabels(ids, log_probs, rest, labels.vocabulary))
                        written += 1
            bar.update(len(batch))
    writer.flush()
    return written


def left_out(folder: str | os.PathLike[str]) -> dict[int, float]:
    """How much of the assistant's probability its likeliest k tokens leave out, the mean over all tokens, for some k."""
    sums: dict[int, float] = {}
    tokens = 0
    for path in sorted(Path(folder).glob("labels-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            rest = file.get_tensor("rest").double().exp()
            top = file.get_tensor("log_probs").double().exp()
        behind = top.sum(dim=1, keepdim=True) - top.cumsum(dim=1) + rest[:, None]  # outside the first 1, 2, ... tokens
        tokens += len(rest)
        for k in _some(top.shape[1]):
            sums[k] = sums.get(k, 0.0) + float(behind[:, k - 1].clamp(min=0).sum())
    return {k: total / tokens for k, total in sums.items()}


@torch.no_grad()
def truncation_effect(
    student: Assistant, assistant: Assistant, collator: TwoTaskCollator, posts: Any, *, top_k: int, temperature: float
) -> dict[int, float]:
    """KL between assistant and student with k tokens kept, as a share of the whole KL, over the posts' answers."""
    sums: dict[int, float] = {}
    whole = 0.0
    for row in posts:
        rows = collator([row])
        answers = {task: rows[task] for task in ("label", "chain")}
        ours, theirs = (model.logits(rows["prompts"], answers) for model in (student, assistant))
        for task in ours:
            shared = min(ours[task].shape[1], theirs[task].shape[1])
            z_s, z_a = ours[task][:, :shared].float(), theirs[task][:, :shared].float()
            whole += float(soft_label_divergence(z_s, z_a, temperature).sum())
            for k in _some(min(top_k, shared)):
                labels = truncate(z_a, k, temperature)
                sums[k] = sums.get(k, 0.0) + float(soft_label_divergence(z_s, labels, temperature).sum())
    return {k: total / whole for k, total in sums.items()} if whole > 0 else {}


def _some(top_k: int) -> list[int]:
    """1, 4, 16, ... and K."""
    return [*takewhile(lambda k: k < top_k, (4**power for power in range(16))), top_k]


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _META)["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _META} is damaged ({error}). Delete the folder, and write the labels again.") from error


def _compare(folder: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [
        f"{name} was {recorded.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(recorded.keys() | wanted.keys())
        if recorded.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"the soft labels in {str(folder)!r} were written with other settings: {'; '.join(differing)}. Choose another "
            "folder, or the settings they were written with."
        )


def _places(folder: Path) -> dict[tuple[str, str], Place]:
    return {(post_id, task): place for post_id, task, place in _entries(folder)}


def _entries(folder: Path) -> Iterator[tuple[str, str, Place]]:
    for path in sorted(folder.glob("labels-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            entries = json.loads(file.metadata()["entries"])
        for post_id, task, start, length in entries:
            yield post_id, task, Place(path.name, start, length)
