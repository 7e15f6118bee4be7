"""The work of the trainers' steps, counted exactly and without a clock, so that a busy machine cannot hide a loss of speed.

Holds: a step of Dynamic CoT runs the vision tower once, every prompt once and the reasoning targets of easy posts only; a step
of AimKP runs the vision tower once, the tokens in front of a post's text once, and of a masked view the kept tokens only; the
FLOPs of the trainers' matrix products, backward included, stay within docs/performance.md's goals (a CPU's attention kernels
are not counted, and are the same in all ways). Images are decoded and processed by the data loader's workers, if there are
any; a resumed epoch decodes no image of the posts it skips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from dynkp.batches import renderers
from dynkp.batches.collators import SkippingCollator
from dynkp.bench import aimkp as aimkp_bench
from dynkp.bench import dynamic_cot as dynamic_cot_bench
from dynkp.bench.collation import write_posts
from dynkp.bench.steps import train_masked
from dynkp.bench.workload import Sizes, build_model, build_processor
from dynkp.data.sources import load_posts
from dynkp.mechanics.modality_masking import kept_cells, kept_tokens
from dynkp.mechanics.shared_prompt import causal_lm_of
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from tests.support.posts import picture
from tests.support.trainers import losses, trainer_of

# 144 image tokens, which the text does not outweigh, as a post's do not.
SIZES = Sizes(
    batch=4, image_side=12, reasoning_tokens=64, vocabulary=128, hidden=64, layers=2, vision_hidden=64, vision_layers=1
)


class Work:
    """Shapes of the inputs of the language model's first layer, (posts, tokens), and of the vision tower, (images,)."""

    def __init__(self, model: Any):
        model = causal_lm_of(model)
        self.passes: list[tuple[int, int]] = []
        self.images: list[int] = []
        self.hooks = [
            model.get_decoder().layers[0].register_forward_pre_hook(self._decode, with_kwargs=True),
            model.get_encoder(modality="image").register_forward_pre_hook(self._encode, with_kwargs=True),
        ]

    def _decode(self, module: Any, args: Any, kwargs: Any) -> None:
        self.passes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    def _encode(self, module: Any, args: Any, kwargs: Any) -> None:
        self.images.append(len(args[0] if args else kwargs["pixel_values"]))


def aimkp(folder: Path, posts: list[dict[str, Any]], **options: Any) -> AimKPTrainer:
    """A trainer of adapters and projector for one step of all posts."""
    torch.manual_seed(0)
    modules = r"^(?!.*(vision|projector|lm_head)).*_proj$"
    adapters = LoraConfig(r=4, target_modules=modules, modules_to_save=["multi_modal_projector"], init_lora_weights=False)
    options = {"per_device_train_batch_size": len(posts), "max_steps": 1, "peft_config": adapters, **options}
    return trainer_of("llava", folder, posts, classes=(AimKPTrainer, AimKPConfig), **options)


def equal_posts(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "id": f"post-{index}",
            "text": "new phone, great camera and the battery lasts two days",
            "keyphrases": ["tech", "review"],
            "rationale": "The text speaks of a phone and of its camera.",
            "images": [picture(index)],
        }
        for index in range(count)
    ]


@pytest.mark.parametrize(("gamma", "easy"), [("0", 0), ("inf", 4), (None, 2)])
def test_dynamic_cot_computes_prompts_once(gamma: str | None, easy: int, tmp_path: Path) -> None:
    posts = equal_posts()
    if gamma is None:  # those with a rationale
        gamma = "inf"
        for post in posts[2:]:
            post["rationale"] = None
    trainer = trainer_of("llava", tmp_path, posts, gamma=gamma, per_device_train_batch_size=4, max_steps=1)
    batch = trainer.data_collator(posts)
    prompt, direct = batch["prompt"]["input_ids"].shape[1], max(batch["direct"]["lengths"])
    work = Work(trainer.model)
    trainer.train()
    assert work.images == [4]
    # The prompt without its last token; that token and the answer without its last.
    expected = [(4, prompt - 1), (4, direct)]
    if easy:
        expected.append((easy, max(batch["reasoning"]["lengths"])))
    assert work.passes == expected


@pytest.mark.parametrize("stride", [2, 4])
def test_aimkp_computes_kept_tokens_only(stride: int, tmp_path: Path) -> None:
    posts = equal_posts()
    trainer = aimkp(tmp_path, posts, warmup_epochs=0, initial_stride=stride)
    batch = trainer.data_collator(posts)
    prompt, answer = batch["prompt"]["input_ids"].shape[1], max(batch["direct"]["lengths"]) - 1
    layout = batch["layouts"][0]
    text, grid = len(layout.text), layout.grids[0]
    masked_text = text - len(kept_tokens(text, stride))
    masked_image = len(grid.slots) - len(kept_cells(grid.height, grid.width, stride))
    assert masked_text and masked_image
    work = Work(trainer.model)
    trainer.train()
    assert work.images == [4]
    begins = layout.text.start
    assert work.passes == [
        (4, begins),  # for two views
        (4, prompt - begins + answer),
        (4, prompt - begins + answer - masked_text),
        (4, prompt + answer - masked_image),
    ]


def test_aimkp_s_first_epoch_is_plain_fine_tuning(tmp_path: Path) -> None:
    posts = equal_posts()
    trainer = aimkp(tmp_path, posts, warmup_epochs=1)
    batch = trainer.data_collator(posts)
    work = Work(trainer.model)
    trainer.train()
    assert work.images == [4]
    assert work.passes == [(4, batch["prompt"]["input_ids"].shape[1] + max(batch["direct"]["lengths"]) - 1)]


# FLOPs, forward and backward


def flops(step: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dynamic_cot_s_flops(share: float, tmp_path: Path) -> None:
    processor = build_processor(SIZES)
    scenario = dynamic_cot_bench.Scenario(share)
    bench = dynamic_cot_bench.build(build_model(SIZES, processor), processor, SIZES, scenario, str(tmp_path))
    ways = (dynamic_cot_bench.oracle, dynamic_cot_bench.naive, dynamic_cot_bench.ours)
    oracle, naive, ours = (flops(partial(way, bench)) for way in ways)
    assert ours <= 1.02 * oracle
    assert naive >= 1.3 * ours


def test_aimkp_s_flops(tmp_path: Path) -> None:
    bench = aimkp_bench.build(SIZES, torch.device("cpu"), str(tmp_path))
    plain_fine_tuning = flops(partial(aimkp_bench.sft, bench))
    assert flops(partial(aimkp_bench.warmup, bench)) == plain_fine_tuning
    found = {}
    for stride in (2, 4, 8):
        found[stride] = flops(partial(train_masked, bench.ours, bench.batch, stride)) / plain_fine_tuning
    assert found[2] > found[4] > found[8] > 1
    assert found[2] <= 1.9 and found[4] <= 1.75 and found[8] <= 1.7
    published = flops(partial(train_masked, bench.plain, bench.batch, 2)) / plain_fine_tuning
    assert published == pytest.approx(3.0, abs=0.01) and published >= 1.5 * found[2]


# Images


@contextmanager
def decoded_by(monkeypatch: pytest.MonkeyPatch, file: Path) -> Iterator[Callable[[], list[tuple[int, str]]]]:
    """The process and the post of every image that the collator decodes, workers' included."""
    stock = renderers.open_images

    def noting(images: Sequence[Any], *, post_id: str) -> Any:
        with file.open("a") as notes:  # lines this short are written at once
            notes.write(f"{os.getpid()} {post_id}\n" * len(images))
        return stock(images, post_id=post_id)

    with monkeypatch.context() as patch:
        patch.setattr(renderers, "open_images", noting)

        def notes() -> list[tuple[int, str]]:
            lines = file.read_text().splitlines() if file.exists() else []
            file.unlink(missing_ok=True)
            return [(int(process), post_id) for process, post_id in map(str.split, lines)]

        yield notes


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode_and_process_images(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with decoded_by(monkeypatch, tmp_path / "notes") as notes:
        trainer = trainer_of("llava", tmp_path, equal_posts(8), gamma="inf", dataloader_num_workers=workers, num_train_epochs=1,
                             max_steps=-1)  # fmt: skip
        notes()  # of the checks before the first step
        processed: list[int] = []
        stock = type(trainer.processing_class).__call__

        def processing(self: Any, *args: Any, **kwargs: Any) -> Any:
            processed.append(os.getpid())  # a worker appends to its own copy
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(type(trainer.processing_class), "__call__", processing)
        trainer.train()
        decoded = notes()
    assert sorted(post_id for _, post_id in decoded) == [f"post-{index}" for index in range(8)]
    processes = {process for process, _ in decoded}
    if workers:
        assert os.getpid() not in processes and len(processes) == 2 and not processed
    else:
        assert processes == {os.getpid()} and set(processed) == processes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_decodes_no_skipped_image(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"gamma": "inf", "num_train_epochs": 1, "max_steps": -1, "dataloader_num_workers": workers, "save_steps": 9,
               "save_strategy": "steps"}  # fmt: skip
    with decoded_by(monkeypatch, tmp_path / "notes") as notes:
        trainer_of("llava", tmp_path / "run", equal_posts(20), **options).train()
        before = [post_id for _, post_id in notes()][-20:]
        resumed = trainer_of("llava", tmp_path / "run", equal_posts(20), **options)
        notes()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
        after = [post_id for _, post_id in notes()]
    assert resumed.state.global_step == 10
    assert after == before[18:] and len(after) == 2


@pytest.mark.parametrize(("workers", "files", "accumulation"), [(0, 1, 2), (1, 1, 1), (2, 1, 1), (2, 2, 1)])
def test_a_resumed_stream_decodes_no_skipped_image(
    workers: int, files: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are read again from the start; with two files, by two workers."""
    texts = [f"text {number} of some words" for number in range(16)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    written = [write_posts(tmp_path / name, texts, (56, 48))[0] for name in ("one", "two")]
    for path in (tmp_path / "two").glob("*.jpg"):
        path.rename(tmp_path / "one" / f"two-{path.name}")
    written[1].write_text(written[1].read_text().replace('"image": "', '"image": "two-').replace('"id": "', '"id": "two-'))
    steps = 12 // accumulation

    def trainer() -> Any:
        stream = load_posts(written[:files], image_dir=tmp_path / "one", streaming=True)
        return trainer_of("llava", tmp_path / "run", stream, gamma="inf", max_steps=steps + 1, save_steps=steps - 1,
                          save_strategy="steps", dataloader_num_workers=workers,
                          gradient_accumulation_steps=accumulation, per_device_train_batch_size=1)  # fmt: skip

    with decoded_by(monkeypatch, tmp_path / "notes") as notes:
        straight = trainer()
        straight.train()
        everything = [post_id for _, post_id in notes()]
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps - 1}"))
        decoded = [post_id for _, post_id in notes()]
    assert losses(resumed) == losses(straight)
    assert set(decoded) == set(everything[accumulation * (steps - 1) :]) and len(decoded) < len(everything)


def test_the_pass_after_a_resumed_one_is_read_in_full() -> None:
    collator = SkippingCollator(len)
    collator.skip_first(2)
    assert [collator([0]) for _ in range(4)] == [{}, {}, 1, 1]
    collator.skip_first(0)
    assert collator([0]) == 1
