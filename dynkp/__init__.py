"""Train vision-language models to predict keyphrases, on top of TRL.

`import dynkp` is cheap: a name is imported from its module when it is first used, so torch is loaded by the trainers
and by nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "AimKPConfig": "dynkp.trainer.aimkp_config",
    "AimKPTrainer": "dynkp.trainer.aimkp_trainer",
    "DynamicAimKPConfig": "dynkp.trainer.dynamic_aimkp_trainer",
    "DynamicAimKPTrainer": "dynkp.trainer.dynamic_aimkp_trainer",
    "DynamicCoTConfig": "dynkp.trainer.dynamic_cot_config",
    "DynamicCoTTrainer": "dynkp.trainer.dynamic_cot_trainer",
    "KeyphraseConfig": "dynkp.trainer.post_config",  # of earlier versions: PostConfig
    "KeyphraseTask": "dynkp.data.tasks",
    "KeyphraseTrainer": "dynkp.trainer.post_trainer",  # of earlier versions: PostTrainer
    "MulCoTRDConfig": "dynkp.trainer.mulcot_rd_config",
    "MulCoTRDTrainer": "dynkp.trainer.mulcot_rd_trainer",
    "PairedTargetCollator": "dynkp.batches.collators",
    "PostConfig": "dynkp.trainer.post_config",
    "PostTrainer": "dynkp.trainer.post_trainer",
    "REASONING_TASKS": "dynkp.data.reasoning_tasks",
    "ReasoningTask": "dynkp.data.reasoning_tasks",
    "TASKS": "dynkp.data.tasks",
    "generate_keyphrases": "dynkp.prediction.generation",
    "generate_reasoning": "dynkp.prediction.generation",
    "load_metric": "dynkp.mmkp_f1.mmkp_f1",
    "load_posts": "dynkp.data.sources",
    "load_sentiment_posts": "dynkp.data.sentiment_posts",
    "mix_posts": "dynkp.data.mixing",
    "parse_answer": "dynkp.data.tasks",
    "score_keyphrases": "dynkp.mmkp_f1.scoring",
    "validate_posts": "dynkp.data.posts",
    "write_predictions": "dynkp.prediction.prediction_files",
}

__all__ = ["__version__", *_EXPORTS]  # the table above is the only list of names

if TYPE_CHECKING:  # what editors and mypy see
    from dynkp.batches.collators import PairedTargetCollator as PairedTargetCollator
    from dynkp.data.mixing import mix_posts as mix_posts
    from dynkp.data.posts import validate_posts as validate_posts
    from dynkp.data.reasoning_tasks import REASONING_TASKS as REASONING_TASKS
    from dynkp.data.reasoning_tasks import ReasoningTask as ReasoningTask
    from dynkp.data.sentiment_posts import load_sentiment_posts as load_sentiment_posts
    from dynkp.data.sources import load_posts as load_posts
    from dynkp.data.tasks import TASKS as TASKS
    from dynkp.data.tasks import KeyphraseTask as KeyphraseTask
    from dynkp.data.tasks import parse_answer as parse_answer
    from dynkp.mmkp_f1.mmkp_f1 import load_metric as load_metric
    from dynkp.mmkp_f1.scoring import score_keyphrases as score_keyphrases
    from dynkp.prediction.generation import generate_keyphrases as generate_keyphrases
    from dynkp.prediction.generation import generate_reasoning as generate_reasoning
    from dynkp.prediction.prediction_files import write_predictions as write_predictions
    from dynkp.trainer.aimkp_config import AimKPConfig as AimKPConfig
    from dynkp.trainer.aimkp_trainer import AimKPTrainer as AimKPTrainer
    from dynkp.trainer.dynamic_aimkp_trainer import DynamicAimKPConfig as DynamicAimKPConfig
    from dynkp.trainer.dynamic_aimkp_trainer import DynamicAimKPTrainer as DynamicAimKPTrainer
    from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig as DynamicCoTConfig
    from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer as DynamicCoTTrainer
    from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig as MulCoTRDConfig
    from dynkp.trainer.mulcot_rd_trainer import MulCoTRDTrainer as MulCoTRDTrainer
    from dynkp.trainer.post_config import KeyphraseConfig as KeyphraseConfig
    from dynkp.trainer.post_config import PostConfig as PostConfig
    from dynkp.trainer.post_trainer import KeyphraseTrainer as KeyphraseTrainer
    from dynkp.trainer.post_trainer import PostTrainer as PostTrainer


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dynkp' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value  # later uses do not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
