"""Strides of AimKP's masks: one per post and modality, which follows the filter's decisions on the post.

A stride of 1 masks nothing; the first epochs, the warm-up, have it. Afterwards a post starts at the initial stride, and after
each visit its stride for the next epoch is changed by one of these rules, never below 2:

- `adaptive` (the paper's): doubled if the variant was kept (c > τ), else halved;
- `linear` (the ablation of the paper's Table 5): raised by 1 if the variant was kept, else lowered by 1;
- `fixed` (the ablation of Table 2): unchanged.

With `freeze_failed` (the authors' code, not their paper), a stride never changes again after the first variant that was not
kept, which still lowers it; the post is masked and filtered all the same. The authors' code then lets the text's cosine decide
on the image's stride, which is an indexing error; here, modalities do not influence each other.

Strides belong to the ids of posts: the order of the dataset, the batch and the rank do not matter. The state is plain JSON, and
the state of other posts is an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dynkp.mechanics.modality_masking import MODALITIES

SCHEDULES = ("adaptive", "fixed", "linear")
_LOWEST = 2


class StrideSchedule:
    """The strides of all posts.

    Args:
        post_ids (`Iterable[str]`): ids of the training posts, each once, in any order.
        schedule (`str`, *optional*, defaults to `"adaptive"`): `"adaptive"`, `"fixed"` or `"linear"`.
        initial_stride (`int`, *optional*, defaults to 2): stride of the first masked visit, at least 2.
        warmup_epochs (`int`, *optional*, defaults to 1): epochs without masking, at least 0.
        freeze_failed (`bool`, *optional*, defaults to `False`): never change a stride again after a variant was not kept.

    Raises:
        ValueError: if an option is out of range, or two posts have the same id.

    Example:
        >>> schedule = StrideSchedule(["a", "b"])
        >>> schedule.strides(["a", "b"], "image", epoch=0), schedule.strides(["a", "b"], "image", epoch=1)
        ([1, 1], [2, 2])
        >>> schedule.record("a", "image", passed=True, epoch=1)
        >>> schedule.strides(["a", "b"], "image", epoch=2)
        [4, 2]
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
            twice = next(post_id for post_id, following in pairwise(ordered) if post_id == following)
            raise ValueError(f"post {twice!r} is in the dataset twice, so its strides are not its own: give every post an `id`")
        digest = hashlib.sha256()
        for post_id in ordered:
            digest.update(f"{len(post_id)}:{post_id}".encode("utf-8", "surrogatepass"))
        # Of visited posts only: [stride of the epoch, stride of later epochs, epoch, frozen].
        self._visited: dict[str, dict[str, list[int]]] = {modality: {} for modality in MODALITIES}
        self._state = {"posts": len(ordered), "ids_sha256": digest.hexdigest(), "visited": self._visited}

    def masks(self, epoch: int) -> bool:
        """Return whether posts are masked in an epoch; if not, a step costs as much as plain fine-tuning.

        Args:
            epoch (`int`): number of completed epochs.
        """
        return epoch >= self.warmup_epochs

    def strides(self, post_ids: Sequence[str], modality: str, epoch: int) -> list[int]:
        """Return the strides of some posts in an epoch.

        Args:
            post_ids (`Sequence[str]`): posts of the dataset.
            modality (`str`): `"text"` or `"image"`.
            epoch (`int`): number of completed epochs.

        Returns:
            `list[int]`: one per post; 1 masks nothing.

        Raises:
            ValueError: if a post is not in the dataset.
        """
        if unknown := [post_id for post_id in post_ids if post_id not in self._ids]:
            raise ValueError(f"post {unknown[0]!r} is not in the training dataset the strides belong to")
        if not self.masks(epoch):
            return [1] * len(post_ids)
        return [self._stride(post_id, modality, epoch) for post_id in post_ids]

    def record(self, post_id: str, modality: str, passed: bool, epoch: int) -> None:
        """Record a masked visit; only a post's first visit in an epoch counts.

        With several ranks, every rank must record the visits of all ranks.

        Args:
            post_id (`str`): the post.
            modality (`str`): `"text"` or `"image"`.
            passed (`bool`): whether the variant was kept, c > τ.
            epoch (`int`): number of completed epochs: the one that the stride was asked for.
        """
        (stride,) = self.strides([post_id], modality, epoch)
        before = self._visited[modality].get(post_id)
        if not self.masks(epoch) or (before is not None and before[2] >= epoch):
            return
        frozen = bool(before and before[3])
        following = stride if frozen else self._following(stride, passed)
        self._visited[modality][post_id] = [stride, following, epoch, int(frozen or (self.freeze_failed and not passed))]

    def shares(self, modality: str) -> dict[int, float]:
        """Return the distribution of the next strides over the posts that were visited so far.

        Args:
            modality (`str`): `"text"` or `"image"`.

        Returns:
            `dict[int, float]`: per stride, the share of posts that will be masked with it next.
        """
        counts = Counter(following for _, following, _, _ in self._visited[modality].values())
        return {stride: count / counts.total() for stride, count in sorted(counts.items())}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON values.

        It is not a copy: it changes with the schedule, and costs nothing to ask for.
        """
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state (`Mapping`): what [`state`] returned.

        Raises:
            ValueError: if it belongs to other posts.
        """
        visited = {modality: dict(state["visited"][modality]) for modality in MODALITIES}
        unknown = sorted({post_id for posts in visited.values() for post_id in posts} - self._ids)
        if unknown or state["posts"] != len(self._ids) or state["ids_sha256"] != self._state["ids_sha256"]:
            named = f", among them {unknown[0]!r}, which the dataset lacks" if unknown else ""
            raise ValueError(
                f"the checkpoint's strides belong to {state['posts']} posts{named}; the dataset has {len(self._ids)}, and "
                "their ids differ. Resume with the dataset of the checkpoint (its order does not matter), or start a new run."
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
