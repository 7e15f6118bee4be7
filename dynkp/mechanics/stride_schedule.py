"""How strongly each post is masked: a stride per post and modality that follows how the post fared.

Given   the ids of the training posts; after each visit, whether the masked variant passed the filter (c > τ).
Gives   the stride of a post's next visit; 1, which masks nothing, while the warm-up lasts.
Holds   strides belong to ids: the dataset's order, the batch and the rank do not matter. Within an epoch a post's stride
        stays; a visit decides about the next epoch. The state is plain JSON, and another dataset's is an error.

Rules, from the initial stride on (s = 2), never below 2:
- `adaptive` (the paper's): passed doubles s, failed halves it;
- `linear` (the ablation of its Table 5): passed adds 1, failed takes 1;
- `fixed` (of its Table 2): s stays.
With `freeze_failed` (the authors' code, not their paper) the first failure of a post in a modality, having lowered s, is
the last change: the post is still masked and filtered. Their code then lets the text's cosine decide on the image's
stride, an index error that is not repeated here: modalities know nothing of each other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynkp.mechanics.modality_masking import MODALITIES

SCHEDULES = ("adaptive", "fixed", "linear")
_LOWEST = 2


class StrideSchedule:
    """The strides of all posts.

    Args:
        post_ids (`Iterable[str]`): ids of the training posts, each once, in any order.
        schedule (`str`, *optional*, defaults to `"adaptive"`): `"adaptive"`, `"fixed"` or `"linear"`.
        initial_stride (`int`, *optional*, defaults to 2): s of the first masked visit, at least 2.
        warmup_epochs (`int`, *optional*, defaults to 1): epochs without masking, at least 0.
        freeze_failed (`bool`, *optional*, defaults to `False`): never change a stride again once it failed.

    Raises:
        ValueError: if an option is out of range, or two posts share an id.

    Example:

    ```python
    >>> schedule = StrideSchedule(["a", "b"])
    >>> schedule.strides(["a", "b"], "image", epoch=0), schedule.strides(["a", "b"], "image", epoch=1)
    ([1, 1], [2, 2])
    >>> schedule.record("a", "image", passed=True, epoch=1)
    >>> schedule.strides(["a", "b"], "image", epoch=2)
    [4, 2]
    ```
    """

    def __init__(
        self,
        post_ids: Iterable[str],
        schedule: str = "adaptive",
        initial_stride: int = 2,
        warmup_epochs: int = 1,
        freeze_failed: bool = False,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"`stride_schedule` is {schedule!r}: use one of {', '.join(SCHEDULES)}")
        if initial_stride < _LOWEST:
            raise ValueError(f"`initial_stride` is {initial_stride}, which masks nothing: give {_LOWEST} or more")
        if warmup_epochs < 0:
            raise ValueError(f"`warmup_epochs` is {warmup_epochs}: give 0 (mask from the start) or more")
        self.schedule, self.initial_stride = schedule, initial_stride
        self.warmup_epochs, self.freeze_failed = warmup_epochs, freeze_failed
        ordered = sorted(post_ids)
        self._ids = frozenset(ordered)
        if len(self._ids) < len(ordered):
            twice = next(post_id for post_id, following in zip(ordered, ordered[1:], strict=False) if post_id == following)
            raise ValueError(f"post {twice!r} is in the dataset twice, so its strides are not its own: give every post an `id`")
        digest = hashlib.sha256()
        for post_id in ordered:
            digest.update(f"{len(post_id)}:{post_id}".encode("utf-8", "surrogatepass"))
        # Of visited posts only: [stride of the epoch, stride of later epochs, epoch, frozen].
        self._visited: dict[str, dict[str, list[int]]] = {modality: {} for modality in MODALITIES}
        self._state = {"posts": len(ordered), "ids_sha256": digest.hexdigest(), "visited": self._visited}

    def masks(self, epoch: int) -> bool:
        """Whether any post is masked in this epoch (0 is the first); if not, a step costs plain fine-tuning."""
        return epoch >= self.warmup_epochs

    def strides(self, post_ids: Sequence[str], modality: str, epoch: int) -> list[int]:
        """The strides of some posts' `"text"` or `"image"` in an epoch; 1 masks nothing.

        Args:
            post_ids (`Sequence[str]`): posts of the dataset.
            modality (`str`): `"text"` or `"image"`.
            epoch (`int`): number of completed epochs.
        """
        if unknown := [post_id for post_id in post_ids if post_id not in self._ids]:
            raise ValueError(f"post {unknown[0]!r} is not in the training dataset the strides belong to")
        if not self.masks(epoch):
            return [1] * len(post_ids)
        return [self._stride(post_id, modality, epoch) for post_id in post_ids]

    def record(self, post_id: str, modality: str, passed: bool, epoch: int) -> None:
        """Take in a masked visit; only a post's first one in an epoch counts.

        On several ranks, record every rank's visits on every rank.

        Args:
            passed (`bool`): the variant was kept, c > τ.
            epoch (`int`): number of completed epochs, the one the stride was asked for.
        """
        (stride,) = self.strides([post_id], modality, epoch)
        before = self._visited[modality].get(post_id)
        if not self.masks(epoch) or (before is not None and before[2] >= epoch):
            return
        frozen = bool(before and before[3])
        following = stride if frozen else self._following(stride, passed)
        self._visited[modality][post_id] = [stride, following, epoch, int(frozen or (self.freeze_failed and not passed))]

    def shares(self, modality: str) -> dict[int, float]:
        """The histogram of strides: per stride, the share of the posts visited so far that will be masked with it next."""
        counts = Counter(following for _, following, _, _ in self._visited[modality].values())
        return {stride: count / counts.total() for stride, count in sorted(counts.items())}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold (JSON). Not a copy: it moves on with the schedule, and costs nothing to ask for."""
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: if the state belongs to other posts.
        """
        visited = {modality: dict(state["visited"][modality]) for modality in MODALITIES}
        strangers = sorted({post_id for posts in visited.values() for post_id in posts} - self._ids)
        if strangers or state["posts"] != len(self._ids) or state["ids_sha256"] != self._state["ids_sha256"]:
            named = f", among them {strangers[0]!r}, which the dataset lacks" if strangers else ""
            raise ValueError(
                f"the checkpoint's strides belong to {state['posts']} posts{named}; the dataset has {len(self._ids)}, and "
                "their ids differ. Resume with the dataset of the checkpoint (its order does not matter), or start anew."
            )
        for modality in MODALITIES:
            self._visited[modality].clear()
            self._visited[modality].update(visited[modality])  # entries are replaced, never changed

    def _stride(self, post_id: str, modality: str, epoch: int) -> int:
        entry = self._visited[modality].get(post_id)
        if entry is None:
            return self.initial_stride
        return entry[0] if epoch <= entry[2] else entry[1]

    def _following(self, stride: int, passed: bool) -> int:
        if self.schedule == "fixed":
            return stride
        if self.schedule == "linear":
            return stride + 1 if passed else max(_LOWEST, stride - 1)
        return 2 * stride if passed else max(_LOWEST, stride // 2)
