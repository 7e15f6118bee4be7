"""The task that a model was trained with, saved beside the model and used by prediction and distillation.

Every save of a trainer (model, checkpoint, adapter) writes `dynkp_task.json`: the task with its prompt instruction, separator
and fields, the modality, the method, the strategy and the maximum length.

Guarantees: the task that is read equals the task that was written, even if a later version of the package changes the task of
that name; a request that contradicts the file is refused. A model that is prompted otherwise than in its training predicts
badly, and nothing else shows it: an AimKP model falls from F1@1 61.9 to 4.2 with Dynamic CoT's prompt.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import dynkp
from dynkp.data.choices import did_you_mean
from dynkp.data.reasoning_tasks import REASONING_TASKS, KeyphraseReasoningTask, ReasoningTask
from dynkp.data.tasks import TASKS, KeyphraseTask
from dynkp.files.json_files import read_json, write_json
from dynkp.models.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

FILE = "dynkp_task.json"
# The option of the commands that follow a saved task.
IGNORE = "--ignore-saved-task"
Modality = Literal["both", "text", "image"]
# The kinds of tasks, as the file names them.
_KINDS: dict[str, type[KeyphraseTask] | type[ReasoningTask]] = {
    "keyphrases": KeyphraseTask,
    "reasoning": ReasoningTask,
    "keyphrases with reasoning": KeyphraseReasoningTask,
}
# Fields of the file -> the options that set them, where the names differ.
_OPTIONS = {"name": "task"}


@dataclasses.dataclass(frozen=True)
class SavedTask:
    """The task of a trained model, and how it was trained.

    Args:
        task: the task, with its prompt and the format of its answers.
        modality: the part of the posts that the training used: `"both"`, `"text"` or `"image"`.
        method: the method's name for `dynkp train --method`; None if unknown.
        strategy: Dynamic CoT's strategy, such as `"dynamic"`; None for other methods.
        max_length: the longest prompt plus target in tokens; None for no limit.
        template_date: reserved for the date that is passed to a chat template which prints one; None so far.
        dynkp_version: the version of the package that saved it.
        found_in: the model or adapter that `find_saved_task` found it with, for messages; it is not written.
    """

    task: KeyphraseTask | ReasoningTask
    modality: Modality = "both"
    method: str | None = None
    strategy: str | None = None
    max_length: int | None = None
    template_date: str | None = None
    dynkp_version: str = dynkp.__version__
    found_in: str | None = dataclasses.field(default=None, compare=False)

    @property
    def taught_reasoning(self) -> bool:
        """Whether the training had reasoning among its targets; True if the method is not known."""
        return self.method not in ("aimkp", "direct") and self.strategy != "direct"

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the file into a model's folder."""
        write_json(Path(folder, FILE), self._content())

    def _content(self) -> dict[str, Any]:
        """The content of the file."""
        kind = next((kind for kind, cls in _KINDS.items() if type(self.task) is cls), "other")
        content = {**dataclasses.asdict(self), "task": {"kind": kind, **_fields(self.task)}}
        del content["found_in"]
        return content

    def check_writable(self) -> None:
        """Check that the task can be written as JSON, before a training that would fail at its first checkpoint.

        Raises:
            ValueError: naming the task's class and the fields that are no JSON values.
        """
        try:
            json.dumps(self._content())
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`task` {getattr(self.task, 'name', None)!r} of class {type(self.task).__name__} cannot be saved as JSON "
                f"({error}): give its fields values of JSON (text, numbers, lists, dicts)."
            ) from error

    def check_resumption(self, folder: str | os.PathLike[str]) -> None:
        """Check that a checkpoint was trained with this task: a run that continues must not change it.

        Args:
            folder: the checkpoint; one that was saved without its task, by an earlier version, is accepted.

        Raises:
            ValueError: if the task, the modality, the method or the strategy differ; or if the file is damaged. Another
                maximum length is no contradiction.
        """
        file = Path(folder, FILE)
        if not file.is_file():
            return
        before, now = read_json(file), json.loads(json.dumps(self._content()))
        try:
            saved = {**before.pop("task"), **before}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); restore it, or resume from another checkpoint") from error
        wanted = {**now.pop("task"), **now}
        settings = [name for name in wanted if name not in ("max_length", "template_date", "dynkp_version")]
        differing = [name for name in settings if name in saved and saved[name] != wanted[name]]
        if differing:
            # Of another task the name and the separator are enough; of a task of the same name the whole prompt counts.
            if "name" in differing:
                differing = [name for name in differing if name in ("name", "separator", "modality", "method", "strategy")]
            listed = ", ".join(f"{_OPTIONS.get(name, name)} {saved[name]!r}, not {wanted[name]!r}" for name in differing)
            raise ValueError(
                f"`resume_from_checkpoint` {str(folder)!r} was trained with {listed}: resume with the options of the "
                "checkpoint, or start a new run in another `output_dir`."
            )

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> SavedTask:
        """Read the file.

        Raises:
            ValueError: if it cannot be understood, or the task is of a class that is not the package's.
        """
        try:
            content = read_json(file)
            settings = dict(content.pop("task"))
            kind = settings.pop("kind")
            if kind == "other":
                raise ValueError(
                    f"{file}: task {settings.get('name')!r} is of a class of your own; predict in Python, with `task=`"
                )
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(_task(kind, settings), **{name: value for name, value in content.items() if name in known})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}); restore it, or delete it and name the task yourself") from error


def _fields(task: KeyphraseTask | ReasoningTask) -> dict[str, Any]:
    return dataclasses.asdict(task) if dataclasses.is_dataclass(task) else {"name": getattr(task, "name", None)}


def _task(kind: str, settings: dict[str, Any]) -> KeyphraseTask | ReasoningTask:
    if "labels" in settings:
        settings["labels"] = tuple(settings["labels"])
    if "keyphrase_task" in settings:
        settings["keyphrase_task"] = KeyphraseTask(**settings["keyphrase_task"])
    return _KINDS[kind](**settings)


def find_saved_task(checkpoint: Checkpoint) -> SavedTask | None:
    """Look for the task that a model was trained with.

    Args:
        checkpoint: the model; of an adapter on a base model, the adapter's task counts, and the base model's if it has none.

    Returns:
        The task, or None for a model that was saved without it, by an earlier version or another library.

    Raises:
        ValueError: as `SavedTask.read`.
        ConnectionError: if the Hub cannot be asked for the file of a model of its own, and the file was not downloaded
            before. The model may have been saved with a task, so the default would be a guess.
    """
    for place in (checkpoint.adapter, checkpoint.model):
        if place is None or os.path.isfile(place):
            continue
        if os.path.isdir(place):
            file: str | None = os.path.join(place, FILE)
        else:
            file = _from_hub(place)
        if file is not None and os.path.isfile(file):
            return dataclasses.replace(SavedTask.read(file), found_in=place)
    return None


def _from_hub(name: str) -> str | None:
    """The file of a model on the Hub; None if the model has none, as the Hub says now or said before."""
    try:
        return hf_hub_download(name, FILE)
    except Exception as error:  # whatever the HTTP client's own classes are
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if missing or _known_to_be_missing(name):
            return None
        raise ConnectionError(
            f"{name!r}: the Hub could not be asked for {FILE}, the task that the model was trained with "
            f"({type(error).__name__}); name the task with --task and add {IGNORE}, or try again with a connection."
        ) from error


def _known_to_be_missing(name: str) -> bool:
    try:
        return try_to_load_from_cache(name, FILE) is _CACHED_NO_EXIST
    except ValueError:  # not a Hub id
        return False


def task_to_use(
    saved: SavedTask | None,
    checkpoint: Checkpoint,
    name: str | None = None,
    separator: str | None = None,
    default: str = "dynamic_cot",
) -> KeyphraseTask | ReasoningTask:
    """Settle the task that a model is asked with: the one it was saved with.

    Args:
        saved: what `find_saved_task` returned; None to follow the request alone.
        checkpoint: the model, for messages.
        name: the task that was asked for, if any.
        separator: the separator that was asked for, if any.
        default: the task of a model that was saved without one, where none is asked for.

    Returns:
        The task.

    Raises:
        ValueError: if the request contradicts what is saved, or there is no task of that name.

    Example:
        >>> saved = SavedTask(TASKS["aimkp"])
        >>> task_to_use(saved, Checkpoint("out")).separator
        ', '
        >>> task_to_use(saved, Checkpoint("out"), name="dynamic_cot")
        Traceback (most recent call last):
        ValueError: 'out' was trained with task 'aimkp', not 'dynamic_cot': leave --task out, or add --ignore-saved-task
    """
    where = _where(saved, checkpoint)
    if saved is None:
        task = _resolve(default if name is None else name)
        if name is None:
            logger.info("%s has no %s, so task %r is taken; --task names another.", where, FILE, task.name)
    else:
        task = saved.task
        if name not in (None, task.name):
            _resolve(str(name))  # a name that there is not is that error, with a suggestion
            raise ValueError(f"{where!r} was trained with task {task.name!r}, not {name!r}: leave --task out, or add {IGNORE}")
        method = f" by {saved.method}" if saved.method else ""
        logger.info("%s was trained%s with task %r, whose prompt and answers are used.", where, method, task.name)
    if separator is None or not isinstance(task, KeyphraseTask) or separator == task.separator:
        return task
    if saved is not None:
        raise ValueError(
            f"{where!r} was trained with separator {task.separator!r}, not {separator!r}: leave it out, or add {IGNORE}"
        )
    return dataclasses.replace(task, separator=separator)


def check_mode(saved: SavedTask | None, checkpoint: Checkpoint, mode: str) -> None:
    """Refuse to make a model reason that was never trained to: all its outputs would be empty.

    Args:
        saved: what `find_saved_task` returned; None to follow the request alone.
        checkpoint: the model, for messages.
        mode: `"auto"`, `"think"` or `"direct"`.

    Raises:
        ValueError: for mode `"think"` and a model whose method and strategy have no reasoning.
    """
    if mode == "think" and saved is not None and not saved.taught_reasoning:
        strategy = f" with strategy {saved.strategy!r}" if saved.strategy else ""
        raise ValueError(
            f"{_where(saved, checkpoint)!r} was trained by {saved.method}{strategy}, without reasoning, so --mode "
            f"{mode!r} fails: leave --mode out, or add {IGNORE}"
        )


def modality_to_use(saved: SavedTask | None, checkpoint: Checkpoint, modality: Modality | None = None) -> Modality:
    """Settle what of a post a model is shown: what it was trained on, unless less is asked for.

    A model that was trained on both modalities may be asked with one of them, as in AimKP's Table 1. A model that was trained
    on one modality has never seen the other.

    Args:
        saved: what `find_saved_task` returned; None to follow the request alone.
        checkpoint: the model, for messages.
        modality: what was asked for, if anything.

    Returns:
        `"both"`, `"text"` or `"image"`.

    Raises:
        ValueError: if the request has a modality that the training had not.

    Example:
        >>> modality_to_use(SavedTask(TASKS["aimkp"], "text"), Checkpoint("out"))
        'text'
        >>> modality_to_use(SavedTask(TASKS["aimkp"]), Checkpoint("out"), "image")
        'image'
    """
    if saved is None:
        return modality or "both"
    if modality is not None and saved.modality not in ("both", modality):
        where = _where(saved, checkpoint)
        raise ValueError(
            f"{where!r} was trained on the posts' {saved.modality} alone, not on modality {modality!r}: leave --modality out, "
            f"or add {IGNORE}"
        )
    return modality or saved.modality


def _where(saved: SavedTask | None, checkpoint: Checkpoint) -> str:
    """The model or adapter that messages name: the one that the task was saved with."""
    return (saved.found_in if saved is not None else None) or checkpoint.adapter or checkpoint.model


def _resolve(name: str) -> KeyphraseTask | ReasoningTask:
    """A task of either kind by its name."""
    tasks: dict[str, KeyphraseTask | ReasoningTask] = {**TASKS, **REASONING_TASKS}
    if name not in tasks:
        raise ValueError(f"task={name!r} is not known: use one of {', '.join(tasks)}.{did_you_mean(name, tasks)}")
    return tasks[name]
