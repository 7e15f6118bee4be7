"""Invariants of the transformers engine (more of it in tests/prediction/test_generation.py):

- with a seed, the draws of a batch depend on the seed and its ids alone, and PyTorch's global random state is kept.
"""

from __future__ import annotations

import torch

from dynkp.prediction.generation_tasks import KeyphraseGenerationTask
from dynkp.prediction.transformers_engine import TransformersEngine
from tests.support.tiny_models import build


def test_sampling_is_seeded_by_batch():
    model, processor = build("llama")
    task = KeyphraseGenerationTask(processor)
    engine = TransformersEngine(model, task, max_new_tokens=8, do_sample=True, num_beams=2, temperature=2.0)
    rows = [{"id": str(index), "text": "a dog"} for index in range(2)]
    before = torch.get_rng_state()
    first, again, other = engine(rows, seed=1), engine(rows, seed=1), engine(rows, seed=2)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
