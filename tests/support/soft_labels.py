"""An assistant on a tiny model, and folders of its soft labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.data.rows import normalise_posts
from dynkp.distillation.assistant import Assistant
from dynkp.distillation.soft_labels import SoftLabelCache, SoftLabelWriter, task_fingerprint, write_soft_labels
from tests.support.reasoning_trainers import BRIEF, reasoning_rows
from tests.support.tiny_models import build

# More tokens than any vocabulary has.
ALL = 10**6


def assistant_model(family: str = "llava") -> Any:
    model, _ = build(family, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


def posts_of(family: str = "llava", count: int = 6) -> Dataset:
    return normalise_posts(reasoning_rows(family, count))


def write_labels(folder: Path, posts: Any = None, top_k: int = ALL, family: str = "llava", **options: Any) -> SoftLabelCache:
    """Write the labels of `assistant_model`; `options` replace settings."""
    _, processor = build(family)
    assistant = Assistant(assistant_model(family), getattr(processor, "tokenizer", processor))
    settings = {"assistant": "tiny", "task": task_fingerprint(BRIEF), "temperature": 2.0, "top_k": top_k}
    settings |= {"vocabulary": assistant.vocabulary, **options}
    writer = SoftLabelWriter(folder, settings, assistant.tokenizer)
    try:
        posts = posts_of(family) if posts is None else posts
        how = {"top_k": top_k, "temperature": settings["temperature"], "vocabulary": settings["vocabulary"]}
        write_soft_labels(writer, assistant, TwoTaskCollator(processor, BRIEF), posts, batch_size=4, progress=False, **how)
    finally:
        writer.close()
    return SoftLabelCache(folder)
