"""KeyphraseTrainer: what Dynamic CoT, AimKP and MulCoT-RD share, and the one seam to TRL's private names.

A method implements [`KeyphraseTrainer.compute_post_losses`]: one loss per post. Everything between that and an
optimizer step is here: posts become batches, the whole computation runs inside the wrapped model's forward (DDP and
DeepSpeed reduce only what passes through it), and the loss is normalised over all posts of the optimizer step, so that
batch size, gradient accumulation and ranks change nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object, is_peft_model, parse_flag_from_env
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.training_args import TrainingArguments
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from dynkp.batches.collators import PairedTargetCollator, SkippingCollator
from dynkp.batches.image_sizes import SizeCheck
from dynkp.data.tasks import KeyphraseTask, resolve_task
from dynkp.mechanics.gradient_order import gradients_in_order
from dynkp.mechanics.shared_prompt import (
    REENTRANT,
    PlainPrompt,
    Prompt,
    Scorer,
    SharedPrompt,
    causal_lm_of,
    score_targets,
    why_prompts_cannot_be_shared,
)
from dynkp.models.checkpoints import load_processor_by_name, pad_images_to_squares
from dynkp.models.saved_task import Modality, SavedTask
from dynkp.objectives.token_loss import PostLosses, TargetLoss
from dynkp.trainer.generative_evaluation import generative_metrics, keyphrases_of
from dynkp.trainer.keyphrase_config import KeyphraseConfig
from dynkp.trainer.preparation import fit_max_length, prepare_posts

logger = logging.getLogger(__name__)


class KeyphraseTrainer(SFTTrainer):
    """Base of the keyphrase trainers: `trl.SFTTrainer` on posts.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as in `SFTTrainer`.
        args ([`KeyphraseConfig`]): options.
        train_dataset, eval_dataset: datasets of posts (`id`, `text`, `keyphrases`, `image` or `images`, `rationale`), or of
            TRL's conversational prompt-completion rows (`prompt`, `completion`, optional `reasoning_completion`); streaming
            ones included.
        processing_class: processor or, for text models, tokenizer; loaded with the model's name if `None`.
        task ([`KeyphraseTask`], *optional*): template and separator; by default what `args.task` names.
        **kwargs: everything else `SFTTrainer` takes (`peft_config`, `callbacks`, `optimizers`, ...).

    Raises:
        InvalidPostsError: if posts cannot be trained on and `args.on_invalid` is `"error"`; it lists their ids.
        ValueError: if options or model do not fit together.
    """

    _name = "Keyphrase"
    _tag_names = ["dynkp"]
    # Losses are normalised here over the whole optimizer step; Trainer must not divide them again.
    loss_is_scaled_for_ga = True
    # What is saved with the model, for its predictions (dynkp.models.saved_task): the method, as `dynkp train --method` calls
    # it, and what of the posts the training shows.
    method = "direct"
    modality: Modality = "both"
    # Target kinds the method trains on; the collator builds no others.
    target_kinds: Sequence[str] = ("direct", "reasoning")

    args: KeyphraseConfig
    train_dataset: Dataset | IterableDataset
    eval_dataset: Any
    _tr_loss: torch.Tensor  # Trainer's, since the last log

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: KeyphraseConfig,
        train_dataset: Dataset | IterableDataset | Sequence[dict[str, Any]] | None = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        data_collator: Callable[..., Any] | None = None,
        task: KeyphraseTask | None = None,
        **kwargs: Any,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is None; give a dataset of posts.")
        refuse_sharded_weights(args)
        if processing_class is None:
            processing_class = load_processor(model, args)
        if args.pad_images_to_squares:
            pad_images_to_squares(processing_class)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.task = self.task_of(args, task)
        takes_images = isinstance(processing_class, ProcessorMixin)
        self._refuses_size = SizeCheck(processing_class) if takes_images else None
        train_dataset = self.prepare(train_dataset, "train", args, takes_images)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.prepare(dataset, name, args, takes_images) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.prepare(eval_dataset, "eval", args, takes_images)

        # Posts become tensors in the collator; TRL must neither tokenize nor drop their columns.
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self._forward_redirection = _ForwardRedirection()
        self._records: dict[str, dict[str, list[Any]]] = {"train": {}, "eval": {}}
        self._eval_prefix = "eval"
        self._stream_collator: SkippingCollator | None = None
        self._step_total = self._step_denominator = self._step_reported = 0.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator or _not_yet_built,
            **kwargs,
        )
        if data_collator is None:
            self.data_collator = self.build_collator()
            self.train_dataset = fit_max_length(self.train_dataset, "train", args, self.data_collator)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {
                    name: fit_max_length(posts, name, args, self.data_collator) for name, posts in self.eval_dataset.items()
                }
            else:
                self.eval_dataset = fit_max_length(self.eval_dataset, "eval", args, self.data_collator)
        lengths = self.args.length_column_name
        if self.args.train_sampling_strategy == "group_by_length" and lengths not in (self.train_dataset.column_names or ()):
            raise ValueError(
                f"`train_sampling_strategy` is 'group_by_length', but the posts have no column {lengths!r} "
                "(`length_column_name`), and become tokens in the collator only. Add the column "
                "(dynkp.batches.lengths.post_lengths) or use 'random'."
            )
        self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if self.args.freeze_vision_tower:
            freeze_vision_tower(self.model)
        self.shares_prompt = self._choose_prompt_backend()
        if (args.metric_for_best_model or "").endswith("composite"):
            logger.warning(
                "`metric_for_best_model` is 'composite' (F1@1 + F1@3 + MAP@5, AimKP's choice): F1@3 of convention 'aimkp' and "
                "its MAP@5 reward short lists, whatever their quality."
            )
        self.add_callback(MethodState(self))

    # What a method with tasks of its own gives in place of keyphrases

    def task_of(self, args: KeyphraseConfig, task: KeyphraseTask | None) -> KeyphraseTask:
        """The task that the options name, or the one given."""
        task = resolve_task(args.task) if task is None else task
        if args.separator is None or args.separator == task.separator:
            return task
        return KeyphraseTask(task.name, task.instruction, separator=args.separator)

    def prepare(self, dataset: Any, name: str, args: KeyphraseConfig, takes_images: bool) -> Dataset | IterableDataset:
        """The posts of a set that can be trained on, or an error that names the others."""
        return prepare_posts(dataset, name, args, takes_images, separator=self.task.separator, refuses=self._refuses_size)

    # What `build_collator` makes.
    collator_class: type[PairedTargetCollator] = PairedTargetCollator

    def build_collator(self) -> PairedTargetCollator:
        """The collator of this trainer's batches."""
        return self.collator_class(self.processing_class, **self.collator_options())

    def collator_options(self) -> dict[str, Any]:
        """What the collator is built with, beside the processor."""
        return {"task": self.task, "kinds": self.target_kinds, "max_length": self.args.max_length}

    # What a method implements

    def compute_post_losses(self, model: nn.Module, inputs: dict[str, Any]) -> PostLosses:
        """One loss per post of the micro-batch. `model` is the unwrapped model; call it as often as needed.

        Must make no collective call: ranks may differ in what they compute. This one is plain fine-tuning on direct targets.
        """
        return self.normalized(self.open_prompt(model, inputs["prompt"]).loss(inputs["direct"]))

    def normalized(self, loss: TargetLoss) -> PostLosses:
        """Weigh the posts' losses against each other, as the option `loss_normalization` says.

        Args:
            loss ([`~dynkp.objectives.token_loss.TargetLoss`]): parts of shape (B,).
        """
        return loss.normalized(over_tokens=self.normalizes_over_tokens)

    def begin_training(self) -> None:
        """Called on every rank when training begins, anew or from a checkpoint, whose state is loaded next.

        The place to start from nothing: `train` may be called twice.
        """

    def end_of_step(self) -> None:
        """Called on every rank after each optimizer step: the place to gather and move the method's statistics."""

    def method_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights (JSON); equal on every rank."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Continue from `state` when training resumes."""

    # From post losses to the optimizer step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the optimizer step's mean loss, times the number of ranks (DDP averages)."""
        unwrapped = self.accelerator.unwrap_model(model)
        losses = self._forward_redirection(model, unwrapped, self._post_losses_in_forward, unwrapped, inputs)
        total, denominator = (part.masked_fill(repeated_posts(inputs), 0.0) for part in losses)
        if num_items_in_batch is None:  # evaluation
            loss = total.sum() / denominator.sum().clamp(min=torch.finfo(denominator.dtype).tiny)
            # Trainer's own mean is over batches; this one replaces it in the log.
            self.record("loss", loss, denominator.sum())
        else:
            # A denominator that depends on the chosen targets is known now, or after the last of several micro-batches:
            # then `training_step` corrects the gradients.
            if self.chooses_denominators and self.args.gradient_accumulation_steps == 1:
                num_items_in_batch = self.accelerator.reduce(denominator.detach().sum(), "sum").clamp(min=1e-12)
            loss = total.sum() * self.accelerator.num_processes / num_items_in_batch
            self._step_total += total.detach().sum()
            self._step_denominator += denominator.detach().sum()
        return (loss, {}) if return_outputs else loss

    def _post_losses_in_forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        zero = gradients_in_order(model.parameters()) if torch.is_grad_enabled() else 0.0
        with self.accelerator.autocast():
            total, denominator = self.compute_post_losses(model, inputs)
        # Ranks may differ in what they compute; under ZeRO-2 their backward passes must not. A rank may also have nothing to
        # learn from (its posts only fill up the last batch), and must take part all the same.
        if self.is_deepspeed_enabled or not total.requires_grad:
            total = total + zero
        return total, denominator

    def get_train_dataloader(self) -> Any:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        stock: Any = self.data_collator
        self._stream_collator = self.data_collator = SkippingCollator(stock)  # type: ignore[assignment]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = stock

    def skip_stream(self, steps: int) -> None:
        """Spare a stream's posts of these optimizer steps, which Trainer reads again and discards, their collation."""
        if self._stream_collator is not None and not self.args.ignore_data_skip:
            self._stream_collator.skip_first(steps * self.args.gradient_accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """The optimizer step's micro-batches, and the weight of the posts in them on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._stream_collator is not None:
            self._stream_collator.skip_first(0)  # a pass to come is read in full
        if not batches:
            return batches, None
        self._mark_repeated_posts(last := batches[-1])
        total = sum(sum(self.denominators(batch)) for batch in batches)
        if "repeated" in last:
            total -= sum(compress(self.denominators(last), last["repeated"].tolist()))
        return batches, self.accelerator.gather(torch.tensor(total, device=device)).sum()

    def denominators(self, batch: dict[str, Any]) -> Sequence[float]:
        """What each post adds to the denominator of the step's mean: its number of tokens, or 1; also 1 while not known."""
        if self.normalizes_over_tokens and self.knows_targets:
            return batch["direct"]["lengths"]
        return [1] * len(batch["id"])

    @property
    def knows_targets(self) -> bool:
        """Whether what a post is taught is known before its loss."""
        return tuple(self.target_kinds) == ("direct",)

    def _mark_repeated_posts(self, batch: dict[str, Any]) -> None:
        """Mark the posts of an epoch's last batch that accelerate took from its first to give all ranks as many.

        They stand behind the others, the ranks' batches one after the other. A stream does not tell its length: there
        they count like any other post.
        """
        progress = self.accelerator.gradient_state
        if not progress.end_of_dataloader or progress.remainder <= 0:
            return
        slots = torch.arange(len(batch["id"])) + self.accelerator.process_index * len(batch["id"])
        repeated = slots >= progress.remainder
        batch["repeated"] = repeated.to(batch["has_rationale"].device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            self._step_reported += loss
            return loss
        if self.chooses_denominators and self.args.gradient_accumulation_steps > 1:
            loss = self._renormalize(loss, num_items_in_batch)
        self._step_total = self._step_denominator = self._step_reported = 0.0
        return loss

    @property
    def normalizes_over_tokens(self) -> bool:
        """Whether a post's weight is its number of target tokens rather than 1."""
        return self.args.loss_normalization == "token"

    @property
    def chooses_denominators(self) -> bool:
        """Whether posts' weights depend on their losses."""
        return self.normalizes_over_tokens and not self.knows_targets

    def _renormalize(self, loss: torch.Tensor, posts: torch.Tensor | int | None) -> torch.Tensor:
        """Turn the step's gradients from Σ total / posts into Σ total / Σ denominator, before they are clipped."""
        denominator = torch.as_tensor(self._step_denominator, device=loss.device)
        denominator = self.accelerator.reduce(denominator, "sum").clamp(min=1e-12)
        factor = posts / denominator
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        # Trainer adds up what the micro-batches report: the last one settles the account.
        return self._step_total * self.accelerator.num_processes / denominator - self._step_reported

    # Prompts

    def open_prompt(self, model: nn.Module, prompt: dict[str, Any], *candidates: torch.Tensor) -> Prompt:
        """Prepare the prompts of a batch for one target per post, or for several.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            prompt (`dict`): the batch's prompts.
            *candidates (`torch.Tensor` of shape `(B,)`): bool, one mask per kind of target: the posts for which a target of
                that kind may be computed. If several kinds have a post, the prompt is computed once and shared between them,
                where the model can; otherwise, and without masks, prompt and target go through the model together.
        """
        several = sum(bool(mask.any()) for mask in candidates) > 1
        backend = SharedPrompt if self.shares_prompt and several else PlainPrompt
        return backend(model, prompt, score=self._scorer(prompt["input_ids"].device))

    def _choose_prompt_backend(self) -> bool:
        if self.args.prompt_backend == "plain":
            return False
        # Trainer turns checkpointing on when training begins, so here the model does not show its kind yet.
        reentrant = self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        reason = REENTRANT if reentrant else why_prompts_cannot_be_shared(self.model)
        if reason is None:
            return True
        if self.args.prompt_backend == "shared":
            raise ValueError(f"`prompt_backend` is 'shared', but {type(self.model).__name__} cannot share a prompt: {reason}.")
        logger.warning("Prompts are computed once per target (prompt_backend='plain'): %s.", reason)
        return False

    def _scorer(self, device: torch.device) -> Scorer:
        # TRL's fused head scores only labelled positions, in tiles, on accelerators; on a CPU it would score padding too.
        return score_targets if device.type == "cpu" else fused_score_targets

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save so that `trainer_state.json` stands in a checkpoint only while the whole of it does."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # of an earlier run, which this one writes over
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors raise
            room = shutil.disk_usage(self.args.output_dir).free / 1e9
            raise OSError(
                f"The checkpoint {str(folder)!r} could not be written ({room:.1f} GB free): {error}. Earlier checkpoints are "
                "untouched. Make room (`save_total_limit` keeps fewer), then continue with resume_from_checkpoint=True."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Its file would say how the last batch was padded: a run that is started again, and has nothing left to do, would
        # save another model than the first time, for all who compare files (`weights_fingerprint`).
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_padding()
            backend.no_truncation()
        super()._save(output_dir, state_dict)
        strategy = getattr(self.args, "strategy", None)
        saved = SavedTask(self.task, self.modality, self.method, strategy, self.args.max_length)
        saved.write(output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last file of the other ranks; what follows is trainer_state.json.
        self.accelerator.wait_for_everyone()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Trainer takes the steps since the last log from its own rank, whose posts are a part of theirs.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights, whatever names the family publishes its parameters under.

        `save_pretrained` writes the published names; Trainer would load them as they are, find none of LLaVA's or
        Qwen2.5-VL's, and go on with the weights of the beginning (huggingface/transformers#43701).
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

    # Metrics

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        self._eval_prefix = metric_key_prefix  # "eval_NAME" for one of several evaluation sets
        self._records["eval"].clear()  # of a prediction, which logs nothing
        return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
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

    def generative_metrics(self, model: Any, processor: Any, posts: Any, **how: Any) -> dict[str, float]:
        """Generate for the posts and score; equal on every rank. `how`: as [`generative_metrics`] takes it."""
        train_keyphrases = keyphrases_of(self.train_dataset)
        convention = self.args.eval_convention
        return generative_metrics(
            model, processor, posts, task=self.task, train_keyphrases=train_keyphrases, convention=convention, **how
        )

    def record(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add `values` to the mean that is logged as `name`: over posts, micro-batches and ranks, weighted.

        Args:
            name: key in the log; evaluation adds `eval_`.
            values (`torch.Tensor`): one number per post, or any number of them.
            weights (`torch.Tensor`, *optional*): their weights; a boolean mask selects.
        """
        values = values.detach().to(torch.float64 if values.device.type == "cpu" else torch.float32)
        weights = torch.ones_like(values) if weights is None else weights.detach().to(values.dtype)
        values = values.masked_fill(weights == 0, 0.0)  # what does not count may be infinite
        mode = "train" if self.model.training else "eval"
        entry = self._records[mode].setdefault(name, [0.0, 0.0])
        entry[0] += (values * weights).sum()
        entry[1] += weights.sum()

    def gather_list(self, values: list[Any]) -> list[Any]:
        """The ranks' lists, one after the other. Collective: every rank must call it."""
        return gather_object(values) if self.accelerator.num_processes > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        local = [(name, float(total), float(weight)) for name, (total, weight) in self._records[mode].items()]
        self._records[mode].clear()
        sums: dict[str, list[float]] = {}
        for name, total, weight in self.gather_list(local):
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
        # A mean over nothing (no post was taught reasoning in this window) is left out, not logged as a zero.
        logs.update({f"{prefix}{name}": total / weight for name, (total, weight) in sums.items() if weight})
        self.derive_metrics(logs, prefix)
        super().log(logs, start_time)

    def derive_metrics(self, logs: dict[str, float], prefix: str) -> None:
        """Add metrics that follow from recorded ones."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        self._mark_repeated_posts(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate, 6 · parameters · tokens, over the tokens of the prompt and its targets."""
        tokens = inputs["prompt"]["input_ids"].numel()
        tokens += sum(inputs[kind]["input_ids"].numel() for kind in self.target_kinds if kind in inputs)
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)


def refuse_sharded_weights(args: TrainingArguments) -> None:
    """Say that a method cannot run where each rank holds a part of the weights only.

    Raises:
        ValueError: under FSDP and ZeRO-3.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        sharding = "FSDP"
    elif is_deepspeed_zero3_enabled():
        sharding = "ZeRO-3"
    else:
        return
    raise ValueError(
        f"The weights would be sharded over ranks ({sharding}), which fetch each layer's from one another whenever it runs. "
        "Ranks whose posts differ run it a different number of times (one target or two, with pictures or without) and would "
        "wait for each other for ever. Use ZeRO-2 (examples/accelerate/zero2.yaml), DDP, or LoRA."
    )


def repeated_posts(inputs: dict[str, Any]) -> torch.Tensor:
    """Posts that were already counted in this epoch and only fill up its last batch, (B,) bool."""
    repeated = inputs.get("repeated")
    return torch.zeros_like(inputs["has_rationale"]) if repeated is None else repeated


class MethodState(TrainerCallback):
    """Keeps a method's state in `trainer_state.json`, which Trainer writes last: a checkpoint has all of it or none.

    Not an `ExportableState`: Trainer would build another one from what it saved, without the trainer.
    """

    ENTRY = "dynkp"

    def __init__(self, trainer: KeyphraseTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin_training()
        if state.global_step:
            self.trainer.load_method_state(state.stateful_callbacks.get(self.ENTRY, {}))
            self.trainer.skip_stream(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.end_of_step()
        state.stateful_callbacks[self.ENTRY] = self.trainer.method_state()


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint that was written to its end; the newest of all may be what a killed run left.

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


def fused_score_targets(
    model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor
) -> torch.Tensor:
    """[`score_targets`] through TRL's fused LM head: no (B, T, vocabulary) tensor exists at any time."""
    length = target_ids.shape[1]
    causal_lm = causal_lm_of(model)
    labels = target_ids.new_full(inputs["input_ids"].shape, -100)
    labels[:, -length:] = target_ids.masked_fill(~target_mask, -100)
    outputs = causal_lm(**inputs, shift_labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -length:]


def freeze_vision_tower(model: Any) -> None:
    """Stop training of the vision tower, adapters on it included; the projector stays as it is.

    Qwen-VL keeps its projector ("merger") inside the tower; it is not part of what the papers freeze.
    """
    causal_lm = causal_lm_of(model)
    tower = causal_lm.get_encoder(modality="image")
    if tower is causal_lm or tower is causal_lm.base_model:
        return  # a text model
    for name, parameter in tower.named_parameters():
        if "merger" not in name:
            parameter.requires_grad_(False)


def load_processor(model: str | PreTrainedModel | nn.Module, args: KeyphraseConfig) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor that belongs to a model."""
    name: Any = model if isinstance(model, str) else cast(Any, model).config._name_or_path
    if not name:
        raise ValueError(
            "`processing_class` is None, and the model was not loaded by a name that its processor could be loaded by. Give "
            "the model's processor (for a text model, its tokenizer) as `processing_class`."
        )
    options = args.processor_kwargs or {}
    return load_processor_by_name(name, trust_remote_code=args.trust_remote_code, **cast(dict[str, Any], options))


def _not_yet_built(rows: list[dict[str, Any]]) -> dict[str, Any]:
    raise AssertionError("the collator is built once SFTTrainer has settled on the processing class")
