"""PostTrainer: what the trainers of Dynamic CoT, AimKP and MulCoT-RD share, and the only file that uses TRL's private names.

A method implements [`PostTrainer.compute_post_losses`]: one loss per post. This class does the rest of an optimizer step. Posts
become batches; the whole computation runs inside the wrapped model's forward, because DDP and DeepSpeed reduce only what passes
through it; and the loss is normalized over all posts of the optimizer step, so that batch size, gradient accumulation and the
number of ranks do not change it.

Its parts have files of their own: [`~dynkp.trainer.durable_checkpoints.DurableCheckpoints`],
[`~dynkp.trainer.recorded_metrics.RecordedMetrics`], [`~dynkp.trainer.generative_evaluation.GenerativeEvaluation`] and
[`~dynkp.trainer.post_streams.PostStreams`].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from dynkp.batches.collators import PairedTargetCollator
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
from dynkp.models.checkpoints import pad_images_to_squares
from dynkp.models.saved_task import Modality, SavedTask
from dynkp.objectives.token_loss import PostLosses, TargetLoss
from dynkp.trainer.durable_checkpoints import DurableCheckpoints
from dynkp.trainer.generative_evaluation import GenerativeEvaluation
from dynkp.trainer.model_setup import freeze_vision_tower, processor_of_model, refuse_sharded_weights
from dynkp.trainer.post_config import PostConfig
from dynkp.trainer.post_streams import PostStreams, repeated_posts
from dynkp.trainer.preparation import fit_max_length, prepare_posts

logger = logging.getLogger(__name__)


class PostTrainer(DurableCheckpoints, GenerativeEvaluation, PostStreams, SFTTrainer):
    """Base of the trainers: `trl.SFTTrainer` on posts. By itself it is plain fine-tuning on direct targets.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as in `SFTTrainer`.
        args ([`~dynkp.trainer.post_config.PostConfig`]): options.
        train_dataset (`Dataset`, `IterableDataset` or a list of rows): posts (`id`, `text`, `keyphrases`, `image` or `images`,
            `rationale`), or rows in TRL's conversational prompt-completion format (`prompt`, `completion`, optionally
            `reasoning_completion`).
        eval_dataset (as `train_dataset`, or a `dict` of such, *optional*): posts for evaluation.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`], *optional*): the
            model's processor or, for text models, its tokenizer; loaded with the model's name by default.
        data_collator (`Callable`, *optional*): makes batches of posts; by default what [`build_collator`] returns.
        task ([`~dynkp.data.tasks.KeyphraseTask`], *optional*): prompt, targets and separator; by default the one that
            `args.task` names.
        **kwargs: everything else that `SFTTrainer` takes (`peft_config`, `callbacks`, `optimizers`, ...).

    Raises:
        InvalidPostsError: if posts cannot be trained on and `args.on_invalid` is `"error"`; it lists their ids.
        ValueError: if options, model and posts do not fit together.
    """

    _name = "Keyphrase"
    _tag_names = ["dynkp"]
    # Losses are normalized here over the whole optimizer step; Trainer must not divide them again.
    loss_is_scaled_for_ga = True
    # Saved with the model, for its predictions (dynkp.models.saved_task): the method, as `dynkp train --method` calls it, and
    # which modalities of the posts are trained on.
    method = "direct"
    modality: Modality = "both"
    # Kinds of targets the method trains on; the collator builds no others.
    target_kinds: Sequence[str] = ("direct", "reasoning")
    # What `build_collator` returns an instance of.
    collator_class: type[PairedTargetCollator] = PairedTargetCollator

    args: PostConfig
    train_dataset: Dataset | IterableDataset
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: PostConfig,
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
            processing_class = processor_of_model(model, args)
        if args.pad_images_to_squares:
            pad_images_to_squares(processing_class)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.task = self.task_of(args, task)
        SavedTask(self.task).check_writable()
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

    # What a method implements

    def compute_post_losses(self, model: nn.Module, inputs: Any) -> PostLosses:
        """Compute one loss per post: here that of the direct target, NLL(y^s | x).

        An implementation must make no collective call, because ranks may differ in what they compute.

        Args:
            model (`torch.nn.Module`): the unwrapped model; it may be called as often as needed.
            inputs (`dict`): a batch of B posts.

        Returns:
            [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).
        """
        return self.normalized(self.open_prompt(model, inputs["prompt"]).loss(inputs["direct"]))

    def task_of(self, args: PostConfig, task: KeyphraseTask | None) -> KeyphraseTask:
        """Return the task to train.

        Args:
            args ([`~dynkp.trainer.post_config.PostConfig`]): options `task` and `separator`.
            task ([`~dynkp.data.tasks.KeyphraseTask`], *optional*): the task given to the trainer, which takes precedence.
        """
        task = resolve_task(args.task) if task is None else task
        if args.separator is None or args.separator == task.separator:
            return task
        return KeyphraseTask(task.name, task.instruction, separator=args.separator)

    def prepare(self, dataset: Any, name: str, args: PostConfig, takes_images: bool) -> Dataset | IterableDataset:
        """Validate a set of posts.

        Args:
            dataset (`Dataset`, `IterableDataset` or a list of rows): the posts.
            name (`str`): name of the set, for messages and files.
            args ([`~dynkp.trainer.post_config.PostConfig`]): options.
            takes_images (`bool`): whether the model has a vision tower.

        Returns:
            `Dataset` or `IterableDataset`: the posts that can be trained on.

        Raises:
            InvalidPostsError: if there are others and `args.on_invalid` is `"error"`.
        """
        return prepare_posts(dataset, name, args, takes_images, separator=self.task.separator, refuses=self._refuses_size)

    def build_collator(self) -> PairedTargetCollator:
        """Return the collator of this trainer's batches."""
        return self.collator_class(self.processing_class, **self.collator_options())

    def collator_options(self) -> dict[str, Any]:
        """Return what the collator is built with, besides the processor."""
        return {
            "task": self.task,
            "kinds": self.target_kinds,
            "max_length": self.args.max_length,
            "trailing_template_tokens": self.args.trailing_template_tokens,
        }

    # From the posts' losses to the optimizer step

    @property
    def normalizes_over_tokens(self) -> bool:
        """Whether a post adds its number of target tokens to the step's denominator, rather than 1."""
        return self.args.loss_normalization == "token"

    @property
    def knows_targets(self) -> bool:
        """Whether the target of each post is known before its loss."""
        return tuple(self.target_kinds) == ("direct",)

    @property
    def chooses_denominators(self) -> bool:
        """Whether what posts add to the step's denominator depends on their losses."""
        return self.normalizes_over_tokens and not self.knows_targets

    def normalized(self, loss: TargetLoss) -> PostLosses:
        """Weigh the posts against each other, as the option `loss_normalization` says.

        Args:
            loss ([`~dynkp.objectives.token_loss.TargetLoss`]): parts of shape (B,).
        """
        return loss.normalized(over_tokens=self.normalizes_over_tokens)

    def denominators(self, batch: Any) -> Sequence[float]:
        """Return what each post adds to the denominator of the step's mean, as far as it is known before the losses.

        Args:
            batch (`dict`): a batch of B posts.

        Returns:
            `Sequence[float]`: B numbers of target tokens, or ones; also ones where the targets are not known yet.
        """
        if self.normalizes_over_tokens and self.knows_targets:
            return batch["direct"]["lengths"]
        return [1] * len(batch["id"])

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the micro-batches of an optimizer step, and the denominator of its mean over the posts of all ranks.

        Args:
            epoch_iterator (`Iterator`): the epoch's batches.
            num_batches (`int`): number of micro-batches in an optimizer step.
            device (`torch.device`): the training device.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        total = sum(sum(self.denominators(batch)) for batch in batches)
        if "repeated" in (last := batches[-1]):
            total -= sum(compress(self.denominators(last), last["repeated"].tolist()))
        return batches, self.accelerator.gather(torch.tensor(total, device=device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute a micro-batch's part of the optimizer step's mean loss, times the number of ranks, since DDP averages.

        Args:
            model (`torch.nn.Module`): the wrapped model.
            inputs (`dict`): a batch of B posts.
            return_outputs (`bool`, *optional*, defaults to `False`): return a pair of loss and empty outputs.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): the step's denominator; `None` in evaluation, where the
                loss is the batch's mean.

        Returns:
            `torch.Tensor`: scalar, nats; or the pair.
        """
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

    def _post_losses_in_forward(self, model: nn.Module, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        zero = gradients_in_order(model.parameters()) if torch.is_grad_enabled() else 0.0
        with self.accelerator.autocast():
            total, denominator = self.compute_post_losses(model, inputs)
        # Ranks may differ in what they compute; under ZeRO-2 their backward passes must not. A rank whose posts only fill up
        # the last batch trains on nothing, and must take part all the same.
        if self.is_deepspeed_enabled or not total.requires_grad:
            total = total + zero
        return total, denominator

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a micro-batch forward and backward; after the last of an optimizer step, correct the step's denominator.

        Args:
            model (`torch.nn.Module`): the wrapped model.
            inputs (`dict`): a batch of B posts.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): the step's denominator, as far as it is known.

        Returns:
            `torch.Tensor`: the loss that Trainer adds up, a scalar without graph.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            self._step_reported += loss
            return loss
        if self.chooses_denominators and self.args.gradient_accumulation_steps > 1:
            loss = self._renormalize(loss, num_items_in_batch)
        self._step_total = self._step_denominator = self._step_reported = 0.0
        return loss

    def _renormalize(self, loss: torch.Tensor, posts: torch.Tensor | int | None) -> torch.Tensor:
        """Turn the step's gradients from Σ total / posts into Σ total / Σ denominator, before they are clipped."""
        denominator = torch.as_tensor(self._step_denominator, device=loss.device)
        denominator = self.accelerator.reduce(denominator, "sum").clamp(min=1e-12)
        factor = posts / denominator
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        # Trainer adds up the micro-batches' losses: with this one, the sum is the step's loss.
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

    # Checkpoints and evaluation

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.saved_task().write(output_dir or self.args.output_dir)
        # transformers pushes a checkpoint to the Hub from `output_dir`, to which it copies only files that it knows.
        if output_dir is not None and Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self.saved_task().write(self.args.output_dir)

    def saved_task(self) -> SavedTask:
        """Return what is saved beside the model about its task, so that predictions use the same prompts and targets."""
        strategy = getattr(self.args, "strategy", None)
        return SavedTask(self.task, self.modality, self.method, strategy, self.args.max_length)

    def check_checkpoint(self, folder: str) -> None:
        """Check that a checkpoint was trained with this trainer's task, modality, method and strategy.

        Args:
            folder (`str`): the checkpoint.

        Raises:
            ValueError: if it was not; the message names what differs.
        """
        super().check_checkpoint(folder)
        self.saved_task().check_resumption(folder)

    def resume_at(self, step: int) -> None:
        """Continue at an optimizer step: the posts of a stream that were trained on are not collated again."""
        super().resume_at(step)
        self.skip_stream(step)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Compute the loss of a batch in evaluation.

        Args:
            model (`torch.nn.Module`): the wrapped model.
            inputs (`dict`): a batch of B posts.
            prediction_loss_only (`bool`): not used: only the loss is computed.
            ignore_keys (`list[str]`, *optional*): not used.

        Returns:
            `tuple[torch.Tensor, None, None]`: the loss, a scalar; neither logits nor labels.
        """
        inputs = self._prepare_inputs(inputs)
        self.mark_repeated_posts(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: Any) -> int:
        """Estimate the floating-point operations of a batch: 6 · parameters · tokens of the prompts and their targets.

        Args:
            inputs (`dict`): a batch of B posts.
        """
        tokens = inputs["prompt"]["input_ids"].numel()
        tokens += sum(inputs[kind]["input_ids"].numel() for kind in self.target_kinds if kind in inputs)
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)


KeyphraseTrainer = PostTrainer
"""The name of [`PostTrainer`] in earlier versions, before it trained on sentiment too."""


def fused_score_targets(
    model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor
) -> torch.Tensor:
    """Score targets as [`~dynkp.mechanics.shared_prompt.score_targets`] does, through TRL's fused LM head.

    No tensor of shape (B, T, vocabulary) exists at any time.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one, that an `SFTTrainer` has prepared.
        inputs (`dict`): model inputs with at least T columns.
        target_ids (`torch.Tensor` of shape `(B, T)`): next token of each of the last T positions.
        target_mask (`torch.Tensor` of shape `(B, T)`): bool, False where there is no target.

    Returns:
        `torch.Tensor` of shape `(B, T)`: nats, zero where the mask is False.
    """
    length = target_ids.shape[1]
    causal_lm = causal_lm_of(model)
    labels = target_ids.new_full(inputs["input_ids"].shape, -100)
    labels[:, -length:] = target_ids.masked_fill(~target_mask, -100)
    outputs = causal_lm(**inputs, shift_labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -length:]


def _not_yet_built(rows: list[dict[str, Any]]) -> dict[str, Any]:
    raise AssertionError("the collator is built once SFTTrainer has settled on the processing class")
