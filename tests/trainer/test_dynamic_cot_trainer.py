"""DynamicCoTTrainer: its loss and gradients are the paper's, however the optimizer step is computed.

Holds: γ = 0 is `trl.SFTTrainer` on the direct targets; a step equals a reference that goes through its posts one at a
time with ordinary forwards (float64, 1e-10); micro-batches, gradient checkpointing and the prompt's backend change
nothing; a resumed run, also one whose process was killed, is the uninterrupted one; checkpoints hold no pickle of ours.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.objectives.switching import dropped_at_random
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from tests.support.posts import picture, rows
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import PLAIN_SETTINGS, largest_difference, losses, trainer_of, weights

EXACT = 1e-10


# (a) γ = 0 is SFTTrainer


class Gradients(TrainerCallback):
    """Keeps every optimizer step's gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class ReportedLoss:
    """What the micro-batches report, added up in float64 (Trainer's own account is in float32)."""

    def __init__(self, trainer: Any) -> None:
        self.total, self.training_step = 0.0, trainer.training_step
        trainer.training_step = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.training_step(*args, **kwargs)
        self.total += loss.item()
        return loss


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


def read_choices(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


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
        trainer.train()
        runs.append(trainer)
    first = runs[0]
    choices = [sorted(read_choices(tmp_path / str(size)), key=lambda row: (row["step"], row["id"])) for size in (4, 1)]
    assert {row["choice"] for row in choices[0]} == {"direct", "reasoning"}
    assert len(losses(first)) == 4
    for trainer, chosen in zip(runs[1:], choices[1:], strict=True):
        assert losses(trainer) == pytest.approx(losses(first), abs=1e-6, rel=1e-6)
        assert largest_difference(weights(trainer), weights(first)) < 1e-6
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


# (d) checkpointing, precision, adapters, frozen parts


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


def test_reentrant_checkpointing_and_a_shared_prompt_are_an_error(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer_of("llava", tmp_path, prompt_backend="shared", **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3"])
def test_bf16_stays_close_to_float32(family: str, tmp_path: Path) -> None:
    runs = []
    for bf16 in (False, True):
        trainer = trainer_of(family, tmp_path, gamma="inf", bf16=bf16, gradient_checkpointing=bf16)
        trainer.train()
        runs.append(losses(trainer))
        assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert runs[1] == pytest.approx(runs[0], rel=2e-2) and runs[1] != runs[0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_lora(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Adapters learn, nothing else moves, and the vision tower's adapters are frozen with it."""
    config = LoraConfig(r=4, target_modules=r".*(q_proj|qkv|gate_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    trainer = trainer_of(family, tmp_path, gamma="5.7", peft_config=config, gradient_checkpointing=checkpointing, max_steps=2)
    assert trainer.shares_prompt
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if "lora_" in name}
    towers = {name for name in adapters if "vision" in name or "visual" in name}
    assert moved == adapters - towers
    assert moved and (bool(towers) == (family != "llama"))


@pytest.mark.parametrize(
    ("family", "tower", "projector"),
    [
        ("llava", "vision_tower", "multi_modal_projector"),
        ("qwen2_vl", "visual", "visual.merger"),
        ("qwen2_5_vl", "visual", "visual.merger"),
        ("qwen3_vl", "visual", "merger"),
        ("internvl", "vision_tower", "multi_modal_projector"),
        ("gemma3", "vision_tower", "multi_modal_projector"),
        ("idefics3", "vision_model", "connector"),
        ("smolvlm", "vision_model", "connector"),
        ("mllama", "vision_model", "multi_modal_projector"),
    ],
)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "free"])
def test_freezing_the_vision_tower(family: str, tower: str, projector: str, frozen: bool, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, gamma="5.7", freeze_vision_tower=frozen)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_projector = {name for name in before if projector in name}
    of_tower = {name for name in before if tower in name} - of_projector
    of_language = set(before) - of_tower - of_projector
    assert of_projector & moved and of_language & moved and of_tower
    assert bool(of_tower & moved) != frozen


# (e) resume


RESUMED: dict[str, dict[str, Any]] = {
    "avg": {"gamma": "avg"},
    "quantile": {"gamma": "quantile:0.5", "gamma_window": 5},
    "random": {"strategy": "random:0.5"},
}


def resumable(family: str, folder: Path, max_steps: int = 6, **options: Any) -> DynamicCoTTrainer:
    """Six steps of two posts over seven posts: the checkpoint at 3 lies within the first epoch, the run in two."""
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "cosine", "max_steps": max_steps, "log_choices": True}
    return trainer_of(family, folder, rows(family, 7), **{**settings, **options})


def history(trainer: DynamicCoTTrainer) -> list[dict[str, Any]]:
    """What was logged at every step, clocks aside."""
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


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


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "gemma3", "idefics3", "smolvlm", "mllama"])
def test_a_checkpoint_gives_every_weight_back(family: str, tmp_path: Path) -> None:
    """Families whose published parameter names are not the model's own: Trainer alone would restore none of them."""
    trained = trainer_of(family, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, gamma="avg")
    trained.train()
    resumed = trainer_of(family, tmp_path, gamma="avg")
    assert largest_difference(weights(resumed), weights(trained)) > 0
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert largest_difference(weights(resumed), weights(trained)) == 0


def test_lora_resumes(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    runs = []
    for folder, resume in (("straight", None), ("resumed", None), ("resumed", True)):
        torch.manual_seed(0)
        trainer = resumable("llava", tmp_path / folder, gamma="avg", peft_config=config)
        if folder == "resumed" and not resume:
            trainer.add_callback(StopAt(4))
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert history(runs[2]) == history(runs[0])
    assert largest_difference(weights(runs[2]), weights(runs[0])) == 0


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the best checkpoint is the first, and its weights must come back."""
    trainer = trainer_of(
        "llava",
        tmp_path,
        eval_dataset=rows("llava", 2),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="direct_loss",
        greater_is_better=False,
        learning_rate=20.0,
    )
    trainer.train()
    best = min(losses(trainer, "eval_direct_loss"))
    assert best < losses(trainer, "eval_direct_loss")[-1]
    assert trainer.evaluate()["eval_direct_loss"] == pytest.approx(best, rel=1e-6)


SCRIPT = """
import sys
from tests import conftest
from tests.trainer.test_dynamic_cot_trainer import resumable
from pathlib import Path
resumable("llava", Path(sys.argv[1]), gamma="avg", max_steps=int(sys.argv[2]), save_steps=2).train(
    resume_from_checkpoint=len(sys.argv) > 3
)
"""


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """SIGKILL at any moment after the first checkpoint; the resumed process ends like one that was left alone."""
    steps = 20
    script = SCRIPT
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = resumable("llava", tmp_path / "straight", gamma="avg", max_steps=steps, save_steps=2)
    straight.train()

    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, folder, str(steps)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-6" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (folder / f"checkpoint-{steps}").exists(), "killed too late to prove anything"

    subprocess.run([*command, folder, str(steps), "resume"], env=environment, check=True, timeout=120, capture_output=True)
    assert read_choices(folder) == read_choices(tmp_path / "straight")
    ends = [
        json.loads((run / f"checkpoint-{steps}" / "trainer_state.json").read_text()) for run in (folder, straight_dir(straight))
    ]
    assert ends[0]["stateful_callbacks"]["dynkp"] == ends[1]["stateful_callbacks"]["dynkp"]
    assert [e["loss"] for e in ends[0]["log_history"] if "loss" in e] == losses(straight)
    files = [run / f"checkpoint-{steps}" / "model.safetensors" for run in (folder, straight_dir(straight))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    for number, content in ((4, None), (9, '{"epoch": 1.0, "glo')):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if content:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    resumed = resumable("llama", tmp_path, gamma="avg")
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in history(resumed)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resumable("llama", tmp_path / "empty", gamma="avg").train(resume_from_checkpoint=True)


def straight_dir(trainer: DynamicCoTTrainer) -> Path:
    return Path(trainer.args.output_dir)


def test_checkpoints_hold_no_pickle_of_ours(tmp_path: Path) -> None:
    """Pickles (torch.save) are Trainer's own four; our state is in trainer_state.json, weights in safetensors."""
    trainer = resumable("llava", tmp_path, gamma="quantile:0.5", max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    pickled = {path.name for path in checkpoint.iterdir() if path.read_bytes()[:2] in (b"PK", b"\x80\x02")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    others = {path.suffix for path in checkpoint.iterdir()} - {".pt", ".pth", ".bin"}
    assert others <= {".json", ".safetensors", ".jinja", ".md"}
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["dynkp"]
    assert state == {"gamma": "quantile:0.5", "statistics": trainer.gamma.state()}
    assert len(state["statistics"]["losses"]) == 6


def test_resuming_with_another_gamma(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    for gamma in ("quantile:0.5", "quantile:0.7"):
        with pytest.raises(ValueError, match=f"`gamma` is '{gamma}'.*gamma='avg'.*Resume with the checkpoint's gamma"):
            resumable("llama", tmp_path, gamma=gamma).train(resume_from_checkpoint=True)
    constant = resumable("llama", tmp_path, gamma=0.4)
    constant.train(resume_from_checkpoint=True)
    assert constant.gamma.value == 0.4 and constant.state.global_step == 6


def test_callback_states_restored_from_a_checkpoint(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    resumed = resumable("llama", tmp_path, gamma="avg", restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.gamma.state()["count"] == 11


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


def test_a_logging_window_is_a_mean_over_its_posts(tmp_path: Path) -> None:
    """Windows of three optimizer steps, the last batch of the epoch shorter: every post counts the same."""
    options = {"max_steps": 6, "gamma": "5.7", "log_choices": True}
    wide = trainer_of("llava", tmp_path, rows("llava", 5), logging_steps=3, **options)
    wide.train()
    visits = read_choices(tmp_path)
    for number, window in enumerate(([1, 2, 3], [4, 5, 6])):
        chosen = [row for row in visits if row["step"] in window]
        assert len(chosen) == 5
        mean = sum(row["direct_loss"] for row in chosen) / 5
        share = sum(row["choice"] == "reasoning" for row in chosen) / 5
        assert losses(wide, "direct_loss")[number] == pytest.approx(mean, rel=1e-6)
        assert losses(wide, "reasoning_share")[number] == pytest.approx(share)


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


def test_several_evaluation_sets_keep_their_metrics_apart(tmp_path: Path) -> None:
    posts = rows("llava", 4)
    sets = {"seen": posts[:2], "unseen": posts[2:]}
    trainer = trainer_of("llava", tmp_path, eval_dataset=sets, gamma="5.7")
    metrics = trainer.evaluate()
    for name, rows_of_set in sets.items():
        alone = trainer_of("llava", tmp_path, eval_dataset=rows_of_set, gamma="5.7").evaluate()
        for metric in ("loss", "direct_loss", "reasoning_share", "gamma_tokens"):
            assert metrics[f"eval_{name}_{metric}"] == pytest.approx(alone[f"eval_{metric}"])


def test_choices_of_infinite_gamma_are_json(tmp_path: Path) -> None:
    trainer_of("llama", tmp_path, gamma="inf", log_choices=True, max_steps=1).train()
    assert [row["gamma"] for row in read_choices(tmp_path)] == [None, None]


def test_a_fresh_run_moves_the_old_log_aside(tmp_path: Path) -> None:
    for _ in range(3):
        trainer_of("llama", tmp_path, gamma=5.0, log_choices=True, max_steps=1).train()
    names = sorted(path.name for path in tmp_path.glob("choices*"))
    assert names == ["choices.1.jsonl", "choices.2.jsonl", "choices.jsonl"]
    assert len(read_choices(tmp_path)) == 2


# (g) kinds of data


def post_stream(count: int):
    for post in rows("llava", count):
        yield {
            "id": post["id"],
            "text": post["text"] or "dusk",
            "keyphrases": post["keyphrases"],
            "rationale": post["rationale"],
        }


def test_a_stream_trains_like_a_list(tmp_path: Path) -> None:
    """In the stream's own order, over its end into a second pass."""
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(post_stream, gen_kwargs={"count": 5})
    trainer = trainer_of("llava", tmp_path, stream, gamma="avg", max_steps=4, log_choices=True)
    trainer.train()
    assert [row["id"] for row in read_choices(tmp_path)] == [f"post-{i}" for i in (0, 1, 2, 3, 4, 0, 1)]
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_workers_change_nothing(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 1):
        trainer = trainer_of("llava", tmp_path, gamma="5.7", dataloader_num_workers=workers)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_the_users_rows_stay_as_they_were(tmp_path: Path) -> None:
    posts = rows("llava", 4)
    before = [{**post, "images": list(post["images"])} for post in posts]
    trainer_of("llava", tmp_path, posts, eval_dataset=posts).train()
    assert posts == before


def test_posts_without_picture_or_rationale(tmp_path: Path) -> None:
    posts = [{"id": "a", "text": "goal", "keyphrases": ["mufc"]}, {"id": "b", "text": "sea", "keyphrases": ["dog"]}]
    trainer = trainer_of("llava", tmp_path, posts, gamma="inf", max_steps=1)
    trainer.train()
    assert losses(trainer, "reasoning_share") == [0.0]


def test_a_text_model_leaves_pictures_out(tmp_path: Path) -> None:
    posts = [{**post, "images": [picture(1)]} for post in rows("llama", 4)]
    with_pictures = trainer_of("llama", tmp_path, posts, gamma="5.7", max_steps=2)
    without = trainer_of("llama", tmp_path, rows("llama", 4), gamma="5.7", max_steps=2)
    with_pictures.train()
    without.train()
    assert losses(with_pictures) == losses(without)


def test_trl_rows(tmp_path: Path) -> None:
    """Conversational prompt-completion rows, with the words of ours, train the same."""
    _, processor = build("llava")
    renderer = KeyphraseRenderer(processor)
    posts = rows("llava", 4)
    converted = []
    for post in posts:
        text = renderer.task.prompt(post["text"], 0)[0]["content"][0]["text"]
        target = renderer.task.reasoning_target(post["keyphrases"], post["rationale"]) if post["rationale"] else None
        converted.append(
            {
                "id": post["id"],
                "images": post["images"],
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": "; ".join(post["keyphrases"])}],
                "reasoning_completion": target and [{"role": "assistant", "content": target}],
            }
        )
    runs = []
    for data in (posts, converted):
        trainer = trainer_of("llava", tmp_path, data, gamma="6.2", max_steps=2)
        trainer.train()
        runs.append((losses(trainer), losses(trainer, "reasoning_share")))
    assert runs[0] == runs[1] and sum(runs[0][1]) > 0


def test_model_as_a_path(tmp_path: Path) -> None:
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trainer = DynamicCoTTrainer(
        model=str(tmp_path / "model"),
        args=DynamicCoTConfig(output_dir=str(tmp_path / "run"), gamma="5.7", **PLAIN_SETTINGS),
        train_dataset=rows("llava", 6),
    )
    trainer.train()
    ready_made = trainer_of("llava", tmp_path, gamma="5.7")
    ready_made.train()
    assert losses(trainer) == pytest.approx(losses(ready_made), rel=1e-5)


# (h) errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -1}, ["`gamma`", "-1", "'avg'"]),
        ({"gamma": "often"}, ["`gamma`", "often", "'avg'"]),
        ({"gamma_window": 0}, ["`gamma_window`", "0", "at least 1"]),
        ({"gamma": "quantile:0.5", "gamma_window": -3}, ["`gamma_window`", "-3", "at least 1"]),
        ({"strategy": "dynamik"}, ["`strategy`", "dynamik", "'dynamic'"]),
        ({"strategy": "random:1.5"}, ["`strategy`", "1.5", "0 <= p <= 1"]),
        ({"strategy": "random:nan"}, ["`strategy`", "nan", "0 <= p <= 1"]),
        ({"strategy": "random"}, ["`strategy`", "random", "0 <= p <= 1"]),
        ({"strategy": "random:p"}, ["`strategy`", "random:p", "0 <= p <= 1"]),
        ({"loss_normalization": "batch"}, ["`loss_normalization`", "batch", "'token'"]),
        ({"answer_weight": -0.5}, ["`answer_weight`", "-0.5", "not negative"]),
        ({"answer_weight": math.inf}, ["`answer_weight`", "inf", "finite"]),
        ({"answer_weight": math.nan}, ["`answer_weight`", "nan", "finite"]),
        ({"multitask_weight": -1.0}, ["`multitask_weight`", "-1.0", "not negative"]),
        ({"max_length": 1}, ["`max_length`", "1", "None"]),
        ({"on_invalid": "ignore"}, ["`on_invalid`", "ignore", "'skip'"]),
        ({"prompt_backend": "fast"}, ["`prompt_backend`", "fast", "'plain'"]),
        ({"remove_unused_columns": True}, ["`remove_unused_columns`", "True", "False"]),
        ({"packing": True}, ["`packing`", "False"]),
        ({"padding_free": True}, ["`padding_free`", "False"]),
        ({"loss_type": "dft"}, ["`loss_type`", "default"]),
        ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor`", "default"]),
        ({"assistant_only_loss": True}, ["`assistant_only_loss`", "default"]),
        ({"completion_only_loss": False}, ["`completion_only_loss`", "default"]),
        ({"task": "haiku"}, ["task", "haiku", "dynamic_cot"]),
        ({"separator": "ab"}, ["separator", "'ab'", "punctuation"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options_out_of_range_name_field_value_and_remedy(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        trainer_of("llama", tmp_path, **options)
    for word in words:
        assert word in str(error.value)


def test_no_training_posts(tmp_path: Path) -> None:
    model, processor = build("llama")
    with pytest.raises(ValueError, match="`train_dataset` is None"):
        DynamicCoTTrainer(model=model, args=DynamicCoTConfig(output_dir=str(tmp_path), bf16=False), processing_class=processor)
    with pytest.raises(ValueError, match="train set has no posts"):
        trainer_of("llama", tmp_path, posts=[])
    with pytest.raises(ValueError, match="eval set has no posts"):
        trainer_of("llama", tmp_path, eval_dataset=[])
    with pytest.raises(ValueError, match="`max_length` is 3"):  # all would be dropped
        trainer_of("llama", tmp_path, max_length=3, on_invalid="skip")


def test_a_model_in_memory_needs_its_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`processing_class` is None"):
        trainer_of("llava", tmp_path, processing_class=None)


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


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"content": "goal"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "goal"}]}],
    ],
    ids=["empty", "no role", "a picture too few"],
)
def test_trl_rows_that_cannot_be_rendered_are_named(prompt: list[Any], tmp_path: Path) -> None:
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "mufc"}], "images": [picture(1)]}
    with pytest.raises(ValueError, match="post 'post-0': `prompt`"):
        trainer_of("llava", tmp_path, posts=[row]).train()


def test_gamma_may_be_a_number_or_a_string() -> None:
    assert DynamicCoTConfig(gamma=0.25, bf16=False).gamma == "0.25"
    assert DynamicCoTConfig(bf16=False).gamma == "0.4"
