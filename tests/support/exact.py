"""What tests in float64 share."""

from __future__ import annotations

from typing import Any

import torch

TOLERANCE = 1e-10


def double(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: double(value) for key, value in batch.items()}
    return batch.double() if isinstance(batch, torch.Tensor) and batch.is_floating_point() else batch
