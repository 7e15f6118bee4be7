"""Checkpoints that a killed run leaves either whole or recognizable as incomplete, with the state of the method in them.

`trainer_state.json` is the last file of a checkpoint and marks it as complete; the method's own state (strides, statistics of
an adaptive γ) is part of it.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.training_args import TrainingArguments

logger = logging.getLogger(__name__)


class DurableCheckpoints(Trainer):
    """The part of a trainer that writes and reads checkpoints.

    A trainer with state of its own implements [`method_state`] and [`load_method_state`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(MethodState(self))

    def begin_training(self) -> None:
        """Prepare for a training run; called on every rank when training begins, afresh or from a checkpoint.

        The state of the checkpoint is loaded next. State of an earlier run must be cleared: `train` may be called twice.
        """

    def end_of_step(self) -> None:
        """Finish an optimizer step; called on every rank: the place to gather and update the method's statistics."""

    def method_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides weights, as JSON values; equal on every rank."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Args:
            state (`dict`): what [`method_state`] returned when the checkpoint was written; empty for a checkpoint that another
                trainer wrote.

        Raises:
            ValueError: if the method cannot continue from `state`.
        """

    def resume_at(self, step: int) -> None:
        """Prepare to continue at an optimizer step; called on every rank, after the state is loaded.

        Args:
            step (`int`): number of completed optimizer steps, at least 1.
        """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `transformers.Trainer.train` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder; `True` for the newest complete one in
                `output_dir`.
            *args: as in `transformers.Trainer.train`.
            **kwargs: as in `transformers.Trainer.train`.

        Raises:
            ValueError: if there is no complete checkpoint, or the method cannot continue from it.
            OSError: if a checkpoint could not be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save so that `trainer_state.json` exists in a checkpoint only if all of it does."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # an earlier run's, which is about to be overwritten
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # raised by Python, torch and safetensors
            free = shutil.disk_usage(self.args.output_dir).free / 1e9
            raise OSError(
                f"The checkpoint {str(folder)!r} could not be written ({free:.1f} GB free): {error}. Earlier checkpoints are "
                "untouched. Free some space (`save_total_limit` keeps fewer), then continue with resume_from_checkpoint=True."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The tokenizer's file would contain the padding of the last batch. A run that is started again with nothing left to do
        # would then save another model than before, for everyone who compares files (`weights_fingerprint`).
        processing_class = cast(Any, self.processing_class)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_padding()
            backend.no_truncation()
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # These are the last files of the other ranks; trainer_state.json is written next.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, whatever names the model's family publishes its parameters under.

        `save_pretrained` writes the published names; Trainer would load them as they are, find none of LLaVA's or Qwen2.5-VL's
        parameters, and continue with the weights of the beginning (huggingface/transformers#43701).
        """
        model = self.model if model is None else model
        saved_whole = Path(resume_from_checkpoint, "config.json").is_file()
        if is_peft_model(model) or not saved_whole:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model_class = cast(Any, type(model))
        saved, info = model_class.from_pretrained(resume_from_checkpoint, dtype=model.dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the checkpoint {resume_from_checkpoint!r} has no weights for {len(missing)} parameters of "
                f"{model_class.__name__} ({', '.join(missing[:3])}, ...). Resume with the model it was written with."
            )
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class MethodState(TrainerCallback):
    """Keeps the method's state in `trainer_state.json`, which Trainer writes last: a checkpoint has all of it or none.

    This is not an `ExportableState`: Trainer would build another one from what it saved, without the trainer.

    Args:
        trainer ([`DurableCheckpoints`]): the trainer whose method it is.
    """

    ENTRY = "dynkp"

    def __init__(self, trainer: DurableCheckpoints):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin the method's run, and continue from a checkpoint's state if there is one."""
        self.trainer.begin_training()
        if state.global_step:
            self.trainer.load_method_state(state.stateful_callbacks.get(self.ENTRY, {}))
            self.trainer.resume_at(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finish the method's optimizer step and put its state where the next checkpoint finds it."""
        self.trainer.end_of_step()
        state.stateful_callbacks[self.ENTRY] = self.trainer.method_state()


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """Find the newest checkpoint that was written completely; a killed run may have left an incomplete one.

    Args:
        output_dir (`str` or `Path`): the folder of a run.

    Returns:
        `str`: the folder of the checkpoint.

    Raises:
        ValueError: if there is none.
    """
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the last file to be written
        except (OSError, ValueError):
            logger.warning("%s is incomplete and passed over.", path)
        else:
            return str(path)
    raise ValueError(f"`output_dir` {str(output_dir)!r} holds no complete checkpoint to resume from. Start a new run.")
