"""Options of MulCoT-RD, for the assistant and for the student."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

from dynkp.data.choices import did_you_mean
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.trainer.post_config import PostConfig

POSITIONS = ("answer", "all")
# The paper's, for lr_scheduler_type="reduce_lr_on_plateau".
PLATEAU = {"factor": 0.5, "patience": 2}


@dataclass
class MulCoTRDConfig(PostConfig):
    """Configuration of [`~dynkp.trainer.mulcot_rd_trainer.MulCoTRDTrainer`].

    Defaults are the paper's (Findings of ACL 2026) for the student. Without `assistant` and `soft_labels` there are hard labels
    only: that is the assistant's own training.

    Raises:
        ValueError: if an option is out of range, or not supported by this method.
    """

    _VALID_DICT_FIELDS = [*PostConfig._VALID_DICT_FIELDS, "task_weights"]

    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the schedule. 'reduce_lr_on_plateau' follows `metric_for_best_model` (paper: accuracy; "
            "'loss' if not given), with the paper's factor 0.5 and patience 2 unless given here."
        },
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW (paper: 3e-4), for adapters."})
    task: str = field(
        default="masc",
        metadata={
            "help": "What is predicted of a post: 'masc' (sentiment towards an aspect), 'msc' (sentiment of the whole post) or "
            "'keyphrases'; each as a response chain and as the answer alone."
        },
    )
    task_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "'w_k': weight of each task's loss, as JSON. None (default) is the paper's {\"chain\": 1, \"label\": 1}. "
            "A post without a rationale has the label's loss only."
        },
    )
    distillation_weight: float = field(
        default=0.3,
        metadata={
            "help": "'λ': share of the assistant's soft labels in each task's loss, against 1-λ for the hard ones. Without "
            "`assistant` and `soft_labels` it is taken as 0. Paper: 0.3."
        },
    )
    temperature: float = field(
        default=2.0,
        metadata={"help": "'T': what both models' logits are divided by before they are compared; no factor T². Paper: 2.0."},
    )
    kd_positions: str = field(
        default="answer",
        metadata={
            "help": "Tokens at which student and assistant are compared: 'answer' (default), or 'all': the prompt's too, as "
            "in the authors' code, padding excepted; slower, and only with `assistant`."
        },
    )
    assistant: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the trained assistant (or the folder of an adapter), whose soft labels are computed "
            "during training. With `soft_labels` it is not loaded, only compared with the model that computed them."
        },
    )
    assistant_dtype: str = field(
        default="auto",
        metadata={"help": "Type of the assistant's weights: 'auto' (default, as saved), 'float32', 'bfloat16' or 'float16'."},
    )
    assistant_device: str | None = field(
        default=None, metadata={"help": "The assistant's device, such as 'cuda:1'. None (default): the student's."}
    )
    soft_labels: str | None = field(
        default=None,
        metadata={"help": "Folder of soft labels written by `dynkp distill cache`; the assistant is not loaded then."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            # torch's default mode is "min", whatever the metric: a rising accuracy would count as no progress.
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **PLATEAU, **cast(dict[str, Any], self.lr_scheduler_kwargs or {})}
        if self.task not in REASONING_TASKS:
            raise ValueError(
                f"`task` is {self.task!r}; choose one of {', '.join(map(repr, REASONING_TASKS))}."
                f"{did_you_mean(self.task, REASONING_TASKS)}"
            )
        if self.separator is not None:
            raise ValueError(f"`separator` is {self.separator!r}, but task {self.task!r} has its own. Leave it None.")
        if not self.trailing_template_tokens:
            raise ValueError(
                "`trailing_template_tokens` is False, but MulCoT-RD compares student and assistant at all tokens that the chat "
                "template writes, and so do soft labels on the disk. Leave it True."
            )
        _ = self.parsed_task_weights
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise ValueError(f"`distillation_weight` is {self.distillation_weight}; it is a share between 0 and 1.")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0 and finite.")
        if self.kd_positions not in POSITIONS:
            raise ValueError(f"`kd_positions` is {self.kd_positions!r}; choose one of {', '.join(map(repr, POSITIONS))}.")
        if self.kd_positions == "all" and self.soft_labels is not None:
            raise ValueError(
                "`kd_positions` is 'all', but `soft_labels` contains those of the answers alone. Give `assistant` instead, or "
                "kd_positions='answer'."
            )
        if self.assistant_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"`assistant_dtype` is {self.assistant_dtype!r}; choose 'auto', 'float32', 'bfloat16' or 'float16'."
            )

    @property
    def parsed_task_weights(self) -> dict[str, float]:
        """w_k of the tasks `"label"` and `"chain"`, from the option `task_weights`.

        Raises:
            ValueError: if `task_weights` does not give both, finite and not negative, and the label's above 0.
        """
        if self.task_weights is None:
            return {"label": 1.0, "chain": 1.0}
        wanted = (
            f"`task_weights` is {self.task_weights!r}; give the weights of both tasks, finite and not negative, such as "
            '{"chain": 1.0, "label": 1.0}. The label\'s must be above 0: a post without a rationale would have no loss.'
        )
        try:
            given = json.loads(self.task_weights) if isinstance(self.task_weights, str) else dict(self.task_weights)
            weights = {name: float(given.pop(name)) for name in ("label", "chain")}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(wanted) from None
        if given or not all(0.0 <= weight < float("inf") for weight in weights.values()) or not weights["label"]:
            raise ValueError(wanted)
        return weights
