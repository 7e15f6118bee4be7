"""The batches that the collators return, as typed dictionaries.

B is the number of posts, P the length of the longest prompt and T that of the longest target, in tokens.
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict

import torch

from dynkp.batches.branches import Branches
from dynkp.batches.prompt_layout import PromptLayout
from dynkp.batches.targets import Targets

PromptInputs: TypeAlias = dict[str, Any]
"""What the processor makes of B prompts, padded on the left: `input_ids` and `attention_mask`, both (B, P), and for images
whatever the model's family takes (`pixel_values`, `image_grid_thw`, `cross_attention_mask`, ...)."""


class PostBatch(TypedDict):
    """A batch of [`~dynkp.batches.collators.PairedTargetCollator`]: prompts and both targets of B posts.

    Attributes:
        prompt: the prompts.
        direct: direct targets, (B, T).
        reasoning: reasoning targets, (B, T); a post without rationale has length 0.
        has_rationale: (B,), bool: whether the post has a reasoning target.
        id: the B ids.
    """

    prompt: PromptInputs
    direct: Targets
    reasoning: Targets
    has_rationale: torch.Tensor
    id: list[str]


class MaskedViewBatch(PostBatch):
    """A batch of [`~dynkp.batches.masking_collator.MaskingCollator`]: a [`PostBatch`] whose prompts can be masked.

    Attributes:
        layouts: B layouts: where the text and the images of each post are in its prompt.
    """

    layouts: list[PromptLayout]


class SinglePostsBatch(MaskedViewBatch):
    """A batch of [`~dynkp.batches.masking_collator.SinglePostsCollator`]: a [`MaskedViewBatch`], whole and post by post.

    Attributes:
        single_posts: B batches of one post each.
    """

    single_posts: list[MaskedViewBatch]


class TwoTaskBatch(TypedDict):
    """A batch of [`~dynkp.batches.two_task_collator.TwoTaskCollator`]: two prompts and two targets of B posts.

    Attributes:
        prompts: the label prompts and the response-chain prompts, as branches `"label"` and `"chain"`.
        label: label targets, (B, T).
        chain: response-chain targets, (B, T); a post without rationale has length 0.
        has_rationale: (B,), bool: whether the post has a response-chain target.
        id: the B ids.
    """

    prompts: Branches
    label: Targets
    chain: Targets
    has_rationale: torch.Tensor
    id: list[str]


class SoftLabelBatch(TwoTaskBatch):
    """A [`TwoTaskBatch`] with the soft labels of MulCoT-RD's assistant.

    Attributes:
        soft_labels: per task the fields of [`~dynkp.objectives.distillation.SoftLabels`] at the tokens of its targets.
    """

    soft_labels: dict[str, dict[str, Any]]
