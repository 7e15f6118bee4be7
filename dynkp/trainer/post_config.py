"""Options that every trainer has, on top of TRL's `SFTConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from dynkp.data.choices import did_you_mean
from dynkp.mmkp_f1.scoring import CONVENTIONS


@dataclass
class PostConfig(SFTConfig):
    """Configuration of [`~dynkp.trainer.post_trainer.PostTrainer`]: `trl.SFTConfig`, and options of posts and prompts.

    Options of `SFTConfig` keep their meaning; `max_length` and `remove_unused_columns` have another default.

    Raises:
        ValueError: if an option is out of range, or not supported with posts.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "processor_kwargs"]

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Greatest number of tokens of prompt plus target, image placeholders included; targets are cut at their "
            "end. None (default) cuts nothing: a reasoning target that is cut loses its answer and trains endless reasoning."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Must stay False: the collator needs the posts' own columns."},
    )
    task: str = field(
        default="dynamic_cot",
        metadata={"help": "Task, that is prompt and targets: 'dynamic_cot' or 'aimkp' (keyphrases joined by ', ')."},
    )
    separator: str | None = field(
        default=None,
        metadata={"help": "Separator of the keyphrases in a target. None (default) takes the task's own, '; '."},
    )
    on_invalid: str = field(
        default="error",
        metadata={
            "help": "What to do with posts that cannot be trained on (unreadable image, separator inside a keyphrase, "
            "repeated id, ...): 'error' (default) lists them and stops, 'skip' drops them and lists them in "
            "`invalid_posts.<set>.jsonl` in `output_dir`."
        },
    )
    check_images: bool = field(
        default=True,
        metadata={"help": "Whether to open every image once before training starts, to find unreadable ones."},
    )
    unique_ids: bool = field(
        default=True,
        metadata={"help": "Whether two posts with the same id are an error. False for a mixture that repeats posts."},
    )
    processor_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the processor that is loaded with the model's name, as JSON; saved with the model. Qwen-VL's "
            '{"min_pixels": 451584, "max_pixels": 451584} makes every image about 576 tokens.'
        },
    )
    pad_images_to_squares: bool = field(
        default=False,
        metadata={
            "help": "Whether images are padded to squares rather than cropped (LLaVA-1.5, as in its own training and in "
            "AimKP); saved with the model."
        },
    )
    loss_normalization: str = field(
        default="sample",
        metadata={
            "help": "'sample' (default): mean over a target's tokens, then over posts. 'token': mean over all target tokens of "
            "the optimizer step."
        },
    )
    trailing_template_tokens: bool = field(
        default=True,
        metadata={
            "help": "Whether losses (ℓ and L) include the whitespace that the chat template writes around the end-of-turn "
            "token: the line break behind Qwen's '<|im_end|>', LLaVA's blank before '</s>'. False leaves it out of targets."
        },
    )
    freeze_vision_tower: bool = field(
        default=True,
        metadata={
            "help": "Whether the vision tower keeps its weights while projector and language model are trained, as in the "
            "Dynamic CoT paper (default True)."
        },
    )
    prompt_backend: str = field(
        default="auto",
        metadata={
            "help": "How a prompt with several targets is computed: 'shared' runs the prompt once, 'plain' once per target "
            "(slower, same numbers), 'auto' (default) shares where the model can and says so once where it cannot."
        },
    )

    eval_generation_posts: int | None = field(
        default=None,
        metadata={
            "help": "How many evaluation posts, from the start, are generated for and scored at each evaluation: all by "
            "default (None), 0 for the loss alone."
        },
    )
    eval_max_new_tokens: int = field(
        default=512,
        metadata={
            "help": "Greatest length of an output in evaluation, in tokens; the default is that of `dynkp predict`. Direct "
            "answers need no more than 32, and early in a run outputs that do not end cost the most."
        },
    )
    eval_convention: str = field(
        default="cmkp",
        metadata={"help": "Convention of the scores in evaluation: 'cmkp', 'aimkp', 'padded' or 'unpadded' (docs/metric.md)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.eval_convention, "eval_convention", CONVENTIONS)
        if self.eval_max_new_tokens < 1:
            raise ValueError(f"`eval_max_new_tokens` is {self.eval_max_new_tokens}; an output needs at least 1 token.")
        if self.eval_generation_posts is not None and self.eval_generation_posts < 0:
            raise ValueError(f"`eval_generation_posts` is {self.eval_generation_posts}; give a number >= 0, or None for all.")
        one_of(self.on_invalid, "on_invalid", ("error", "skip"))
        one_of(self.loss_normalization, "loss_normalization", ("sample", "token"))
        one_of(self.prompt_backend, "prompt_backend", ("auto", "shared", "plain"))
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` is True, which would remove text and keyphrases before the collator. Leave it False."
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}; prompt and target need at least 2 tokens. Use None or more.")
        if self.packing or self.padding_free:
            raise ValueError(
                "`packing` and `padding_free` concatenate posts, which a prompt shared by two targets does not allow. Leave "
                "both False."
            )
        # Losses are computed by the trainers, on targets alone: options that would have no effect are errors.
        computed_here = {
            "loss_type": (self.loss_type, "nll"),
            "label_smoothing_factor": (self.label_smoothing_factor, 0.0),
            "assistant_only_loss": (self.assistant_only_loss, False),
            "completion_only_loss": (self.completion_only_loss is False, False),
        }
        for name, (value, only) in computed_here.items():
            if value != only:
                raise ValueError(
                    f"`{name}` is set, but these trainers compute their own loss: the negative log-likelihood of the "
                    f"target's tokens, nothing else. Leave `{name}` at its default."
                )


KeyphraseConfig = PostConfig
"""The name of [`PostConfig`] in earlier versions, before it configured training on sentiment too."""


def one_of(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Refuse an option's value that is not among its choices.

    Args:
        value (`str`): the value.
        name (`str`): name of the option.
        choices (`tuple[str, ...]`): the values it may have.

    Raises:
        ValueError: naming the option, its value and the choices, with a suggestion for a misspelt value.
    """
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(map(repr, choices))}.{did_you_mean(value, choices)}")
