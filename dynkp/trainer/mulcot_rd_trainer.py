"""MulCoT-RD: train on response chains and labels together, and the student on the assistant's soft labels too.

"Resource-Limited Joint Multimodal Sentiment Reasoning and Classification via Chain-of-Thought Enhancement and
Distillation", Findings of ACL 2026.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel

from dynkp.batches.branches import Branches
from dynkp.batches.reasoning_renderer import PromptKind
from dynkp.batches.targets import Targets
from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.batches.typed_batches import SoftLabelBatch, TwoTaskBatch
from dynkp.data.reasoning_tasks import KeyphraseReasoningTask, ReasoningTask, resolve_reasoning_task
from dynkp.distillation.assistant import Assistant, check_vocabularies
from dynkp.distillation.soft_labels import SoftLabelCache
from dynkp.mechanics.branched_prompt import BranchedPrompt, PlainBranches, SharedBranches
from dynkp.objectives.distillation import SoftLabels, distilled, hard_label_loss, multitask_loss, soft_label_divergence
from dynkp.objectives.token_loss import PostLosses, TargetLoss, sum_per_post
from dynkp.prediction.generation import generate_reasoning
from dynkp.trainer.generative_evaluation import generative_metrics, keyphrases_of
from dynkp.trainer.label_evaluation import label_metrics
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from dynkp.trainer.post_streams import repeated_posts
from dynkp.trainer.post_trainer import PostTrainer
from dynkp.trainer.preparation import keep_answerable, prepare_posts

logger = logging.getLogger(__name__)


class MulCoTRDTrainer(PostTrainer):
    r"""MulCoT-RD's training of the assistant and of the student, which differ in their data and in the student's soft labels.

    There are two tasks k with prompts of their own, the response chain (which ends in the label) and the label alone:

    $$\mathcal{L} = \sum_k w_k \mathcal{L}_k, \qquad \mathcal{L}_k = (1-\lambda)\,\mathrm{CE}_k +
    \lambda\,\mathrm{KL}\big(\mathrm{softmax}(z_A/T) \,\|\, \mathrm{softmax}(z_S/T)\big)$$

    each the mean over an answer's tokens, then over the posts of the optimizer step. Without an assistant λ is 0, as in the
    assistant's own training. A post without a rationale has the label's loss only. Evaluation reports the loss of the hard
    labels, so that runs with any λ can be compared, and the accuracy of generated labels, by which the best checkpoint is
    selected.

    Departures: the beginning that both prompts share is computed once; the divergence is computed at the answers' tokens
    (option `kd_positions`); there is no factor T².

    Logged per window, in nats per token: `label_loss`, `chain_loss` (CE), `label_divergence`, `chain_divergence` (KL).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model to train, as for
            [`~dynkp.trainer.post_trainer.PostTrainer`].
        args ([`~dynkp.trainer.mulcot_rd_config.MulCoTRDConfig`]): options.
        assistant ([`~dynkp.distillation.assistant.Assistant`], [`~transformers.PreTrainedModel`] or `str`, *optional*): used
            instead of `args.assistant`; a model without tokenizer must have the student's.
        **kwargs: as for [`~dynkp.trainer.post_trainer.PostTrainer`]. Posts have `label` (and `aspect`) or `keyphrases`, and
            `rationale`.

    Raises:
        ValueError: if options, models, posts and soft labels do not fit together.

    Example:
    ```python
    trainer = MulCoTRDTrainer(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        args=MulCoTRDConfig(output_dir="student", task="masc", soft_labels="labels"),
        train_dataset=posts,
    )
    trainer.train()
    ```
    """

    _name = "MulCoT-RD"
    method = "mulcot_rd"
    target_kinds: Sequence[PromptKind] = ("label", "chain")
    args: MulCoTRDConfig
    task: ReasoningTask

    def __init__(
        self, model: Any, args: MulCoTRDConfig, assistant: Assistant | PreTrainedModel | str | None = None, **kwargs: Any
    ):
        self.cache = None if args.soft_labels is None else SoftLabelCache(args.soft_labels)
        self._announced = False
        super().__init__(model, args, **kwargs)
        self.assistant = self._load_assistant(assistant)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if self.cache is not None:
            if assistant is not None:
                raise ValueError("`assistant` and `soft_labels` are both given; choose one: the cache needs no assistant.")
            check_vocabularies(tokenizer, self.cache.tokenizer())
            self.cache.check(self.task, args.temperature, self.model.config.get_text_config().vocab_size, args.assistant)
            if args.distillation_weight and isinstance(self.train_dataset, Dataset):
                self.cache.check_posts(self.train_dataset)
        if self.assistant is not None and self.assistant.tokenizer is not None:
            check_vocabularies(tokenizer, self.assistant.tokenizer)

    def _load_assistant(self, given: Assistant | PreTrainedModel | str | None) -> Assistant | None:
        args = self.args
        if not args.distillation_weight or self.cache is not None:
            return None
        if given is None and args.assistant is None:
            logger.info("No assistant and no soft labels: both tasks are trained on hard labels alone (λ = 0).")
            return None
        if given is not None and args.assistant is not None:
            raise ValueError(f"`assistant` is given twice: as {args.assistant!r} in the options, and to the trainer.")
        device = torch.device(args.assistant_device or self.accelerator.device)
        given = args.assistant if given is None else given
        if isinstance(given, str):
            given = Assistant.load(given, dtype=args.assistant_dtype, device=device)
        elif not isinstance(given, Assistant):
            given = Assistant(given)
        given.model.to(device)
        given.shares_prompt &= args.prompt_backend != "plain"
        return given

    @property
    def distillation_weight(self) -> float:
        """λ in force: 0 in evaluation, and without an assistant or soft labels."""
        has_soft_labels = self.assistant is not None or self.cache is not None
        return self.args.distillation_weight if has_soft_labels and self.model.training else 0.0

    def compute_post_losses(self, model: nn.Module, inputs: TwoTaskBatch) -> PostLosses:
        """Compute L = Σ_k w_k ((1-λ)·CE_k + λ·KL_k) of each post.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            inputs (`dict`): a batch of B posts.

        Returns:
            [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).
        """
        student = self.open_branches(model, inputs["prompts"])  # both tasks' prompts, their common beginning computed once
        soft_labels = self.soft_labels_of(inputs)  # softmax(z_A/T) of each task; none if λ = 0
        losses: dict[str, TargetLoss] = {}
        for task in self.tasks_of(inputs):  # k: label and response chain
            logits = student.logits(task, inputs[task])  # z_S, (N, V)
            loss = self.hard_loss(task, student, logits, inputs)  # CE_k
            if soft_labels:
                divergence = self.divergence(task, student, logits, soft_labels[task], inputs)  # KL_k
                loss = distilled(loss, divergence, self.distillation_weight)  # L_k = (1-λ)·CE_k + λ·KL_k
            losses[task] = loss
        return multitask_loss(losses, self.args.parsed_task_weights, self.normalizes_over_tokens)  # L = Σ_k w_k L_k

    def tasks_of(self, inputs: TwoTaskBatch) -> list[PromptKind]:
        """Return the tasks for which any post of a batch has a target."""
        return [task for task in self.target_kinds if any(inputs[task]["lengths"])]

    def open_branches(self, model: nn.Module, branches: Branches) -> BranchedPrompt:
        """Prepare both tasks' prompts, with their common beginning computed once where prompts and model allow it.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            branches ([`~dynkp.batches.branches.Branches`]): the prompts.
        """
        if self.shares_prompt and not branches["separate"] and not self._compares_everywhere:
            return SharedBranches(model, branches)
        if branches["separate"] and not self._announced:
            self._announced = True
            logger.warning("The task's two prompts do not begin alike: each is computed by itself, images included.")
        return PlainBranches(model, branches, everywhere=self._compares_everywhere)

    @property
    def _compares_everywhere(self) -> bool:
        return self.args.kd_positions == "all" and self.distillation_weight > 0

    def soft_labels_of(self, inputs: TwoTaskBatch) -> dict[str, torch.Tensor | SoftLabels]:
        """Return the assistant's soft labels of a batch, computed now or read with the batch.

        Args:
            inputs (`dict`): a batch of B posts.

        Returns:
            `dict`: per task the assistant's logits (N, V), or its truncated distributions; empty if λ = 0.
        """
        if not self.distillation_weight:
            return {}
        if self.assistant is None:
            return {task: SoftLabels(**labels) for task, labels in cast(SoftLabelBatch, inputs)["soft_labels"].items()}
        answers: dict[str, Targets] = {"label": inputs["label"], "chain": inputs["chain"]}
        return {**self.assistant.logits(inputs["prompts"], answers, self._compares_everywhere)}

    def hard_loss(self, task: PromptKind, student: BranchedPrompt, logits: torch.Tensor, inputs: TwoTaskBatch) -> TargetLoss:
        """Compute CE_k, the negative log-likelihood of each post's answer, and record it.

        Args:
            task (`str`): `"label"` or `"chain"`.
            student ([`~dynkp.mechanics.branched_prompt.BranchedPrompt`]): what computed the logits.
            logits (`torch.Tensor` of shape `(N, V)`): z_S.
            inputs (`dict`): the batch.
        """
        answers: Targets = inputs[task]
        logits = student.at_answers(logits, task, answers)
        loss = sum_per_post(hard_label_loss(logits, answers["input_ids"][answers["mask"]]), answers["mask"])
        self._record_task(f"{task}_loss", loss, inputs)
        return loss

    def divergence(
        self,
        task: PromptKind,
        student: BranchedPrompt,
        logits: torch.Tensor,
        soft_labels: torch.Tensor | SoftLabels,
        inputs: TwoTaskBatch,
    ) -> TargetLoss:
        """Compute KL_k = KL(softmax(z_A/T) ‖ softmax(z_S/T)) over the tokens that `kd_positions` selects, and record it.

        Args:
            task (`str`): `"label"` or `"chain"`.
            student ([`~dynkp.mechanics.branched_prompt.BranchedPrompt`]): what computed the student's logits.
            logits (`torch.Tensor` of shape `(N, V)`): z_S.
            soft_labels (`torch.Tensor` or [`~dynkp.objectives.distillation.SoftLabels`]): z_A, or what is known of it.
            inputs (`dict`): the batch.
        """
        values = soft_label_divergence(logits, soft_labels, self.args.temperature)
        loss = sum_per_post(values, student.positions(task, inputs[task]))
        self._record_task(f"{task}_divergence", loss, inputs)
        return loss

    def _record_task(self, name: str, loss: TargetLoss, inputs: TwoTaskBatch) -> None:
        self.record(name, loss.mean, ~repeated_posts(inputs) & (loss.tokens > 0))

    # Tasks, posts and evaluation

    def task_of(self, args: Any, task: Any) -> Any:
        """Return the task to train; see [`~dynkp.trainer.post_trainer.PostTrainer.task_of`]."""
        return resolve_reasoning_task(args.task if task is None else task)

    # A post has both tasks, or without a rationale the label alone: its targets do not depend on losses.
    knows_targets = True

    def denominators(self, batch: TwoTaskBatch) -> Sequence[float]:
        """Return what each post adds to the denominator of the step's mean: Σ_k w_k tokens_k, or 1.

        Args:
            batch (`dict`): a batch of B posts.
        """
        if not self.normalizes_over_tokens:
            return [1] * len(batch["id"])
        weights = self.args.parsed_task_weights
        lengths = zip(batch["label"]["lengths"], batch["chain"]["lengths"], strict=True)
        return [weights["label"] * label + weights["chain"] * chain for label, chain in lengths]

    def prepare(self, dataset: Any, name: str, args: Any, takes_images: bool) -> Dataset | IterableDataset:
        """Validate a set of posts, their answers and aspects too; see [`~dynkp.trainer.post_trainer.PostTrainer.prepare`]."""
        need_keyphrases = isinstance(self.task, KeyphraseReasoningTask)
        posts = prepare_posts(dataset, name, args, takes_images, need_keyphrases=need_keyphrases, refuses=self._refuses_size)
        return keep_answerable(posts, name, self.task, args.on_invalid)

    def build_collator(self) -> Any:
        """Return the collator of this trainer's batches."""
        return TwoTaskCollator(self.processing_class, self.task, max_length=self.args.max_length)

    def get_train_dataloader(self) -> Any:
        """Return the data loader of the training posts; its batches contain the soft labels of the cache, if there is one."""
        collator: Any = self.data_collator
        if self.cache is not None and self.args.distillation_weight:
            self.data_collator = cast(Any, WithSoftLabels(collator, self.cache))
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator  # evaluation needs no soft labels, and its posts have none

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "soft_labels" in inputs:  # under DeepSpeed, Trainer converts floats to the model's type: too coarse for these
            prepared["soft_labels"] = send_to_device(inputs["soft_labels"], self.args.device)
        return prepared

    def generative_metrics(self, model: Any, processor: Any, posts: Any, **options: Any) -> dict[str, float]:
        """Generate answers to the label prompt for posts and score labels, or keyphrases.

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): its processor.
            posts (`Iterable`): evaluation posts, the same on every rank.
            **options: as in [`~dynkp.trainer.label_evaluation.label_metrics`].

        Returns:
            `dict[str, float]`: metrics, equal on every rank.
        """
        if not isinstance(self.task, KeyphraseReasoningTask):
            return label_metrics(model, processor, posts, task=self.task, **options)

        def generate(*args: Any, task: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
            for row in generate_reasoning(*args, task=self.task, **kwargs):
                yield {**row, "reasoned": False}  # the label prompt asks for the answer alone

        train_keyphrases, convention = keyphrases_of(self.train_dataset), self.args.eval_convention
        return generative_metrics(
            model,
            processor,
            posts,
            task=self.task.keyphrase_task,
            train_keyphrases=train_keyphrases,
            convention=convention,
            generate=generate,
            **options,
        )

    def floating_point_ops(self, inputs: TwoTaskBatch) -> int:
        """Estimate the floating-point operations of a batch: 6 · parameters · tokens of both prompts and their targets.

        Args:
            inputs (`dict`): a batch of B posts.
        """
        branches = inputs["prompts"]
        parts = [*branches["ends"].values(), *branches["separate"].values(), inputs["label"], inputs["chain"]]
        tokens = sum(part["input_ids"].numel() for part in parts)
        tokens += branches["prompt"]["input_ids"].shape[0] * branches["shared"]
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)


class WithSoftLabels:
    """Adds the assistant's soft labels to the batches of a collator; the data loader's workers read them.

    Args:
        collator ([`~dynkp.batches.two_task_collator.TwoTaskCollator`]): collates the posts.
        cache ([`~dynkp.distillation.soft_labels.SoftLabelCache`]): the soft labels.

    Returns (when called with a list of rows):
        [`~dynkp.batches.typed_batches.SoftLabelBatch`]: what `collator` returns, and `soft_labels`.
    """

    def __init__(self, collator: TwoTaskCollator, cache: SoftLabelCache):
        self.collator, self.cache = collator, cache

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> SoftLabelBatch:
        """Collate rows of posts and read their soft labels."""
        batch = self.collator(rows)
        answers = {"label": batch["label"], "chain": batch["chain"]}
        return {**batch, "soft_labels": self.cache.of_batch(batch["id"], answers)}
