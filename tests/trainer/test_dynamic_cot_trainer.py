"""DynamicCoTTrainer: its loss and gradients are the paper's, however the optimizer step is computed.

Holds: γ = 0 is `trl.SFTTrainer` on the direct targets; a step equals a reference that goes through its posts one at a
time with ordinary forwards (float64, 1e-10); micro-batches, gradient checkpointing and the prompt's backend change
nothing; a resumed run is the uninterrupted one, to the last bit; metrics are those worked out by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.objectives.switching import dropped_at_random
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from tests.support.posts import rows
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import (
    EXACT,
    PLAIN_SETTINGS,
    Gradients,
    ReportedLoss,
    StopAt,
    history,
    largest_difference,
    losses,
    read_choices,
    resumable,
    trainer_of,
    weights,
)

# (a) γ = 0 is SFTTrainer


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "llama", "qwen2"])
def test_gamma_zero_is_sft(family: str, tmp_path: Path) -> None:
    """Batch size 1, the same strings as prompt and completion: equal losses over three steps, and equal weights."""
    posts = rows(family, 3)
    ours = trainer_of(family, tmp_path, posts, gamma=0, per_device_train_batch_size=1, freeze_vision_tower=False)
    ours.train()

    model, processor = build(family)
    renderer = KeyphraseRenderer(processor)
    rendered = []
    for post in posts:
        count = len(post["images"])
        row = {"prompt": renderer.prompt(post, count), "completion": renderer.direct_target(post, count)}
        rendered.append(row | ({"images": post["images"]} if renderer.takes_images else {}))
    options = {**PLAIN_SETTINGS, "per_device_train_batch_size": 1}
    args = SFTConfig(output_dir=str(tmp_path / "sft"), completion_only_loss=True, max_length=None, eos_token=None, **options)
    text_only = not renderer.takes_images
    if text_only:  # for strings TRL adds BOS and EOS of its own: give it the tokens
        tokenize = processor.__call__
        rendered = [
            {
                "input_ids": (prompt := tokenize(row["prompt"], add_special_tokens=False).input_ids)
                + (target := tokenize(row["completion"], add_special_tokens=False).input_ids),
                "completion_mask": [0] * len(prompt) + [1] * len(target),
            }
            for row in rendered
        ]
    dataset = Dataset.from_list(rendered) if text_only else _with_images(rendered)
    theirs = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    theirs.train()

    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)
    assert len(losses(ours)) == 3 and losses(ours)[0] != losses(ours)[1]
    assert largest_difference(weights(ours), weights(theirs)) < 2e-6
    assert losses(ours, "reasoning_share") == [0.0] * 3


def _with_images(rendered: list[dict[str, Any]]) -> Dataset:
    from datasets import Features, Image, List, Value

    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
    return Dataset.from_list(rendered, features=features)


# (b) one optimizer step against a naive reference


def reference_nll(model: torch.nn.Module, collator: PairedTargetCollator, post: dict[str, Any], kind: str):
    """(Σ w·nll, Σ w) of one post's target by one ordinary forward with the model's own positions and its own logits."""
    batch = collator([post])
    target, inputs = batch[kind], dict(batch["prompt"])
    ids, prompt_length = target["input_ids"], inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(ids)], dim=1)
    logits = model(**inputs, use_cache=False).logits[0, prompt_length - 1 : -1]
    nll = -torch.log_softmax(logits, dim=-1)[torch.arange(ids.shape[1]), ids[0]]
    weight = target["weights"][0].double()
    return (weight * nll).sum(), weight.sum()


def reference_step(
    model: torch.nn.Module, collator: PairedTargetCollator, posts: list[dict[str, Any]], args: DynamicCoTConfig
) -> tuple[float, dict[str, torch.Tensor], list[bool]]:
    """Loss, gradients and choices of one optimizer step on all posts."""
    numerators, denominators, choices = [], [], []
    for post in posts:
        direct = reference_nll(model, collator, post, "direct")
        reasoning = reference_nll(model, collator, post, "reasoning") if post["rationale"] else None
        if args.strategy == "dynamic":
            chosen = reasoning is not None and (direct[0] / direct[1]).item() < float(args.gamma)
        elif args.strategy.startswith("random"):
            [dropped] = dropped_at_random([post["id"]], 0, float(args.strategy[7:]), args.seed)
            chosen = reasoning is not None and not dropped
        else:
            chosen = reasoning is not None and args.strategy in ("cot", "multitask")
        choices.append(chosen)
        taught = [(1.0, reasoning)] if chosen else [(1.0, direct)]
        if args.strategy == "multitask":
            taught = [(1.0, direct)] + ([(args.multitask_weight, reasoning)] if chosen else [])
        if args.loss_normalization == "token":
            numerators.append(sum(share * total for share, (total, _) in taught))
            denominators.append(sum(share * weight for share, (_, weight) in taught))
        else:
            share_sum = sum(share for share, _ in taught)
            numerators.append(sum(share * total / weight for share, (total, weight) in taught) / share_sum)
            denominators.append(1.0)
    loss = sum(numerators) / sum(denominators)
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, choices


STEPS = [
    {"gamma": 0},
    {"gamma": "mid"},
    {"gamma": "inf"},
    {"gamma": "mid", "loss_normalization": "token"},
    {"gamma": "mid", "answer_weight": 3.0},
    {"gamma": "inf", "answer_weight": 0.5, "loss_normalization": "token"},
    {"strategy": "direct"},
    {"strategy": "direct", "loss_normalization": "token"},
    {"strategy": "cot"},
    {"strategy": "cot", "answer_weight": 2.0, "loss_normalization": "token"},
    {"strategy": "multitask"},
    {"strategy": "multitask", "multitask_weight": 0.25, "answer_weight": 2.0},
    {"strategy": "multitask", "multitask_weight": 3.0, "loss_normalization": "token"},
    {"strategy": "multitask", "multitask_weight": 0.0},
    {"strategy": "random:0.5"},
    {"strategy": "random:0.5", "loss_normalization": "token"},
]


@pytest.mark.parametrize("backend", ["shared", "plain"])
@pytest.mark.parametrize("options", STEPS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_step_equals_the_reference(options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    """Five posts in micro-batches of 2, 2 and 1."""
    _assert_step("llava", options, backend, tmp_path)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "qwen3"])
def test_step_equals_the_reference_for_families(family: str, tmp_path: Path) -> None:
    _assert_step(family, {"gamma": "mid", "answer_weight": 2.0}, "shared", tmp_path)


@pytest.mark.parametrize("normalization", ["sample", "token"])
def test_step_equals_the_reference_with_checkpointing(normalization: str, tmp_path: Path) -> None:
    options = {"gamma": "mid", "loss_normalization": normalization, "gradient_checkpointing": True}
    _assert_step("qwen2_5_vl", options, "shared", tmp_path)
    _assert_step("gemma3", options, "plain", tmp_path)


def _assert_step(family: str, options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    posts, options = rows(family, 5), dict(options)
    model, processor = build(family)
    with exact_float64(model):
        collator = PairedTargetCollator(processor, answer_weight=options.get("answer_weight", 1.0))
        if options.get("gamma") == "mid":
            with torch.no_grad():
                means = [total / weight for total, weight in (reference_nll(model, collator, p, "direct") for p in posts)]
            levels = sorted(mean.item() for mean, post in zip(means, posts, strict=True) if post["rationale"])
            below, above = max(zip(levels, levels[1:], strict=False), key=lambda pair: pair[1] - pair[0])
            assert above - below > 1e-3, "the choice must not be a matter of rounding"
            options["gamma"] = (below + above) / 2
        gradients = Gradients()
        trainer = trainer_of(
            family,
            tmp_path,
            posts,
            gradient_accumulation_steps=3,
            max_steps=1,
            prompt_backend=backend,
            freeze_vision_tower=False,
            callbacks=[gradients],
            log_choices=True,
            **options,
        )
        trainer.model.double()
        loss, expected, choices = reference_step(model, collator, posts, trainer.args)
        reported = ReportedLoss(trainer)
        trainer.train()
    [actual] = gradients.steps
    assert trainer.shares_prompt == (backend == "shared")
    assert reported.total == pytest.approx(loss, rel=EXACT)
    assert losses(trainer) == [pytest.approx(loss, rel=1e-5)]
    # A parameter that no micro-batch reached has no gradient, one that only a zero share reached has a zero one.
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-3
    for name in expected.keys() | actual.keys():
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            actual.get(name, zero).expand_as(expected.get(name, actual.get(name))),
            expected.get(name, zero).expand_as(actual.get(name, expected.get(name))),
            rtol=0,
            atol=EXACT,
            msg=name,
        )
    if (tmp_path / "choices.jsonl").exists():
        logged = {row["id"]: row["choice"] for row in read_choices(tmp_path)}
        wanted = dict(zip((p["id"] for p in posts), choices, strict=True))
        assert logged == {post_id: "reasoning" if chosen else "direct" for post_id, chosen in wanted.items()}
    if options.get("gamma") not in (0, "inf", None):
        assert any(choices) and not all(choices)


# (c) accumulation


@pytest.mark.parametrize("normalization", ["sample", "token"])
@pytest.mark.parametrize("gamma", ["5.7", "avg", "quantile:0.5"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_accumulation_changes_nothing(family: str, gamma: str, normalization: str, tmp_path: Path) -> None:
    """Two epochs of six posts in optimizer steps of 4 and 2: 1 x 4 and 4 x 1 micro-batches.

    llava's model takes loss arguments and qwen2_5_vl's does not, which decides how Trainer scales a loss.
    """
    runs = []
    for batch_size in (4, 1):
        trainer = trainer_of(
            family,
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=4,
            gamma=gamma,
            loss_normalization=normalization,
            log_choices=True,
        )
        with exact_float64(trainer.model):
            trainer.train()
        runs.append(trainer)
    first = runs[0]
    choices = [sorted(read_choices(tmp_path / str(size)), key=lambda row: (row["step"], row["id"])) for size in (4, 1)]
    assert {row["choice"] for row in choices[0]} == {"direct", "reasoning"}
    assert len(losses(first)) == 4
    for trainer, chosen in zip(runs[1:], choices[1:], strict=True):
        # Trainer adds up the losses that it logs in float32, here of sums over all tokens; the weights are exact.
        assert losses(trainer) == pytest.approx(losses(first), rel=5e-6)
        assert largest_difference(weights(trainer), weights(first)) < 1e-9
        for name in ("reasoning_share", "direct_loss", "direct_tokens"):
            assert losses(trainer, name) == pytest.approx(losses(first, name), rel=1e-6), name
        assert [(r["id"], r["step"], r["choice"]) for r in chosen] == [(r["id"], r["step"], r["choice"]) for r in choices[0]]
        assert trainer.gamma.value == pytest.approx(first.gamma.value, rel=1e-6)


def test_clipping_sees_the_whole_step_under_token_normalization(tmp_path: Path) -> None:
    """The step's gradients are renormalised before they are clipped: the norm is that of one micro-batch."""
    norms = []
    for batch_size in (4, 1):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        trainer = trainer_of(
            "llava", tmp_path, gamma="5.7", loss_normalization="token", max_grad_norm=0.5, max_steps=2, **options
        )
        trainer.train()
        norms.append(losses(trainer, "grad_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# (d) checkpointing


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama", "llama"])
def test_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    runs = []
    for options in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        trainer = trainer_of(family, tmp_path, gamma="5.7", max_steps=2, **options)
        trainer.train()
        runs.append((trainer.shares_prompt, losses(trainer), losses(trainer, "grad_norm"), weights(trainer)))
    assert [run[0] for run in runs] == [True, True, False]
    for run in runs[1:]:
        assert run[1] == pytest.approx(runs[0][1], rel=1e-5)
        assert run[2] == pytest.approx(runs[0][2], rel=1e-4)
        assert largest_difference(run[3], runs[0][3]) < 1e-5


# (e) resume


RESUMED: dict[str, dict[str, Any]] = {
    "avg": {"gamma": "avg"},
    "quantile": {"gamma": "quantile:0.5", "gamma_window": 5},
    "random": {"strategy": "random:0.5"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_a_resumed_run_is_the_uninterrupted_one(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Same logs (losses, γ, shares), weights, statistics and choices, to the last bit."""
    straight = resumable(family, tmp_path / "straight", **options)
    straight.train()
    interrupted = resumable(family, tmp_path / "resumed", **options)
    interrupted.add_callback(StopAt(5))  # two steps later than the checkpoint: their log rows must go
    interrupted.train()
    assert max(row["step"] for row in read_choices(tmp_path / "resumed")) == 5 or "gamma" not in options
    resumed = resumable(family, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))

    assert history(resumed) == history(straight)
    assert largest_difference(weights(resumed), weights(straight)) == 0.0
    assert resumed.gamma.state() == straight.gamma.state()
    assert read_choices(tmp_path / "resumed") == read_choices(tmp_path / "straight")
    assert len(read_choices(tmp_path / "straight")) == 11  # 2 + 2 + 2 + 1 posts, then 2 + 2 of the second epoch
    if "gamma" in options:
        assert resumed.gamma.value > 0.0
        assert 0.0 < sum(losses(straight, "reasoning_share")) < 6.0


def test_resuming_with_another_gamma(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    for gamma in ("quantile:0.5", "quantile:0.7"):
        with pytest.raises(ValueError, match=f"`gamma` is '{gamma}'.*gamma='avg'.*Resume with the checkpoint's gamma"):
            resumable("llama", tmp_path, gamma=gamma).train(resume_from_checkpoint=True)
    constant = resumable("llama", tmp_path, gamma=0.4)
    constant.train(resume_from_checkpoint=True)
    assert constant.gamma.value == 0.4 and constant.state.global_step == 6


def test_resuming_from_a_plain_sft_checkpoint(tmp_path: Path) -> None:
    """With a constant γ it goes on; with a γ that follows the losses it says what is missing."""
    model, tokenizer = build("llama")
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_length=None,
        **{**PLAIN_SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 2},
    )
    data = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4)
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    trainer = trainer_of("llama", tmp_path, gamma=5.7, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-4").is_dir()
    with pytest.raises(ValueError, match="gamma=None"):
        trainer_of("llama", tmp_path, gamma="avg", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# (f) evaluation and metrics


def test_metrics_by_hand(tmp_path: Path) -> None:
    """Four posts, evaluated with the weights they start with, in batches of 3 and 1."""
    posts = rows("llava", 4)
    model, processor = build("llava")
    collator = PairedTargetCollator(processor)
    with torch.no_grad():
        direct = [reference_nll(model, collator, post, "direct") for post in posts]
        reasoning = [reference_nll(model, collator, post, "reasoning") if post["rationale"] else None for post in posts]
    means = [(total / weight).item() for total, weight in direct]
    gamma = (sorted(means[i] for i in (0, 1, 3))[1] + sorted(means[i] for i in (0, 1, 3))[2]) / 2
    easy = [post["rationale"] is not None and mean < gamma for post, mean in zip(posts, means, strict=True)]
    assert sum(easy) == 2
    taught = [(r[0] / r[1]).item() if chosen else mean for chosen, r, mean in zip(easy, reasoning, means, strict=True)]
    tokens = sum(weight.item() for _, weight in direct) / 4

    trainer = trainer_of("llava", tmp_path, eval_dataset=posts, gamma=gamma, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    expected = {
        "eval_loss": sum(taught) / 4,
        "eval_reasoning_share": 0.5,
        "eval_direct_loss": sum(means) / 4,
        "eval_direct_tokens": tokens,
        "eval_gamma": gamma,
        "eval_gamma_tokens": gamma * tokens,
        "eval_direct_target_loss": sum(t for t, chosen in zip(taught, easy, strict=True) if not chosen) / 2,
        "eval_reasoning_target_loss": sum(t for t, chosen in zip(taught, easy, strict=True) if chosen) / 2,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert trainer.model.training is False or not trainer._records["train"]
    assert not trainer._visits, "evaluation must leave no trace in γ's statistics or in the log of choices"


def test_evaluation_changes_no_training(tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows("llava", 3)}):
        trainer = trainer_of("llava", tmp_path / str(len(runs)), gamma="avg", log_choices=True, max_steps=4, **options)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[1], "eval_loss")) == 4
    assert runs[0].gamma.state() == runs[1].gamma.state()
    assert losses(runs[0], "direct_loss") == losses(runs[1], "direct_loss")
    assert read_choices(tmp_path / "0") == read_choices(tmp_path / "1")


def test_a_window_without_reasoning_logs_no_reasoning_loss(tmp_path: Path) -> None:
    for gamma, missing, share in ((0, "reasoning_target_loss", 0.0), ("inf", "direct_target_loss", 1.0)):
        posts = [post for post in rows("llava", 6) if post["rationale"]]
        trainer = trainer_of("llava", tmp_path, posts, gamma=gamma)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(missing not in entry for entry in logged)
        assert [entry["reasoning_share"] for entry in logged] == [share] * 3
        taught = "direct_target_loss" if gamma == 0 else "reasoning_target_loss"
        assert all(entry[taught] == pytest.approx(entry["loss"], rel=1e-6) for entry in logged)


def test_gamma_in_force_is_the_one_the_step_used(tmp_path: Path) -> None:
    trainer = trainer_of("llama", tmp_path, gamma="avg", log_choices=True, max_steps=4)
    trainer.train()
    visits = read_choices(tmp_path)
    for step in range(1, 5):
        before = [row["direct_loss"] for row in visits if row["step"] < step]
        gamma = sum(before) / len(before) if before else 0.0
        assert losses(trainer, "gamma")[step - 1] == pytest.approx(gamma, rel=1e-6)
        for row in visits:
            if row["step"] == step:
                assert row["gamma"] == pytest.approx(gamma, rel=1e-6)
                has_rationale = int(row["id"].removeprefix("post-")) % 4 != 2
                assert (row["choice"] == "reasoning") == (row["direct_loss"] < gamma and has_rationale)


# (g) posts without rationale


@pytest.mark.parametrize(("strategy", "warns"), [("dynamic", True), ("cot", True), ("direct", False)])
def test_reasoning_without_any_rationale_is_announced(
    strategy: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    posts = [{**post, "rationale": None} for post in rows("llama", 3)]
    trainer_of("llama", tmp_path, posts=posts, strategy=strategy)
    assert ("No train post has a rationale" in caplog.text) == warns
    caplog.clear()
    trainer_of("llama", tmp_path, posts=[*posts[:2], rows("llama", 3)[0] | {"id": "new"}], strategy=strategy)
    assert "has a rationale" not in caplog.text
