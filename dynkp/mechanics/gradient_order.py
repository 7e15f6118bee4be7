"""Gradients of the same parameters in the same order on every rank.

DeepSpeed's ZeRO-2 copies gradients into one buffer as they arrive and reduces it position by position. Ranks whose backward
passes differ (images on one rank only, one target or two) would add up gradients of different parameters, or abort. DDP's
buckets are fixed beforehand and need none of this.

[`gradients_in_order`] returns a zero to add to the loss. In the backward pass, every trainable parameter then gets a gradient
(zeros, where nothing else reaches it), none before all others have theirs too, and in the same order in every process, whatever
else each of them computes. The values of gradients are unchanged.

Cost: one addition per parameter. All gradients exist at the same time, as they do anyway where a parameter is used in more than
one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def gradients_in_order(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Create a zero whose backward pass runs after that of everything computed later.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): the parameters that must all get a gradient; frozen ones are left out.

    Returns:
        `torch.Tensor`: float32 zero, a scalar, to be added to a loss that is computed after this call.

    Example:
        >>> used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        >>> zero = gradients_in_order([used, unused])
        >>> (3 * used.sum() + zero).backward()
        >>> used.grad, unused.grad
        (tensor([3.]), tensor([0.]))
    """
    return _Zero.apply(*(parameter for parameter in parameters if parameter.requires_grad))


class _Zero(torch.autograd.Function):
    # Autograd runs the node that was created last first: this one, created before all others, waits for them.

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Expanded from a single element: no second set of gradients is allocated.
        return tuple(parameter.new_zeros(()).expand_as(parameter) for parameter in ctx.saved_tensors)
