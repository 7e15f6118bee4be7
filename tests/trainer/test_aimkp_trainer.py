"""AimKPTrainer: its cosines, its filter and its update are the paper's, however the optimizer step is computed.

Holds: a step equals a reference that goes through its posts one at a time with ordinary, masked forwards and a gradient
each (float64, 1e-10), batched and plain, for strides 1 to 16, kept and dropped variants, every masking pattern and ablation,
with and without gradient checkpointing; without masks it is plain fine-tuning; accumulation changes nothing; strides follow
the authors' rule step by step; a resumed run, also one that was killed, is the uninterrupted one; another dataset's strides
are an error; posts, collators and models that are not supported are refused.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MistralConfig, TrainerCallback

from dynkp.batches.collators import PairedTargetCollator
from dynkp.mechanics.gradient_similarity import VariantGradients
from dynkp.mechanics.modality_masking import why_tokens_cannot_be_dropped
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_aimkp_trainer import DynamicAimKPConfig
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from tests.support.aimkp_reference import assert_step
from tests.support.aimkp_trainers import AIMKP, BOTH, aimkp, killable, lora, read_visits, resumable
from tests.support.posts import picture, rows
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import EXACT, Gradients, StopAt, history, largest_difference, losses, trainer_of, weights

# (a) one optimizer step against a naive reference


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_step_equals_the_reference(family: str, backend: str, checkpointing: bool, tmp_path: Path) -> None:
    """LoRA and the whole projector; thresholds between the cosines, so that some are kept and some are not."""
    options = {"similarity_backend": backend, "gradient_checkpointing": checkpointing}
    logged = assert_step(family, tmp_path, **options, text_threshold=0.9, image_threshold=0.8)
    assert {row["kept"] for row in logged} == {True, False}


@pytest.mark.parametrize("first", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_step_equals_the_reference_at_every_stride(family: str, first: int, tmp_path: Path) -> None:
    assert_step(family, tmp_path, strides=(first,), text_threshold=0.95, image_threshold=0.8)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "gemma3"])
def test_step_equals_the_reference_for_families(family: str, tmp_path: Path) -> None:
    assert_step(family, tmp_path, image_threshold=0.5, peft_config=lora(family))


ABLATIONS: list[dict[str, Any]] = [
    {"mask_text": False},
    {"mask_image": False},
    {"filter_gradients": False},
    {"variant_reduction": "sum"},
    {"loss_normalization": "sample"},
    {"mask_pattern": "random"},
    {"mask_pattern": "pooled"},
    {"prompt_backend": "plain"},
    {"text_threshold": 1.0, "image_threshold": 1.0},
]


@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("options", ABLATIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_step_equals_the_reference_in_every_ablation(options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    assert_step("llava", tmp_path, similarity_backend=backend, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_pooled_batches_equal_pooled_posts(family: str, tmp_path: Path) -> None:
    """Also with 3-D positions, which must be those of smaller pictures, and with features added to deeper layers."""
    found = {}
    for backend in ("batched", "plain"):
        model, processor = build(family)
        with exact_float64(model):
            gradients = Gradients()
            trainer = aimkp(
                family, tmp_path / backend, rows(family, 4), mask_pattern="pooled", similarity_backend=backend, max_steps=1,
                log_visits=True, callbacks=[gradients], per_device_train_batch_size=4, peft_config=lora(family), task="aimkp",
                initial_stride=2, image_threshold=0.0,
            )  # fmt: skip
            trainer.model.double()
            trainer.train()
        visits = sorted(read_visits(tmp_path / backend), key=lambda row: (row["id"], row["modality"]))
        found[backend] = ([row["cosine"] for row in visits], gradients.steps[0])
    assert len(found["plain"][0]) == 6 and max(found["plain"][0]) < 1.0 + EXACT
    assert found["batched"][0] == pytest.approx(found["plain"][0], abs=EXACT)
    for name, gradient in found["plain"][1].items():
        torch.testing.assert_close(found["batched"][1][name], gradient, rtol=0, atol=EXACT)


# (b) without masks it is plain fine-tuning


def test_the_warm_up_is_plain_fine_tuning(tmp_path: Path) -> None:
    runs = []
    common = {"task": "aimkp", "loss_normalization": "token", "adapters": False, "max_steps": 3}
    for classes, options in (
        (AIMKP, {"warmup_epochs": 1}),
        (AIMKP, {"mask_text": False, "mask_image": False}),
        ((DynamicCoTTrainer, DynamicCoTConfig), {"strategy": "direct", "warmup_steps": 0}),
    ):
        options = {**common, **options}
        adapters = options.pop("adapters")
        assert not adapters
        trainer = trainer_of("llava", tmp_path, classes=classes, **{"warmup_steps": 0, **options})
        trainer.train()
        runs.append((losses(trainer), weights(trainer)))
    for run in runs[:2]:
        assert run[0] == runs[2][0] and largest_difference(run[1], runs[2][1]) == 0


# (c) batches


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_accumulation_changes_nothing(family: str, normalization: str, tmp_path: Path) -> None:
    """Three epochs of six posts in optimizer steps of 4 and 2: 1 x 4 and 4 x 1 micro-batches."""
    runs = []
    for batch_size in (4, 1):
        trainer = aimkp(
            family,
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=6,
            warmup_epochs=1,
            image_threshold=0.7,
            loss_normalization=normalization,
            log_visits=True,
        )
        trainer.train()
        runs.append(trainer)
    one, other = runs
    assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=1e-6)
    assert largest_difference(weights(one), weights(other)) < 2e-6
    assert other.schedule.state() == one.schedule.state()
    for name in ("text_cosine", "image_cosine", "text_kept_share", "full_loss", "image_loss"):
        assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4), name
    assert len(read_visits(tmp_path / "4")) == len(read_visits(tmp_path / "1")) == 2 * (5 + 4)


def test_posts_without_text_or_picture_have_no_such_variant(tmp_path: Path) -> None:
    posts = [
        {"id": "words", "text": "the sea", "keyphrases": ["sea"], "images": []},
        {"id": "picture", "text": "", "keyphrases": ["dog"], "images": [picture(1)]},
    ]
    trainer = aimkp("llava", tmp_path, posts, max_steps=1, log_visits=True)
    trainer.train()
    assert sorted((row["id"], row["modality"]) for row in read_visits(tmp_path)) == [("picture", "image"), ("words", "text")]
    state = trainer.schedule.state()["visited"]
    assert (list(state["text"]), list(state["image"])) == (["words"], ["picture"])


def test_bf16_stays_close_to_float32(tmp_path: Path) -> None:
    cosines = []
    for bf16 in (False, True):
        trainer = aimkp("llava", tmp_path / str(bf16), bf16=bf16, gradient_checkpointing=bf16, max_steps=1, log_visits=True)
        trainer.train()
        cosines.append([row["cosine"] for row in read_visits(tmp_path / str(bf16))])
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-2) and cosines[1] != cosines[0]


def test_mllama_masks_text_and_refuses_pictures(tmp_path: Path) -> None:
    assert_step("mllama", tmp_path, mask_image=False, peft_config=lora("mllama"))
    with pytest.raises(ValueError, match="mask_image=False"):
        aimkp("mllama", tmp_path, rows("mllama", 4), peft_config=lora("mllama"), max_steps=1)


def test_a_text_model_masks_text(tmp_path: Path) -> None:
    trainer = aimkp("llama", tmp_path, peft_config=lora("llama"), max_steps=2)
    trainer.train()
    assert losses(trainer, "text_cosine") and not losses(trainer, "image_cosine")


# (d) strides


def authors_strides(cosines: list[float], threshold: float) -> list[int]:
    """The authors' rule after each visit, as their code has it: a failure halves once and is final."""
    stride, frozen, strides = 2, False, []
    for cosine_ in cosines:
        if not frozen:
            if cosine_ > threshold:
                stride *= 2
            else:
                stride, frozen = max(2, stride // 2), True
        strides.append(stride)
    return strides


@pytest.mark.parametrize("freeze", [True, False])
def test_strides_follow_the_authors_rule(freeze: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded cosines are played back, seven epochs long; the trainer's strides are those of the rule, step by step."""
    recorded = {
        "text": {"a": [0.5, 0.3, 0.05, 0.5, 0.1, 0.9, 0.2], "b": [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]},
        "image": {"a": [0.9, 0.8, 0.7, 0.41, 0.4, 0.9, 0.9], "b": [0.5, 0.39, 0.5, 0.2, 0.5, 0.5, 0.1]},
    }
    posts = [{"id": name, "text": f"{name} word or two", "keyphrases": ["dog"], "images": [picture(1)]} for name in "ab"]
    trainer = aimkp(
        "llava", tmp_path, posts, num_train_epochs=8, max_steps=-1, freeze_failed_strides=freeze, warmup_epochs=1,
        variant_reduction="mean", log_visits=True, train_sampling_strategy="sequential",
    )  # fmt: skip

    def replay(self: Any, variant: str) -> torch.Tensor:
        return torch.tensor([recorded[variant][name][trainer.current_epoch - 1] for name in "ab"])

    monkeypatch.setattr(VariantGradients, "cosines", replay)
    trainer.train()
    visits = read_visits(tmp_path)
    assert len(visits) == 7 * 4
    for modality, by_post in recorded.items():
        threshold = {"text": 0.1, "image": 0.4}[modality]
        for name, sequence in by_post.items():
            used = [row["stride"] for row in visits if (row["modality"], row["id"]) == (modality, name)]
            if freeze:
                expected = [2, *authors_strides(sequence, threshold)[:-1]]
            else:
                expected = [2]
                for cosine_ in sequence[:-1]:
                    expected.append(2 * expected[-1] if cosine_ > threshold else max(2, expected[-1] // 2))
            assert used == expected, (modality, name)


def test_the_log_tells_cosines_shares_strides_and_cost(tmp_path: Path) -> None:
    trainer = aimkp("llava", tmp_path, max_steps=6, warmup_epochs=1, image_threshold=-1.0, text_threshold=1.0)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("text_cosine" not in entry and "step_cost" not in entry for entry in log[:3])
    for entry in log[3:]:
        assert -1 <= entry["text_cosine"] <= 1 and entry["text_kept_share"] == 0.0
        assert entry["step_cost"] > 1.0
    assert log[-1]["text_stride_2"] == 1.0 and log[-1]["image_stride_4"] == 1.0


# (e) resume


def measured(trainer: AimKPTrainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "step_cost"} for entry in history(trainer)]


@pytest.mark.parametrize("classes", [AIMKP, BOTH], ids=["aimkp", "both"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, classes: Any, tmp_path: Path) -> None:
    """Same logs, weights, strides and visits, to the last bit."""
    options = {"classes": classes, **({"gamma": "avg", "image_threshold": 0.6} if classes is BOTH else {})}
    straight = resumable(tmp_path / "straight", **options)
    straight.train()
    interrupted = resumable(tmp_path / "resumed", **options)
    interrupted.add_callback(StopAt(step + 1))
    interrupted.train()
    resumed = resumable(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{step}"))
    assert measured(resumed) == measured(straight)
    assert largest_difference(weights(resumed), weights(straight)) == 0
    assert resumed.method_state() == straight.method_state()
    assert read_visits(tmp_path / "resumed") == read_visits(tmp_path / "straight")
    strides = {row["stride"] for row in read_visits(tmp_path / "straight")}
    assert len(strides) > 1, "a run whose strides never move proves nothing"


def test_strides_belong_to_posts_not_to_their_order(tmp_path: Path) -> None:
    interrupted = resumable(tmp_path)
    interrupted.add_callback(StopAt(5))
    interrupted.train()
    again = resumable(tmp_path, list(reversed(rows("llava", 6))))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]["dynkp"]
    again.load_method_state(state)
    assert again.schedule.state() == state["strides"]
    other = resumable(tmp_path / "other", rows("llava", 5))
    with pytest.raises(ValueError, match="belong to 6 posts"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_trainer_has_no_strides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no strides"):
        resumable(tmp_path).load_method_state({"gamma": "0.4"})


SCRIPT = """
import sys
from tests import conftest
from tests.support.aimkp_trainers import killable
from pathlib import Path
killable(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])).train()
"""


@pytest.mark.parametrize("kind", ["drawn", "photographs"])
def test_a_killed_run_resumes(kind: str, shared: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; the resumed process ends like one that was left alone."""
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = killable(kind, shared, tmp_path / "straight")
    straight.train()
    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, kind, shared, folder], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-8/trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    resumed = killable(kind, shared, folder)
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights(resumed), weights(straight)) == 0
    assert resumed.schedule.state() == straight.schedule.state()
    visits = read_visits(folder)
    assert visits == read_visits(tmp_path / "straight")
    assert len({row["stride"] for row in visits}) > 1 and {row["kept"] for row in visits} == {True, False}
    if kind == "photographs":
        assert len(visits) == 2 * 2 * 30
        grids = {grid for row in straight.train_dataset for grid in [straight.data_collator([row])["layouts"][0].grids[0]]}
        assert len({(grid.height, grid.width) for grid in grids}) >= 5, "many aspect ratios"


# (f) what a run leaves behind


class LiveTensors(TrainerCallback):
    """Counts the tensors that exist after each step, circles collected."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        self.counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))


@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_a_step_leaves_nothing_behind(checkpointing: bool, backend: str, tmp_path: Path) -> None:
    """Graphs, gradients of single posts and cached keys go with the step: as many tensors at step 12 as at step 4."""
    live = LiveTensors()
    aimkp(
        "llava", tmp_path, rows("llava", 4), max_steps=12, callbacks=[live], similarity_backend=backend,
        gradient_checkpointing=checkpointing, per_device_train_batch_size=4,
    ).train()  # fmt: skip
    assert live.counts[-1] <= live.counts[3] + 2, live.counts


def test_a_fresh_run_moves_an_earlier_log_aside(tmp_path: Path) -> None:
    """Also where the first rows come after the warm-up, which writes none."""
    for warmup in (0, 1, 1):
        aimkp("llava", tmp_path, max_steps=5, log_visits=True, warmup_epochs=warmup).train()
    steps = [sorted({row["step"] for row in read_visits(tmp_path)})]
    for number in (1, 2):
        lines = (tmp_path / f"visits.{number}.jsonl").read_text().splitlines()
        steps.append(sorted({json.loads(line)["step"] for line in lines}))
    assert steps == [[4, 5], [1, 2, 3, 4, 5], [4, 5]]


def test_training_twice_begins_twice(tmp_path: Path) -> None:
    trainer = aimkp("llava", tmp_path, max_steps=6, image_threshold=-1.0, text_threshold=-1.0, log_visits=True)
    used = []
    for _ in range(2):
        trainer.train()
        used.append([(row["step"], row["modality"], row["stride"]) for row in read_visits(tmp_path)])
    assert sorted(used[0]) == sorted(used[1]) and {stride for _, _, stride in used[0]} == {2, 4}


# (g) backends and refusals


def test_a_model_that_needs_the_plain_way_gets_it_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All weights trained, the head among them, which sees target tokens rather than posts."""
    with caplog.at_level(logging.WARNING, logger="dynkp"):
        trainer = aimkp("llava", tmp_path, adapters=False, max_steps=1)
        trainer.train()
    assert not trainer.batches_similarity and losses(trainer, "image_cosine")
    assert [record.getMessage() for record in caplog.records if "one post at a time" in record.getMessage()]
    with pytest.raises(ValueError, match="similarity_backend"):
        aimkp("llava", tmp_path, adapters=False, similarity_backend="batched")


@pytest.mark.parametrize("kind", ["embeddings", "IA3", "AdaLoRA", "VeRA", "parameters", "tokens"])
def test_adapters_without_layers_of_their_own_take_the_plain_way(kind: str, tmp_path: Path) -> None:
    """Found when the trainer is built, not after an epoch of warm-up."""
    config = {
        "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4),
        "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
        "parameters": LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
        "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    }[kind]
    trainer = aimkp("llama", tmp_path, peft_config=config, max_steps=1)
    assert not trainer.batches_similarity
    trainer.train()
    assert losses(trainer, "text_cosine")


def test_a_window_without_layer_types_is_a_window_of_all_layers() -> None:
    """Mistral, Phi-3, Starcoder2: `sliding_window` without `layer_types`."""
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "24 tokens back" in str(why_tokens_cannot_be_dropped(model, 25)) and why_tokens_cannot_be_dropped(model, 24) is None
    config.sliding_window = None
    assert why_tokens_cannot_be_dropped(model, 10**6) is None


def test_a_window_shorter_than_the_prompt_is_masked_not_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 3's sliding window counts columns: with dropped tokens it would reach further."""
    with caplog.at_level(logging.WARNING, logger="dynkp"):
        assert_step("gemma3", tmp_path, peft_config=lora("gemma3"))
    assert any("masked, not left out" in record.getMessage() for record in caplog.records)


def test_streams_and_foreign_collators_are_refused(tmp_path: Path) -> None:
    stream = Dataset.from_list([{"id": "1", "text": "dog", "keyphrases": ["dog"]}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="stream"):
        aimkp("llama", tmp_path, stream, peft_config=lora("llama"))
    with pytest.raises(ValueError, match="MaskingCollator"):
        aimkp("llava", tmp_path, data_collator=PairedTargetCollator(build("llava")[1]))
    nameless = [{key: value for key, value in post.items() if key != "id"} for post in rows("llava", 2)]
    for posts in (nameless, [rows("llava", 1)[0], {**nameless[1], "id": None}]):
        with pytest.raises(ValueError, match="no `id`"):
            aimkp("llava", tmp_path, posts)
    asked = [{"id": "1", "prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "dog"}]}]
    with pytest.raises(ValueError, match="mask_text=False"):
        aimkp("llama", tmp_path, asked, peft_config=lora("llama"))
    with pytest.raises(ValueError, match="group_by_length"):
        aimkp("llava", tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="multitask"):
        DynamicAimKPConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, strategy="multitask")
