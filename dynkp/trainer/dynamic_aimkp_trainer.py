"""Dynamic CoT and AimKP combined: the target that Dynamic CoT selects, with AimKP's masks and filter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dynkp.batches.targets import Targets, mixed_targets
from dynkp.batches.typed_batches import PostBatch
from dynkp.mechanics.masked_views import FULL, MaskedViews
from dynkp.objectives.switching import below_threshold
from dynkp.objectives.token_loss import TargetLoss
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer


@dataclass
class DynamicAimKPConfig(AimKPConfig, DynamicCoTConfig):
    """Configuration of [`DynamicAimKPTrainer`]: the options of both methods. No paper has published values for both.

    Raises:
        ValueError: if an option is out of range, or not supported by this method.
    """

    task: str = field(
        default="dynamic_cot",
        metadata={"help": "Task, that is prompt and targets: 'dynamic_cot' (default) or 'aimkp' (keyphrases joined by ', ')."},
    )
    loss_normalization: str = field(
        default="sample",
        metadata={
            "help": "'sample' (default, Dynamic CoT's): mean over a target's tokens, then over posts. 'token' (AimKP's): mean "
            "over all target tokens of the optimizer step; long rationales then outweigh direct targets."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy == "multitask":
            raise ValueError(
                "`strategy` is 'multitask', which trains a post on two targets, while masked variants are filtered by the "
                "gradient of one. Choose 'dynamic', 'direct', 'cot' or 'random:p'."
            )


class DynamicAimKPTrainer(AimKPTrainer, DynamicCoTTrainer):
    """Dynamic CoT's switch together with AimKP's masking.

    During AimKP's warm-up, a step is Dynamic CoT's. Afterwards the direct loss given the full input selects the target of each
    post (Dynamic CoT, Eq. 5), and this target's losses given the full input, the text masked and the images masked are filtered
    and combined (AimKP, Eq. 3 and 4). The switch costs a forward pass over the tokens of the direct targets alone, behind the
    prompt that is computed for the full view anyway.

    It logs what both trainers log; the loss of the selected targets is `full_loss`. `strategy="direct"` is AimKP.

    Args:
        *args: as for [`~dynkp.trainer.post_trainer.PostTrainer`].
        **kwargs: as for [`~dynkp.trainer.post_trainer.PostTrainer`].

    Raises:
        ValueError: as for [`~dynkp.trainer.aimkp_trainer.AimKPTrainer`] and
            [`~dynkp.trainer.dynamic_cot_trainer.DynamicCoTTrainer`].

    Example:
    ```python
    trainer = DynamicAimKPTrainer(model, DynamicAimKPConfig(output_dir="out", gamma=0.4), train_dataset=posts)
    trainer.train()
    ```
    """

    _name = "Dynamic CoT and AimKP"
    method = "dynamic_aimkp"
    args: DynamicAimKPConfig

    def choose_targets(self, views: MaskedViews, inputs: PostBatch) -> Targets:
        """Select the target of each post by its direct loss given the full input (Dynamic CoT, Eq. 5).

        Args:
            views ([`~dynkp.mechanics.masked_views.MaskedViews`]): views of the batch, not yet run.
            inputs (`dict`): the batch.
        """
        _, easy = self.candidates(inputs)
        direct = TargetLoss(*torch.zeros(2, len(easy), device=easy.device))
        if self.args.strategy == "dynamic":
            with torch.no_grad():
                direct = views.loss(FULL, inputs["direct"])  # L_sft = NLL(y^s | x)
            easy = easy & below_threshold(direct.mean, self.gamma.value)  # L_sft < γ
        self.record_choices(inputs, easy, direct)
        return mixed_targets(inputs["direct"], inputs["reasoning"], easy)  # y^d
