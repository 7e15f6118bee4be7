"""Gradients arrive in one order whatever was computed, zeros where nothing reached, and with unchanged values.

The trainer's use of it is held on real ranks, in tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynkp.mechanics.gradient_order import gradients_in_order

BRANCHES = ("all", "text", "pictures", "twice", "checkpointed")


class Branching(nn.Module):
    """Layers that are used, left out or used twice, as ranks with other posts would."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pictures, self.first, self.second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.frozen = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)

    def forward(self, inputs: torch.Tensor, branch: str) -> torch.Tensor:
        if branch in ("all", "pictures"):
            inputs = self.pictures(inputs)
        if branch == "pictures":
            return inputs.sum()
        if branch == "checkpointed":
            inputs = checkpoint(self.first, inputs, use_reentrant=False)
            return self.second(self.frozen(inputs)).tanh().sum()
        once = self.second(self.first(self.frozen(inputs))).tanh()
        return (self.first(self.second(once)) if branch == "twice" else once).sum()


def backward(branch: str, ordered: bool) -> tuple[list[str], dict[str, torch.Tensor | None]]:
    """The order in which parameters got their gradients, and these."""
    model, arrived = Branching(), []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    zero = gradients_in_order(model.parameters()) if ordered else 0.0
    loss = model(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4), branch) + zero
    loss.backward()
    return arrived, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_order_depends_on_what_was_computed_without_it() -> None:
    assert len({tuple(backward(branch, ordered=False)[0]) for branch in BRANCHES}) > 2


@pytest.mark.parametrize("branch", BRANCHES)
def test_one_order_and_the_same_gradients(branch: str) -> None:
    order, gradients = backward(branch, ordered=True)
    assert order == backward("all", ordered=True)[0]
    assert sorted(order) == sorted(name for name, _ in Branching().named_parameters() if "frozen" not in name)
    for name, plain in backward(branch, ordered=False)[1].items():
        if "frozen" in name:
            assert gradients[name] is None
        elif plain is None:
            assert not gradients[name].any()
        else:
            assert torch.equal(gradients[name], plain)


def test_the_loss_keeps_value_and_type() -> None:
    zero = gradients_in_order(Branching().parameters())
    losses = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert torch.equal(losses + zero, losses) and (losses + zero).dtype == torch.bfloat16
