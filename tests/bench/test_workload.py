"""The suites' model, posts and trainers.

Holds: adapters and projector are trained, nothing else; posts have the wanted lengths in tokens, and the same ones at every
call; a trainer's collator makes batches of them.
"""

from __future__ import annotations

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.bench.workload import QUICK, build_model, build_processor, draw_posts


def test_only_adapters_and_projector_are_trained() -> None:
    names = [name for name, value in build_model(QUICK, build_processor(QUICK)).named_parameters() if value.requires_grad]
    assert all("lora_" in name or "multi_modal_projector" in name for name in names)
    assert {"language_model", "multi_modal_projector"} == {
        part for name in names for part in ("language_model", "multi_modal_projector", "vision_tower") if part in name
    }


def test_posts_have_the_wanted_lengths() -> None:
    processor = build_processor(QUICK)
    collate = PairedTargetCollator(processor)
    batch = collate(draw_posts(QUICK))
    assert batch["direct"]["lengths"] == [QUICK.direct_tokens] * 4
    assert batch["reasoning"]["lengths"] == [QUICK.reasoning_tokens] * 4
    unknown = processor.tokenizer.unk_token_id
    assert batch["prompt"]["attention_mask"].all() and unknown not in batch["prompt"]["input_ids"]
    placeholders = batch["prompt"]["input_ids"] == processor.image_token_id
    assert placeholders.sum(dim=1).tolist() == [QUICK.image_tokens] * 4
    some = collate(draw_posts(QUICK, with_rationale=[True, False, False, True]))
    assert some["has_rationale"].tolist() == [True, False, False, True]
    assert not collate(draw_posts(QUICK._replace(reasoning_tokens=0)))["has_rationale"].any()
    unequal = collate(draw_posts(QUICK._replace(reasoning_tokens=32), unequal=True))
    assert sorted(unequal["reasoning"]["lengths"]) == [16, 26, 37, 48] and sorted(unequal["direct"]["lengths"]) == [2, 3, 4, 6]
    assert draw_posts(QUICK, unequal=True)[1]["text"] == draw_posts(QUICK, unequal=True)[1]["text"]


def test_both_tasks_prompts_differ_in_known_words() -> None:
    processor = build_processor(QUICK)
    batch = TwoTaskCollator(processor, "masc")(draw_posts(QUICK))
    ends = batch["prompts"]["ends"]
    assert ends["chain"]["input_ids"].shape[1] > ends["label"]["input_ids"].shape[1] > 1
    assert processor.tokenizer.unk_token_id not in ends["chain"]["input_ids"]
