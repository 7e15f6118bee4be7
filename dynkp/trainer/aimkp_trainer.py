"""AimKP: train on masked variants of the posts too, as long as their gradients agree with those of the full inputs.

"AimKP", AAAI 2026: progressive modality masking (Eq. 2), gradient-based filtering (Eq. 3), training objective (Eq. 4).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn

from dynkp.batches.masking_collator import MaskingCollator, SinglePostsCollator
from dynkp.batches.targets import Targets
from dynkp.batches.typed_batches import MaskedViewBatch, PostBatch, SinglePostsBatch
from dynkp.mechanics.gradient_similarity import why_gradients_cannot_be_batched
from dynkp.mechanics.masked_views import FULL, BatchedViews, MaskedViews, Masking, PlainViews
from dynkp.mechanics.stride_schedule import StrideSchedule
from dynkp.objectives.filtering import filtered_loss, keep_variants
from dynkp.objectives.token_loss import PostLosses
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.model_setup import projector_parameters, set_learning_rate
from dynkp.trainer.post_streams import repeated_posts
from dynkp.trainer.post_trainer import PostTrainer
from dynkp.trainer.stopwatch import Stopwatch
from dynkp.trainer.visit_log import VisitLog

logger = logging.getLogger(__name__)


class AimKPTrainer(PostTrainer):
    r"""AimKP: auxiliary losses with text or images masked, kept if their gradients agree with those of the full inputs.

    Per post, g_0, g_t and g_v are the gradients of the target's loss given the full input, its text masked, and its images
    masked with the post's own strides (Eq. 2), over all trainable parameters. The variants with c_m > τ_m are kept:

    $$c_m = \cos(g_0, g_m), \qquad g = \frac{g_0 + \sum_{m: c_m > \tau_m} g_m}{1 + |\{m: c_m > \tau_m\}|}$$

    (Eq. 3 and 4; the paper's equation has no denominator, the authors' code has: option `variant_reduction`). A variant that
    was kept is masked with twice the stride in the next epoch, another with half of it. The first epoch masks nothing and
    costs as much as plain fine-tuning. A post without text or without images does not have that variant. Departures from the
    authors' code, with equal results: any batch size, one backward pass per variant for the whole batch, masked tokens dropped
    rather than masked.

    Logged per window and modality: `MODALITY_cosine` (mean c_m), `MODALITY_kept_share`, `MODALITY_loss` (nats per token; also
    `full_loss`), `MODALITY_stride_S` (share of the posts visited so far whose next stride is S); `step_cost` (device time of a
    step over that of its plain part).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as for
            [`~dynkp.trainer.post_trainer.PostTrainer`].
        args ([`~dynkp.trainer.aimkp_config.AimKPConfig`]): options.
        **kwargs: as for [`~dynkp.trainer.post_trainer.PostTrainer`]. Training posts must have ids of their own and must not be
            a stream, because strides belong to posts.

    Raises:
        ValueError: for float16, ZeRO-3, FSDP, streams, posts without ids of their own, and models whose tokens cannot be masked
            as the options say.

    Example:
    ```python
    trainer = AimKPTrainer(
        model="llava-hf/llava-1.5-7b-hf",
        args=AimKPConfig(output_dir="out", per_device_train_batch_size=16),
        train_dataset=load_posts("train.jsonl", image_dir="images"),
        peft_config=LoraConfig(r=128, lora_alpha=256, modules_to_save=["multi_modal_projector"]),
    )
    trainer.train()
    ```
    """

    _name = "AimKP"
    method = "aimkp"
    target_kinds: Sequence[str] = ("direct",)
    collator_class = MaskingCollator
    args: AimKPConfig

    def __init__(self, model: Any, args: AimKPConfig, **kwargs: Any):
        self.visit_log = VisitLog(Path(args.output_dir, "visits.jsonl")) if args.log_visits else None
        self._masked_visits: list[dict[str, Any]] = []  # of the current optimizer step
        self._announced: set[str] = set()
        refuse_generated_ids(kwargs.get("train_dataset"))
        super().__init__(model, args, **kwargs)
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                "`train_dataset` is a stream, but AimKP keeps a stride for every post and must know them beforehand. Load the "
                "posts (streaming=False); their images stay on disk."
            )
        if not isinstance(self.data_collator, MaskingCollator):
            raise ValueError(
                f"`data_collator` is a {type(self.data_collator).__name__}, which does not locate text and images. "
                "Leave it out, or give a subclass of dynkp.batches.masking_collator.MaskingCollator."
            )
        if "image" in args.modalities and getattr(self.model.config.get_text_config(), "cross_attention_layers", None):
            raise ValueError(
                "`mask_image` is True, but this model reads images by cross-attention: they have no tokens to mask. Set "
                "mask_image=False."
            )
        if "text" in args.modalities and "prompt" in self.train_dataset.column_names:
            raise ValueError(
                "`mask_text` is True, but the posts have prompts of their own, in which text and instruction cannot be "
                "distinguished. Give the columns `text`, `keyphrases` and `images`, or set mask_text=False."
            )
        self.schedule = self.new_schedule()
        self.batches_similarity = self._choose_similarity_backend()
        if not self.batches_similarity:
            with_single_posts: Any = SinglePostsCollator(self.data_collator)
            self.data_collator = with_single_posts
        self.stopwatch = Stopwatch(self.args.device)

    def new_schedule(self) -> StrideSchedule:
        """Return the stride schedule of posts that have not been visited."""
        return StrideSchedule(
            self.train_dataset["id"],
            schedule=self.args.stride_schedule,
            initial_stride=self.args.initial_stride,
            warmup_epochs=self.args.warmup_epochs,
            freeze_failed=self.args.freeze_failed_strides,
        )

    def collator_options(self) -> dict[str, Any]:
        """Return the options that the collator is built with."""
        return {**super().collator_options(), "modalities": self.args.modalities}

    def compute_post_losses(self, model: nn.Module, inputs: PostBatch) -> PostLosses:
        """Compute the filtered loss of each post (Eq. 2 to 4), or the plain one in evaluation and warm-up epochs.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            inputs (`dict`): a batch of B posts.

        Returns:
            [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).
        """
        if not (self.model.training and self.masks_this_epoch):
            return super().compute_post_losses(model, inputs)
        strides = self.strides_of(inputs)  # s_t and s_v of each post
        views = self.open_views(model, inputs, strides)  # full input, text masked, image masked: Eq. 2
        targets = self.choose_targets(views, inputs)

        for view in self.stopwatch.laps(views):
            views.backward(view, targets, self.normalizes_over_tokens)  # g_0, g_t, g_v of each post
        cosines = views.cosines()  # c_m = cos(g_0, g_m), Eq. 3
        kept = keep_variants(cosines, self.args.thresholds)  # c_m > τ_m
        self.record_visits(inputs, strides, views, targets, cosines, kept)

        full, variants = views.losses()  # ℓ_0 and ℓ_m, with the gradients from above
        total = filtered_loss(full, variants, kept, self.args.variant_reduction)  # Eq. 4
        return PostLosses(total, self.denominator_of(targets).to(total))

    @property
    def current_epoch(self) -> int:
        """Number of completed epochs."""
        return int(self.state.epoch or 0)

    @property
    def masks_this_epoch(self) -> bool:
        """Whether there are masked variants in the current epoch."""
        return bool(self.args.modalities) and self.schedule.masks(self.current_epoch)

    def strides_of(self, inputs: PostBatch) -> dict[str, list[int]]:
        """Return the strides of a batch's posts in the current epoch, per masked modality."""
        return {name: self.schedule.strides(inputs["id"], name, self.current_epoch) for name in self.args.modalities}

    def open_views(self, model: nn.Module, inputs: PostBatch, strides: dict[str, list[int]]) -> MaskedViews:
        """Prepare the full inputs of a batch and their masked variants (Eq. 2, or an ablation of it).

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            inputs (`dict`): a batch of B posts.
            strides (`dict[str, list[int]]`): per masked modality, B strides.
        """
        masking = Masking(self.args.mask_pattern, visit=self.current_epoch, seed=self.args.seed)
        score = self._scorer(inputs["prompt"]["input_ids"].device)
        if not self.batches_similarity:
            return PlainViews(model, cast(SinglePostsBatch, inputs), strides, masking, score=score)
        longest = max(*inputs["direct"]["lengths"], *inputs["reasoning"]["lengths"])
        views = BatchedViews(
            model,
            cast(MaskedViewBatch, inputs),
            strides,
            masking,
            longest_target=longest,
            shares_prefix=self.shares_prompt,
            score=score,
        )
        if views.why_masked:
            self._announce(f"Masked tokens are masked, not left out, which costs more: {views.why_masked}.")
        return views

    def choose_targets(self, views: MaskedViews, inputs: PostBatch) -> Targets:
        """Return the targets whose losses are computed given every view: the keyphrases.

        Args:
            views ([`~dynkp.mechanics.masked_views.MaskedViews`]): views of the batch, not yet run.
            inputs (`dict`): the batch.
        """
        return inputs["direct"]

    def denominator_of(self, targets: Targets) -> torch.Tensor:
        """Return what each post adds to the denominator of the step's mean, (B,)."""
        tokens = targets["weights"].sum(dim=1)
        return tokens if self.normalizes_over_tokens else torch.ones_like(tokens)

    # Strides and logs

    def record_visits(
        self,
        inputs: PostBatch,
        strides: dict[str, list[int]],
        views: MaskedViews,
        targets: Targets,
        cosines: torch.Tensor,
        kept: torch.Tensor,
    ) -> None:
        """Record the visits of a batch for the log, for the file of visits, and for the strides.

        The strides change at the end of the optimizer step, when all ranks know all visits.

        Args:
            inputs (`dict`): the batch.
            strides (`dict[str, list[int]]`): per masked modality, B strides.
            views ([`~dynkp.mechanics.masked_views.MaskedViews`]): the views, all of which have run.
            targets ([`~dynkp.batches.targets.Targets`]): the targets they ran with.
            cosines (`torch.Tensor` of shape `(B, M)`): c_m; NaN where a post does not have the variant.
            kept (`torch.Tensor` of shape `(B, M)`): bool, the variants that are trained on.
        """
        counted = ~repeated_posts(inputs)
        denominator = self.denominator_of(targets).clamp(min=1e-12)
        losses = {view: values / denominator for view, values in views.gradients.values.items()}  # nats per token
        self.record("full_loss", losses[FULL], counted)
        for (name, of_posts), cosine, passed in zip(strides.items(), cosines.T, kept.T, strict=True):
            exists = counted & ~cosine.isnan()
            self.record(f"{name}_cosine", cosine, exists)
            self.record(f"{name}_kept_share", passed.float(), exists)
            self.record(f"{name}_loss", losses[name], exists)
            columns = {
                "id": inputs["id"],
                "modality": [name] * len(of_posts),
                "stride": of_posts,
                "cosine": cosine.tolist(),
                "kept": passed.tolist(),
                "full_loss": losses[FULL].tolist(),
                "masked_loss": losses[name].tolist(),
            }
            visits = (dict(zip(columns, visit, strict=True)) for visit in zip(*columns.values(), strict=True))
            self._masked_visits.extend(compress(visits, exists.tolist()))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a training step and, where it masks, time it."""
        if not self.masks_this_epoch:
            return super().training_step(*args, **kwargs)
        self.stopwatch.start()
        loss = super().training_step(*args, **kwargs)
        self.stopwatch.mark("step")
        return loss

    def begin_training(self) -> None:
        """Start with new strides and a new file of visits."""
        super().begin_training()
        self.schedule = self.new_schedule()
        self._masked_visits.clear()
        if self.visit_log and self.accelerator.is_main_process:
            self.visit_log.begin(self.state.global_step)

    def end_of_step(self) -> None:
        """Change the strides by the visits of all ranks, and write the visits to the file."""
        super().end_of_step()
        epoch = math.ceil(self.state.epoch or 0) - 1  # of the visits: `state.epoch` is now that of the step's end
        visits = self.gather_list(self._masked_visits) if self.schedule.masks(epoch) else []
        for visit in visits:
            self.schedule.record(visit["id"], visit["modality"], visit["kept"], epoch)
        if visits and self.visit_log and self.accelerator.is_main_process:
            self.visit_log.write(visits, self.state)
        self._masked_visits.clear()

    def derive_metrics(self, logs: dict[str, float], prefix: str) -> None:
        """Add the distribution of strides and the cost of the steps to the log of training.

        Args:
            logs (`dict`): what is about to be logged; changed in place.
            prefix (`str`): prefix of the names in `logs`; empty in training.
        """
        super().derive_metrics(logs, prefix)
        if prefix:
            return
        for name in self.args.modalities:
            logs.update({f"{name}_stride_{stride}": share for stride, share in self.schedule.shares(name).items()})
        if times := self.stopwatch.take():
            logs["step_cost"] = times["step"] / times[FULL]

    def method_state(self) -> dict[str, Any]:
        """Return the strides, for checkpoints."""
        return {**super().method_state(), "strides": self.schedule.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Continue with the strides of a checkpoint.

        Args:
            state (`dict`): what [`method_state`] returned when the checkpoint was written.

        Raises:
            ValueError: if the checkpoint has no strides, or those of other posts.
        """
        if "strides" not in state:
            raise ValueError("the checkpoint has no strides: it was not written by AimKPTrainer. Start a new run.")
        super().load_method_state(state)
        self.schedule.load_state(state["strides"])

    # Set-up

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, with the projector's own learning rate if there is one.

        Args:
            *args: as in `transformers.Trainer.create_optimizer`.
            **kwargs: as in `transformers.Trainer.create_optimizer`.

        Raises:
            ValueError: if `projector_learning_rate` is set and no projector is trained.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.projector_learning_rate is not None:
            set_learning_rate(optimizer, projector_parameters(self.model), self.args.projector_learning_rate)
        return optimizer

    def _choose_similarity_backend(self) -> bool:
        if self.args.similarity_backend == "plain":
            return False
        reason = why_gradients_cannot_be_batched(self.model)
        if reason is None:
            return True
        if self.args.similarity_backend == "batched":
            raise ValueError(
                f"`similarity_backend` is 'batched', but gradients of single posts cannot be computed in one batch: {reason}. "
                "Use 'plain', or do not train these parameters."
            )
        self._announce(f"Gradients are computed one post at a time (similarity_backend='plain'): {reason}.")
        return False

    def _announce(self, message: str) -> None:
        if message not in self._announced:
            self._announced.add(message)
            logger.warning(message)


def refuse_generated_ids(posts: Any) -> None:
    """Refuse posts that would get their row number as id.

    Args:
        posts (`Dataset` or a list of rows): training posts; anything else is not checked.

    Raises:
        ValueError: if a post has no id: with the rows in another order, its stride would become another post's.

    Example:
        >>> refuse_generated_ids([{"id": "1"}, {"text": "goal"}])
        Traceback (most recent call last):
        ValueError: row 1 of `train_dataset` has no `id`, but strides belong to posts by their ids, ...
    """
    if isinstance(posts, Dataset):
        ids = posts["id"] if "id" in posts.column_names else [None] * len(posts)
    else:
        ids = [row.get("id") for row in posts] if isinstance(posts, Sequence) else []
    if None in ids:
        raise ValueError(
            f"row {list(ids).index(None)} of `train_dataset` has no `id`, but strides belong to posts by their ids, whatever "
            "the rows' order. Give every post an `id` of its own."
        )
