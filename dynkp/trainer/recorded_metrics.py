"""Metrics that a method records while it computes losses, and that are logged as means over posts, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer


class MetricRecords:
    """Weighted sums of metrics, from which their means are taken.

    Example:
        >>> records = MetricRecords()
        >>> records.add("loss", torch.tensor([1.0, 3.0]), torch.tensor([True, False]))
        >>> records.add("loss", torch.tensor([2.0]))
        >>> records.take()
        {'loss': 1.5}
        >>> len(records)
        0
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        """Return the number of metrics with values."""
        return len(self._sums)

    def clear(self) -> None:
        """Forget all values."""
        self._sums.clear()

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add values to the mean of a metric; nothing is copied from the device.

        Args:
            name (`str`): the metric.
            values (`torch.Tensor`): any number of values. Those with weight zero may be infinite or NaN.
            weights (`torch.Tensor`, *optional*): their weights; a boolean mask selects values. All ones, if `None`.
        """
        values = values.detach().to(torch.float64 if values.device.type == "cpu" else torch.float32)
        weights = torch.ones_like(values) if weights is None else weights.detach().to(values.dtype)
        values = values.masked_fill(weights == 0, 0.0)
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += (values * weights).sum()
        entry[1] += weights.sum()

    def take(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """Return the means of all values since the last call, and forget the values.

        Args:
            gather (`Callable`, *optional*): joins the lists of all ranks; every rank must call `take` then.

        Returns:
            `dict[str, float]`: a mean per metric. A metric whose weights add up to zero has no mean and is left out.
        """
        local = [(name, float(total), float(weight)) for name, (total, weight) in self._sums.items()]
        self.clear()
        sums: dict[str, list[float]] = {}
        for name, total, weight in gather(local):
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        return {name: total / weight for name, (total, weight) in sums.items() if weight}


class RecordedMetrics(Trainer):
    """The part of a trainer that logs what its method records."""

    _tr_loss: torch.Tensor  # Trainer's, since the last log

    def __init__(self, *args: Any, **kwargs: Any):
        self._records = {"train": MetricRecords(), "eval": MetricRecords()}
        self._eval_prefix = "eval"
        super().__init__(*args, **kwargs)

    def record(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add values to the mean that is logged under a name: over posts, micro-batches and ranks.

        Args:
            name (`str`): key in the log; evaluation prefixes it with `eval_`.
            values (`torch.Tensor`): one number per post, or any number of them.
            weights (`torch.Tensor`, *optional*): their weights; a boolean mask selects values. All ones, if `None`.
        """
        self._records["train" if self.model.training else "eval"].add(name, values, weights)

    def derive_metrics(self, logs: dict[str, float], prefix: str) -> None:
        """Add metrics that follow from recorded ones.

        Args:
            logs (`dict`): what is about to be logged; changed in place.
            prefix (`str`): prefix of the names in `logs`: empty in training, such as `eval_` in evaluation.
        """

    def gather_list(self, values: list[Any]) -> list[Any]:
        """Join the lists of all ranks, one after the other. Collective: every rank must call it.

        Args:
            values (`list`): this rank's list; its elements must be picklable.
        """
        return gather_object(values) if self.accelerator.num_processes > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, those recorded since the last call among them. Collective: every rank must call it.

        Args:
            logs (`dict`): what Trainer logs; recorded metrics are added.
            start_time (`float`, *optional*): as in `transformers.Trainer.log`.
        """
        training = self.model.training
        prefix = "" if training else f"{self._eval_prefix}_"
        means = self._records["train" if training else "eval"].take(self.gather_list)
        logs.update({f"{prefix}{name}": mean for name, mean in means.items()})
        self.derive_metrics(logs, prefix)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate, as `transformers.Trainer.evaluate` does.

        Args:
            *args: as in `transformers.Trainer.evaluate`.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): prefix of the metrics' names; `"eval_NAME"` for one of
                several evaluation sets.
            **kwargs: as in `transformers.Trainer.evaluate`.

        Returns:
            `dict[str, float]`: the metrics.
        """
        self._eval_prefix = metric_key_prefix
        self._records["eval"].clear()  # of a call of `predict`, which logs nothing
        return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer would take the loss since the last log from its own rank, whose posts are a part of all.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args, **kwargs)
