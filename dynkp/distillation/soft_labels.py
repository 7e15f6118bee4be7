"""Soft labels on disk: the assistant's token distributions, stored so that a student trains without the assistant.

A folder of soft labels contains `meta.json` (the settings), `tokenizer/` (the tokenizer of the token ids) and
`labels-*.safetensors` (many posts each, memory-mapped when read).

Guarantees:

- Labels are found by a post's id and checked against its target's tokens: those of another target are never used.
- Files are written atomically: a killed run loses the posts since the last complete file, and continues after it.
- A folder has labels of one assistant, temperature and task only.
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
# Number of targets per file, which is the greatest number that a killed run computes again.
_TARGETS_PER_FILE = 256


class LabelLocation(NamedTuple):
    """Where the soft labels of a target are stored.

    Attributes:
        file: name of the file.
        start: first row in it.
        length: number of rows, one per token.
    """

    file: str
    start: int
    length: int


def assistant_fingerprint(name: str) -> str:
    """Return the fingerprint of an assistant: of its weights and of its adapter's, wherever they are stored.

    Args:
        name: folder or Hub id, as for `find_checkpoint`.
    """
    checkpoint = find_checkpoint(name)
    parts = [weights_fingerprint(part) for part in (checkpoint.model, checkpoint.adapter) if part is not None]
    return " + ".join(parts)


def task_fingerprint(task: ReasoningTask) -> str:
    """Return the fingerprint of a task: its name, and a checksum of everything that its prompts are made of.

    Args:
        task: the task.
    """
    return f"{task.name} {hashlib.sha256(repr(task).encode()).hexdigest()[:16]}"


class SoftLabelWriter:
    """Writes soft labels to a folder, and continues a run that was interrupted.

    Args:
        folder: the folder; created if it does not exist.
        settings: what the labels depend on besides the targets: `assistant`, `task`, `temperature`, `top_k`, `vocabulary`,
            ... JSON values.
        tokenizer: the tokenizer of the token ids; the training of a student needs it.
        rank: rank of this process among those that write to the folder.

    Attributes:
        folder: the folder.
        locations: per post id and task, where its labels are.

    Raises:
        BlockingIOError: if another run is writing to the folder.
        ValueError: naming the settings that differ, if the folder was written with other settings.

    Example:
        >>> import tempfile
        >>> writer = SoftLabelWriter(tempfile.mkdtemp(), {"top_k": 2, "vocabulary": 5})
        >>> labels = truncate(torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0]]), k=2, temperature=1.0)
        >>> writer.add("7", "label", torch.tensor([1]), labels)
        >>> writer.close()
        >>> writer.has("7", "label"), writer.has("7", "chain")
        (True, False)
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
        self.locations = _locations(self.folder)
        self._pending: list[tuple[str, str, torch.Tensor, SoftLabels]] = []

    def has(self, post_id: str, task: str) -> bool:
        """Return whether the labels of a post's target are stored.

        Args:
            post_id: the post's id.
            task: `"label"` or `"chain"`.
        """
        return (post_id, task) in self.locations

    def add(self, post_id: str, task: str, token_ids: torch.Tensor, labels: SoftLabels) -> None:
        """Add the labels of one target; they are written with those of other targets.

        Args:
            post_id: the post's id.
            task: `"label"` or `"chain"`.
            token_ids: the target's tokens, (N,).
            labels: the assistant's soft labels at these tokens.
        """
        self._pending.append((post_id, task, token_ids, labels))
        if len(self._pending) >= _TARGETS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the labels added so far, atomically."""
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
        self.locations |= {(post_id, task): LabelLocation(path.name, first, length) for post_id, task, first, length in entries}
        self._pending.clear()

    def close(self) -> None:
        """Write the remaining labels, and release the folder's lock."""
        self.flush()
        self._lock.close()


class SoftLabelCache:
    """Reads the soft labels that [`SoftLabelWriter`] wrote.

    Args:
        folder: the folder.

    Attributes:
        folder: the folder.
        settings: the settings that the labels were written with.
        locations: per post id and task, where its labels are.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no soft labels.
        ValueError: if the settings in the folder cannot be read.

    Example:
        >>> import tempfile
        >>> writer = SoftLabelWriter(tempfile.mkdtemp(), {"top_k": 2, "vocabulary": 5})
        >>> labels = truncate(torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0]]), k=2, temperature=1.0)
        >>> writer.add("7", "label", torch.tensor([1]), labels)
        >>> writer.close()
        >>> targets = Targets(
        ...     input_ids=torch.tensor([[1]]), mask=torch.tensor([[True]]), weights=torch.ones(1, 1), lengths=[1]
        ... )
        >>> SoftLabelCache(writer.folder).of_batch(["7"], {"label": targets})["label"]["ids"]
        tensor([[1, 3]], dtype=torch.int32)
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / _META).is_file():
            raise FileNotFoundError(
                f"`soft_labels` is {str(folder)!r}, which has no soft labels; write them with `dynkp distill cache`."
            )
        self.settings = _settings(self.folder)
        self.locations = _locations(self.folder)
        self._files: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # an open file cannot be sent to a data loader's worker

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the labels' token ids."""
        return AutoTokenizer.from_pretrained(self.folder / _TOKENIZER)

    def check(self, task: ReasoningTask, temperature: float, vocabulary: int, assistant: str | None = None) -> None:
        """Check that the labels are suitable for a training.

        Args:
            task: the task of the training.
            temperature: T of the training; probabilities are stored at T.
            vocabulary: number of token ids in the student's output.
            assistant: folder or Hub id of the assistant that must have written the labels; None for any assistant.

        Raises:
            ValueError: naming the settings that differ.
        """
        wanted: dict[str, Any] = {"task": task_fingerprint(task), "temperature": temperature}
        if assistant is not None:
            wanted["assistant"] = assistant_fingerprint(assistant)
        _compare(self.folder, {name: self.settings.get(name) for name in wanted}, wanted)
        if self.settings["vocabulary"] > vocabulary:
            raise ValueError(
                f"`soft_labels` {str(self.folder)!r} are distributions over {self.settings['vocabulary']} token ids, but the "
                f"student has {vocabulary}. Write them again with `dynkp distill cache --student`, which uses only the ids of "
                "both."
            )

    def check_posts(self, posts: Any) -> None:
        """Check that there are labels for all posts of a training set.

        Args:
            posts: a dataset with `id` and, for the response chain, `rationale`.

        Raises:
            ValueError: with the first ids without labels, and the remedy.
        """
        rationales = posts["rationale"] if "rationale" in posts.column_names else [None] * len(posts)
        missing = [
            (post_id, task)
            for post_id, rationale in zip(posts["id"], rationales, strict=True)
            for task in ("label", "chain")
            if (task == "label" or (rationale or "").strip()) and (post_id, task) not in self.locations
        ]
        if missing:
            raise ValueError(self._missing(missing))

    def of_batch(self, ids: Sequence[str], targets: Mapping[str, Targets]) -> dict[str, dict[str, Any]]:
        """Return the soft labels of a batch's targets.

        Args:
            ids: ids of the B posts.
            targets: per task the posts' targets, which may be cut at their end.

        Returns:
            Per task the fields of [`~dynkp.objectives.distillation.SoftLabels`], in the order of the targets' tokens. A task
            without tokens in this batch is omitted.

        Raises:
            ValueError: naming the post, if it has no labels, or those of another target.
        """
        batch = {}
        for task, of_task in targets.items():
            labels = [
                self._of_target(post_id, task, of_task["input_ids"][index, :length])
                for index, (post_id, length) in enumerate(zip(ids, of_task["lengths"], strict=True))
                if length
            ]
            if labels:
                parts = {name: torch.cat([part[name] for part in labels]) for name in ("ids", "log_probs", "rest")}
                batch[task] = {**parts, "vocabulary": self.settings["vocabulary"]}
        return batch

    def _of_target(self, post_id: str, task: str, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if (location := self.locations.get((post_id, task))) is None:
            raise ValueError(self._missing([(post_id, task)]))
        file = self._files.get(location.file)
        if file is None:
            file = self._files[location.file] = safe_open(self.folder / location.file, framework="pt")
        rows = slice(location.start, location.start + min(len(token_ids), location.length))
        if len(token_ids) > location.length or not torch.equal(file.get_slice("tokens")[rows], token_ids.int()):
            raise ValueError(
                f"post {post_id!r}: `soft_labels` {str(self.folder)!r} has the labels of another {task} target than the "
                "post's. Write the labels of these posts to another folder with `dynkp distill cache`."
            )
        return {name: file.get_slice(name)[rows] for name in ("ids", "log_probs", "rest")}

    def _missing(self, missing: Sequence[tuple[str, str]]) -> str:
        shown = ", ".join(f"{post_id!r} ({task})" for post_id, task in missing[:5])
        return (
            f"`soft_labels` {str(self.folder)!r} has no labels for {len(missing)} targets: {shown}. Run `dynkp distill cache` "
            "on these posts; it writes the missing labels only."
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
    """Compute and store the soft labels of posts; targets whose labels are stored already are skipped.

    Args:
        writer: writes the labels.
        assistant: the assistant, on its device.
        collator: collates posts with the assistant's own processor.
        posts: a dataset of posts of the collator's task.
        top_k: K, the number of likeliest tokens stored of each distribution.
        temperature: T.
        vocabulary: number of token ids that student and assistant share; None for all of the assistant's.
        batch_size: number of posts per batch.
        progress: whether to show a progress bar.

    Returns:
        The number of targets whose labels were written.
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
            inputs = collator([posts[todo[index]] for index in batch])
            targets = {task: inputs[task] for task in ("label", "chain")}
            for task, logits in assistant.logits(inputs["prompts"], targets).items():
                labels = truncate(logits[:, :vocabulary].float(), top_k, temperature)
                lengths = targets[task]["lengths"]
                parts = [part.split(lengths) for part in (labels.ids, labels.log_probs, labels.rest)]
                for index, (post_id, length) in enumerate(zip(inputs["id"], lengths, strict=True)):
                    if length and not writer.has(post_id, task):
                        token_ids = targets[task]["input_ids"][index, :length]
                        ids, log_probs, rest = (part[index] for part in parts)
                        writer.add(post_id, task, token_ids, SoftLabels(ids, log_probs, rest, labels.vocabulary))
                        written += 1
            bar.update(len(batch))
    writer.flush()
    return written


def truncated_probability(folder: str | os.PathLike[str]) -> dict[int, float]:
    """Return the assistant's probability outside its likeliest k tokens, as the mean over all tokens.

    Args:
        folder: a folder of soft labels.

    Returns:
        The probability, in [0, 1], for k = 1, 4, 16, ... and K.
    """
    sums: dict[int, float] = {}
    tokens = 0
    for path in sorted(Path(folder).glob("labels-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            rest = file.get_tensor("rest").double().exp()
            top = file.get_tensor("log_probs").double().exp()
        outside = top.sum(dim=1, keepdim=True) - top.cumsum(dim=1) + rest[:, None]  # of the likeliest 1, 2, ... tokens
        tokens += len(rest)
        for k in _truncations(top.shape[1]):
            sums[k] = sums.get(k, 0.0) + float(outside[:, k - 1].clamp(min=0).sum())
    return {k: total / tokens for k, total in sums.items()}


@torch.no_grad()
def truncation_effect(
    student: Assistant, assistant: Assistant, collator: TwoTaskCollator, posts: Any, *, top_k: int, temperature: float
) -> dict[int, float]:
    """Return the KL divergence of student and assistant with only k tokens, as a share of the full divergence.

    Args:
        student: the student, before its training.
        assistant: the assistant.
        collator: collates the posts.
        posts: posts of the collator's task.
        top_k: K.
        temperature: T.

    Returns:
        The share, over all targets of the posts, for k = 1, 4, 16, ... and K; empty if the full divergence is 0.
    """
    sums: dict[int, float] = {}
    whole = 0.0
    for post in posts:
        inputs = collator([post])
        targets = {task: inputs[task] for task in ("label", "chain")}
        ours, theirs = (model.logits(inputs["prompts"], targets) for model in (student, assistant))
        for task in ours:
            shared = min(ours[task].shape[1], theirs[task].shape[1])
            z_s, z_a = ours[task][:, :shared].float(), theirs[task][:, :shared].float()
            whole += float(soft_label_divergence(z_s, z_a, temperature).sum())
            for k in _truncations(min(top_k, shared)):
                labels = truncate(z_a, k, temperature)
                sums[k] = sums.get(k, 0.0) + float(soft_label_divergence(z_s, labels, temperature).sum())
    return {k: total / whole for k, total in sums.items()} if whole > 0 else {}


def _truncations(top_k: int) -> list[int]:
    """Return 1, 4, 16, ... and K."""
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
            "folder, or the settings that they were written with."
        )


def _locations(folder: Path) -> dict[tuple[str, str], LabelLocation]:
    return {(post_id, task): location for post_id, task, location in _entries(folder)}


def _entries(folder: Path) -> Iterator[tuple[str, str, LabelLocation]]:
    for path in sorted(folder.glob("labels-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            entries = json.loads(file.metadata()["entries"])
        for post_id, task, start, length in entries:
            yield post_id, task, LabelLocation(path.name, start, length)
