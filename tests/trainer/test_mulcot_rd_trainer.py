"""MulCoTRDTrainer: its loss and gradients are the paper's, however the optimizer step is computed.

Holds: a step equals a reference that goes through its posts one at a time with ordinary forwards (float64, 1e-10), online,
for every option; λ = 0 is plain multi-task training; the assistant does not move; a student equal to its assistant gets no
gradient from it; micro-batches, checkpointing and the prompt's backend change nothing; a resumed run is the uninterrupted
one; checkpoints are chosen by the accuracy of generated labels; a step leaves no graph behind.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.distillation.assistant import Assistant
from dynkp.mechanics import shared_prompt
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from tests.support.reasoning_trainers import BRIEF, LABELS, reasoning_rows, reasoning_trainer
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import EXACT, Gradients, ReportedLoss, largest_difference, losses, weights

TASKS = ("label", "chain")


def teacher_of(family: str, seed: int = 1) -> Any:
    """A model unlike the student's: other weights, and logits far enough apart to matter."""
    model, _ = build(family, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


# One optimizer step against ordinary forwards


def ordinary_logits(model: Any, collator: TwoTaskCollator, post: Any, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits of one post's prompt and answer but the last, and its answer's tokens."""
    renderer = collator.renderers[task]
    pictures = renderer.images(post)
    kwargs = {"images": [pictures] if pictures else None} if renderer.takes_images else {}
    text = [renderer.prompt(post, len(pictures))]
    inputs = dict(renderer.processor(text=text, add_special_tokens=False, return_tensors="pt", **kwargs))
    target = renderer.target(post, len(pictures))
    ids = torch.tensor([renderer.tokenizer(target, add_special_tokens=False)["input_ids"]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(ids)], dim=1)
    return model(**inputs, use_cache=False).logits[0, :-1], ids[0]


def reference_step(
    student: Any, assistant: Any, collator: TwoTaskCollator, posts: list[dict[str, Any]], args: MulCoTRDConfig, weight: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step on all posts, by the paper's equations."""
    numerators, denominators = [], []
    for post in posts:
        numerator, denominator = 0.0, 0.0
        for task in TASKS:
            if task == "chain" and not post["rationale"]:
                continue
            z_s, ids = ordinary_logits(student, collator, post, task)
            answer = z_s[-len(ids) :]
            ce = -torch.log_softmax(answer, dim=-1)[torch.arange(len(ids)), ids].mean()
            loss = (1 - weight) * ce
            if weight:
                with torch.no_grad():
                    z_a, _ = ordinary_logits(assistant, collator, post, task)
                if args.kd_positions == "answer":
                    z_a, z_s = z_a[-len(ids) :], answer
                p = torch.softmax(z_a / args.temperature, dim=-1)
                q = torch.softmax(z_s / args.temperature, dim=-1)
                loss = loss + weight * (p * (p.log() - q.log())).sum(dim=-1).mean()
            tokens = len(ids) if args.loss_normalization == "token" else 1
            numerator = numerator + args.parsed_task_weights[task] * loss * tokens
            denominator += args.parsed_task_weights[task] * tokens
        numerators.append(numerator)
        denominators.append(denominator if args.loss_normalization == "token" else 1.0)
    loss = sum(numerators) / sum(denominators)
    student.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


STEPS: list[dict[str, Any]] = [
    {"distillation_weight": 0.0},
    {},
    {"distillation_weight": 1.0, "temperature": 1.0},
    {"task_weights": {"chain": 0.25, "label": 2.0}, "temperature": 5.0},
    {"task_weights": '{"chain": 0, "label": 1}'},
    {"kd_positions": "all"},
    {"loss_normalization": "token"},
    {"loss_normalization": "token", "kd_positions": "all", "task_weights": {"chain": 0.5, "label": 1}},
]


@pytest.mark.parametrize("options", STEPS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "paper")
def test_step_equals_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    """Five posts in micro-batches of 2, 2 and 1."""
    assert_step("llava", options, "shared", tmp_path)


def test_step_equals_the_reference_with_prompts_computed_twice(tmp_path: Path) -> None:
    assert_step("llava", {}, "plain", tmp_path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_step_equals_the_reference_with_checkpointing(family: str, tmp_path: Path) -> None:
    assert_step(family, {"gradient_checkpointing": True}, "shared", tmp_path)


def assert_step(family: str, options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    posts = reasoning_rows(family, 5)
    student, processor = build(family)
    assistant = teacher_of(family)
    gradients = Gradients()
    with exact_float64(student), exact_float64(assistant):
        trainer = reasoning_trainer(
            family,
            tmp_path,
            posts,
            assistant_model=copy.deepcopy(assistant),
            gradient_accumulation_steps=3,
            max_steps=1,
            prompt_backend=backend,
            freeze_vision_tower=False,
            callbacks=[gradients],
            **options,
        )
        trainer.model.double()
        collator = TwoTaskCollator(processor, BRIEF)
        weight = trainer.args.distillation_weight
        loss, expected = reference_step(student, assistant, collator, posts, trainer.args, weight)
        reported = ReportedLoss(trainer)
        trainer.train()
    [actual] = gradients.steps
    assert trainer.shares_prompt == (backend == "shared")
    assert reported.total == pytest.approx(loss, rel=EXACT)
    assert losses(trainer) == [pytest.approx(loss, rel=1e-5)]
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-3
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=EXACT, msg=name)


# The assistant


def test_the_assistant_does_not_move(tmp_path: Path) -> None:
    assistant = teacher_of("llava").train()
    before = {name: value.clone() for name, value in assistant.state_dict().items()}
    trainer = reasoning_trainer("llava", tmp_path, assistant_model=assistant, num_train_epochs=2, max_steps=-1)
    start = weights(trainer)
    trainer.train()
    assert largest_difference(start, weights(trainer)) > 1e-3, "the student must"
    assert largest_difference(before, dict(assistant.state_dict())) == 0
    assert not assistant.training and not any(p.requires_grad or p.grad is not None for p in assistant.parameters())
    assert all(value > 0.05 for value in losses(trainer, "label_divergence") + losses(trainer, "chain_divergence"))


def test_weight_zero_is_plain_multitask_training(tmp_path: Path) -> None:
    runs = [reasoning_trainer("llava", tmp_path, **options) for options in (
        {},
        {"assistant_model": teacher_of("llava"), "distillation_weight": 0.0},
        {"assistant_model": teacher_of("llava")},
    )]  # fmt: skip
    for trainer in runs:
        trainer.train()
    plain, without, with_assistant = map(weights, runs)
    assert largest_difference(plain, without) == 0 and losses(runs[0]) == losses(runs[1])
    assert largest_difference(plain, with_assistant) > 1e-4
    assert not losses(runs[1], "label_divergence") and runs[1].assistant is None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_assistant_gets_no_gradient_from_it(temperature: float, tmp_path: Path) -> None:
    gradients = Gradients()
    model, _ = build("llava")
    trainer = reasoning_trainer(
        "llava",
        tmp_path,
        assistant_model=copy.deepcopy(model),
        distillation_weight=1.0,
        temperature=temperature,
        max_steps=1,
        callbacks=[gradients],
    )
    trainer.train()
    largest = max(gradient.abs().max().item() for gradient in gradients.steps[0].values())
    assert gradients.steps[0] and largest < 1e-6
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6)


def test_the_assistant_keeps_its_own_type(tmp_path: Path) -> None:
    assistant = teacher_of("llava").to(torch.bfloat16)
    trainer = reasoning_trainer("llava", tmp_path, assistant_model=assistant)
    reference = reasoning_trainer("llava", tmp_path, assistant_model=teacher_of("llava"))
    for each in (trainer, reference):
        each.train()
    assert {p.dtype for p in assistant.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer, "chain_divergence") == pytest.approx(losses(reference, "chain_divergence"), rel=0.05)
    assert losses(trainer, "chain_divergence") != losses(reference, "chain_divergence")


def test_mixed_precision_runs_close_to_single(tmp_path: Path) -> None:
    runs = [reasoning_trainer("llava", tmp_path, assistant_model=teacher_of("llava"), bf16=bf16) for bf16 in (False, True)]
    for trainer in runs:
        trainer.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.02)


def save(folder: Path, family: str, model: Any = None) -> str:
    teacher, processor = build(family, seed=1)
    (teacher if model is None else model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_an_assistant_by_name(tmp_path: Path) -> None:
    """A folder, an adapter's folder, and the model itself teach the same."""
    base = save(tmp_path / "base", "llava")
    tuned = get_peft_model(build("llava", seed=1)[0], LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(tmp_path / "adapter")
    merged = save(tmp_path / "merged", "llava", copy.deepcopy(tuned).merge_and_unload())
    runs = [
        reasoning_trainer("llava", tmp_path / "out", assistant=str(tmp_path / "adapter"), max_steps=1),
        reasoning_trainer("llava", tmp_path / "out", assistant=merged, max_steps=1),
        reasoning_trainer("llava", tmp_path / "out", assistant_model=tuned, max_steps=1),
        reasoning_trainer("llava", tmp_path / "out", assistant_model=str(tmp_path / "adapter"), max_steps=1),
        reasoning_trainer("llava", tmp_path / "out", assistant=base, max_steps=1),
    ]
    for trainer in runs:
        trainer.train()
    divergences = [losses(trainer, "chain_divergence")[0] for trainer in runs]
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-4) == pytest.approx(divergences[2], rel=1e-4)
    assert divergences[3] == divergences[0]
    assert divergences[4] != pytest.approx(divergences[0], rel=1e-4)


def test_larger_vocabularies_are_cut(tmp_path: Path) -> None:
    """Rows of the embedding that stand for no token, as Qwen's sizes have them, change nothing."""
    usual = reasoning_trainer("llava", tmp_path, assistant_model=teacher_of("llava"))
    wide = teacher_of("llava")
    wide.resize_token_embeddings(wide.get_output_embeddings().weight.shape[0] + 16)
    padded = reasoning_trainer("llava", tmp_path, assistant_model=wide)
    for trainer in (usual, padded):
        trainer.train()
    assert losses(padded) == pytest.approx(losses(usual), rel=1e-6)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model, tokenizer = build("qwen2")
    with pytest.raises(ValueError, match=r"disagree on \d+ of \d+ shared token ids"):
        reasoning_trainer("llama", tmp_path, assistant_model=Assistant(model, tokenizer))


# Micro-batches, adapters, resuming


@pytest.mark.parametrize(("family", "normalization"), [("llava", "sample"), ("llava", "token"), ("qwen2_5_vl", "sample")])
def test_accumulation_changes_nothing(family: str, normalization: str, tmp_path: Path) -> None:
    """Two epochs of six posts in optimizer steps of 4 and 2: 1 x 4 and 4 x 1 micro-batches."""
    runs = []
    for batch_size in (4, 1):
        trainer = reasoning_trainer(
            family,
            tmp_path,
            assistant_model=teacher_of(family),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=4,
            loss_normalization=normalization,
        )
        trainer.train()
        runs.append(trainer)
    first, second = runs
    assert losses(second) == pytest.approx(losses(first), rel=5e-6) and len(losses(first)) == 4
    assert largest_difference(weights(first), weights(second)) < 1e-6
    for name in ("label_loss", "chain_loss", "label_divergence", "chain_divergence"):
        assert losses(second, name) == pytest.approx(losses(first, name), rel=1e-5), name


def test_adapters_are_trained_alike_on_both_backends(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = [
        reasoning_trainer("llava", tmp_path, assistant_model=teacher_of("llava"), peft_config=lora, prompt_backend=backend,
                          gradient_checkpointing=checkpointing, seed=3)
        for backend, checkpointing in (("shared", False), ("shared", True), ("plain", False))
    ]  # fmt: skip
    for trainer in runs:
        trainer.train()
    assert losses(runs[0])[0] != losses(runs[0])[-1]
    for trainer in runs[1:]:
        assert losses(trainer) == pytest.approx(losses(runs[0]), rel=1e-4)


def test_prompts_that_do_not_begin_alike_are_trained_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each by itself, and this is said once; a batch of one post still equals one of two."""
    from tests.support.reasoning_trainers import InstructionFirst

    late = InstructionFirst("late", "How?", {"Text_analysis": "why"})
    runs = []
    for batch_size in (2, 1):
        caplog.clear()
        trainer = reasoning_trainer(
            "qwen2_5_vl",
            tmp_path,
            assistant_model=teacher_of("qwen2_5_vl"),
            given_task=late,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2 // batch_size,
        )
        trainer.train()
        runs.append(trainer)
        assert caplog.text.count("do not begin alike") == 1
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert largest_difference(*map(weights, runs)) < 2e-6


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps"}
    options |= {"assistant": save(tmp_path / "assistant", "llava"), "save_steps": 2}
    whole = reasoning_trainer("llava", tmp_path / "whole", **options)
    whole.train()
    resumed = reasoning_trainer("llava", tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    assert largest_difference(weights(resumed), weights(whole)) == 0


# Evaluation and the choice of a checkpoint


def test_evaluation_reports_hard_labels_and_accuracy(tmp_path: Path) -> None:
    """The loss of evaluation is the same with and without an assistant: runs of all λ can be compared."""
    posts = reasoning_rows("llava", 5)
    options: dict[str, Any] = {"eval_dataset": posts, "eval_generation_posts": None, "eval_max_new_tokens": 4}
    options["per_device_eval_batch_size"] = 2
    with_assistant = reasoning_trainer("llava", tmp_path, assistant_model=teacher_of("llava"), **options).evaluate()
    without = reasoning_trainer("llava", tmp_path, **options).evaluate()
    timed = ("runtime", "per_second", "preparation")
    figures = {key: value for key, value in without.items() if not any(word in key for word in timed)}
    assert figures == {key: value for key, value in with_assistant.items() if key in figures}
    assert not any("divergence" in key for key in with_assistant)
    assert figures["eval_loss"] == pytest.approx(figures["eval_label_loss"] + figures["eval_chain_loss"] * 4 / 5, rel=1e-5), (
        "the third post has no chain"
    )
    assert figures["eval_generated_posts"] == 5 and figures["eval_unread_share"] == 1.0 and figures["eval_accuracy"] == 0.0


def learn_labels(tmp_path: Path, **options: Any) -> Any:
    """Posts whose text names their label: learned in a few steps."""
    words = {"positive": "good", "neutral": "so", "negative": "bad"}
    posts = [
        {"id": str(index), "text": words[LABELS[index % 3]], "label": LABELS[index % 3], "aspect": "it", "images": []}
        for index in range(6)
    ]
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 6, "eval_max_new_tokens": 24}
    settings |= {"eval_dataset": posts, "eval_generation_posts": None}
    return reasoning_trainer("qwen2", tmp_path, posts, **{**settings, **options})


def test_the_best_checkpoint_is_that_of_the_highest_accuracy(tmp_path: Path) -> None:
    trainer = learn_labels(
        tmp_path,
        max_steps=60,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        lr_scheduler_type="reduce_lr_on_plateau",
    )
    trainer.train()
    accuracies = losses(trainer, "eval_accuracy")
    assert len(accuracies) == 3 and trainer.state.best_metric == max(accuracies) > 0.6
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{20 * (1 + accuracies.index(max(accuracies)))}")
    scheduler = trainer.lr_scheduler
    assert (scheduler.mode, scheduler.factor, scheduler.patience) == ("max", 0.5, 2)
    assert losses(trainer, "eval_macro_f1")[-1] <= 1.0 and losses(trainer, "eval_weighted_f1")


def test_the_plateau_lowers_the_learning_rate(tmp_path: Path) -> None:
    """Nothing is learned: after more than two evaluations without progress the rate is halved."""
    trainer = learn_labels(
        tmp_path,
        max_steps=5,
        learning_rate=1e-7,
        eval_strategy="steps",
        eval_steps=1,
        eval_max_new_tokens=2,
        metric_for_best_model="accuracy",
        lr_scheduler_type="reduce_lr_on_plateau",
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-8)


def test_keyphrases_are_a_task_too(tmp_path: Path) -> None:
    from tests.support.posts import rows

    posts = rows("llava", 4)
    trainer = reasoning_trainer(
        "llava",
        tmp_path,
        posts,
        assistant_model=teacher_of("llava"),
        task="keyphrases",
        eval_dataset=posts,
        eval_generation_posts=None,
        eval_max_new_tokens=4,
        max_steps=2,
    )
    trainer.train()
    assert len(losses(trainer, "chain_divergence")) == 2
    assert {"eval_f1@1", "eval_map@5", "eval_generated_posts"} <= trainer.evaluate().keys()


# What is refused


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_step_leaves_anything_behind(checkpointing: bool, tmp_path: Path) -> None:
    """Tensors and cached keys that Python still holds after 12 steps are no more than after 4."""
    alive: dict[int, tuple[int, int]] = {}

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (4, 12):
                gc.collect()
                objects = gc.get_objects()
                kinds = (torch.Tensor, shared_prompt._PromptLayer)
                alive[state.global_step] = tuple(sum(isinstance(each, kind) for each in objects) for kind in kinds)

    reasoning_trainer(
        "llava",
        tmp_path,
        assistant_model=teacher_of("llava"),
        gradient_checkpointing=checkpointing,
        max_steps=12,
        logging_steps=50,
        callbacks=[Count()],
    ).train()
    assert alive[12][0] <= alive[4][0] and alive[12][1] <= alive[4][1]  # other tests may have left some


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"label": "angry"}, "post 'post-2'.*'angry'"),
        ({"label": None}, "post 'post-2'"),
        ({"aspect": None}, "post 'post-2'.*aspect"),
    ],
)
def test_posts_without_answer_are_found_before_the_training(fault: dict[str, Any], message: str, tmp_path: Path) -> None:
    posts = reasoning_rows("llama", 4)
    posts[2] |= fault
    with pytest.raises(ValueError, match=message):
        reasoning_trainer("llama", tmp_path, posts)
    assert len(reasoning_trainer("llama", tmp_path, posts, on_invalid="skip").train_dataset) == 3
    with pytest.raises(ValueError, match="1 of 1 eval posts"):
        reasoning_trainer("llama", tmp_path, eval_dataset=posts[2:3], on_invalid="skip")
