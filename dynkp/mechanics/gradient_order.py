"""Every rank hands over the gradients of the same parameters in the same order.

Given: the trainable parameters, before the forward pass. Gives: a zero to add to the loss. Holds: in the backward pass
every one of these parameters gets a gradient (zeros where nothing else reached it), none before all others have theirs
too, and in the same order in every process, whatever else each of them computed. Values are those without it.

DeepSpeed's ZeRO-2 puts gradients into one buffer as they arrive and reduces it position by position. Ranks whose
backward passes differ (pictures on one only, one target or two) would add up different parameters' gradients, or
abort. DDP's buckets are fixed beforehand and need none of this.

Cost: one addition per parameter. All gradients exist at the same time, as they do anyway where a parameter is used in
more than one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def gradients_in_order(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """A zero whose backward pass runs after everything that is computed later.

    Args:
        parameters: those that must all get a gradient; frozen ones are left out.

    Returns:
        float32 zero, to be added to a loss that is computed after this call.

    Example:
        >>> zero = gradients_in_order(model.parameters())
        >>> loss = model(inputs).sum() + zero
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
