"""Run by test_generative_evaluation.py on two ranks: evaluate a saved model, alone and with an adapter.

Each rank writes its metrics.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.support.evaluation_posts import LEARNS, evaluation_posts
from tests.support.posts import rows
from tests.support.trainers import trainer_of


def main(folder: Path) -> None:
    for name in ("full", "lora"):
        model = AutoModelForImageTextToText.from_pretrained(folder / "full")
        if name == "lora":
            model = PeftModel.from_pretrained(model, str(folder / "lora"))
        out, posts = folder / "out", evaluation_posts()
        trainer = trainer_of("llava", out, rows("llava", 6), model=model, eval_dataset=posts, ddp_backend="gloo", **LEARNS)
        metrics = trainer.evaluate()
        metrics["world_size"] = trainer.accelerator.num_processes
        (folder / f"metrics.{name}.{trainer.accelerator.process_index}.json").write_text(json.dumps(metrics))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
