"""MulCoT-RD's loss against NumPy and against numbers worked out by hand.

Holds: the divergence is KL(softmax(z_A/T) ‖ softmax(z_S/T)) in nats, without T²; vocabularies are cut to what they share;
cut to K tokens it never exceeds the whole, grows with K, and is the whole with K = V, in gradient too; equal models have
zero divergence and zero gradient; only the student gets gradients; taking large tensors in pieces changes nothing.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynkp.objectives import distillation
from dynkp.objectives.distillation import (
    distilled,
    hard_label_loss,
    multitask_loss,
    soft_label_divergence,
    truncate,
)
from dynkp.objectives.token_loss import TargetLoss


def logits(seed: int, tokens: int = 5, vocabulary: int = 11) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_divergence(student: torch.Tensor, assistant: torch.Tensor, temperature: float) -> np.ndarray:
    def softmax(z: np.ndarray) -> np.ndarray:
        powers = np.exp(z / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softmax(assistant.detach().numpy()), softmax(student.detach().numpy())
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def test_by_hand() -> None:
    """p = (2/3, 1/3) against q = (1/2, 1/2) at T = 1: 2/3 log(4/3) + 1/3 log(2/3)."""
    assistant = torch.tensor([[np.log(2.0), 0.0]])
    expected = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert soft_label_divergence(torch.zeros(1, 2), assistant, 1.0).tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_equals_numpy(temperature: float) -> None:
    student, assistant = logits(0), logits(1)
    actual = soft_label_divergence(student, assistant, temperature)
    np.testing.assert_allclose(actual.numpy(), numpy_divergence(student, assistant, temperature), rtol=1e-12)


def test_no_factor_of_the_squared_temperature() -> None:
    """As T grows, both become uniform: the divergence goes to zero like 1/T², and nothing makes up for it."""
    student, assistant = logits(0), logits(1)
    small, large = (soft_label_divergence(student, assistant, temperature).sum() for temperature in (100.0, 1000.0))
    assert float(small / large) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_equals_trl_s_generalized_divergence_at_beta_zero(temperature: float) -> None:
    """TRL's `GKDTrainer.generalized_jsd_loss`, unreduced: the same values and gradients, bit for bit."""
    with warnings.catch_warnings():  # the module is experimental, and importing it says so
        warnings.simplefilter("ignore", UserWarning)
        from trl.experimental.gkd import GKDTrainer

    found = []
    for divergence in (
        soft_label_divergence,
        lambda s, a, t: GKDTrainer.generalized_jsd_loss(s, a, beta=0, temperature=t, reduction="none").sum(dim=-1),
    ):
        student = logits(0).requires_grad_()
        values = divergence(student, logits(1), temperature)
        values.sum().backward()
        found.append((values, student.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("ours", "theirs"), [(11, 8), (8, 11)])
def test_vocabularies_are_cut_to_what_they_share(ours: int, theirs: int) -> None:
    student, assistant = logits(0, vocabulary=ours).requires_grad_(), logits(1, vocabulary=theirs)
    actual = soft_label_divergence(student, assistant, 2.0)
    np.testing.assert_allclose(actual.detach().numpy(), numpy_divergence(student[:, :8], assistant[:, :8], 2.0), rtol=1e-12)
    actual.sum().backward()
    assert not student.grad[:, 8:].any() and student.grad[:, :8].all()


def test_the_assistant_gets_no_gradient() -> None:
    student, assistant = logits(0).requires_grad_(), logits(1).requires_grad_()
    soft_label_divergence(student, assistant, 2.0).sum().backward()
    assert student.grad.any() and assistant.grad is None


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_models_have_no_divergence_and_no_gradient(temperature: float) -> None:
    student = logits(0).requires_grad_()
    for assistant in (logits(0), truncate(logits(0), 4, temperature), truncate(logits(0), 11, temperature)):
        student.grad = None
        loss = soft_label_divergence(student, assistant, temperature)
        loss.sum().backward()
        assert loss.abs().max() < 1e-15 and student.grad.abs().max() < 1e-15


def test_truncation_by_hand() -> None:
    """(1/2, 1/4, 1/4) cut to one token: 1/2 and a rest of 1/2; against a uniform student (1/3, 2/3)."""
    labels = truncate(torch.tensor([[np.log(2.0), 0.0, 0.0]]), 1, 1.0)
    assert labels.ids.tolist() == [[0]] and labels.vocabulary == 3
    assert [labels.log_probs.exp().item(), labels.rest.exp().item()] == pytest.approx([0.5, 0.5])
    expected = 0.5 * np.log(0.5 * 3) + 0.5 * np.log(0.5 * 3 / 2)
    assert soft_label_divergence(torch.zeros(1, 3), labels, 1.0).tolist() == pytest.approx([expected], rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.3, 5.0))
def test_truncation_is_a_lower_bound_that_grows_with_k(seed: int, temperature: float) -> None:
    student, assistant = logits(seed), logits(seed + 1)
    whole = soft_label_divergence(student, assistant, temperature)
    cut = [soft_label_divergence(student, truncate(assistant, k, temperature), temperature) for k in range(1, 12)]
    for smaller, larger in zip(cut, cut[1:], strict=False):
        assert bool((smaller <= larger + 1e-12).all())
    assert bool((cut[0] >= -1e-12).all())
    torch.testing.assert_close(cut[-1], whole, rtol=1e-10, atol=1e-12)


def test_all_tokens_give_the_whole_gradient() -> None:
    gradients = []
    for assistant in (logits(1), truncate(logits(1), 99, 2.0)):
        student = logits(0).requires_grad_()
        soft_label_divergence(student, assistant, 2.0).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-14)


def test_the_gradient_of_truncated_labels() -> None:
    student = logits(0).requires_grad_()
    labels = truncate(logits(1), 3, 2.0)
    assert torch.autograd.gradcheck(lambda z: soft_label_divergence(z, labels, 2.0), student)


def test_certainty_does_not_break_truncated_labels() -> None:
    """Both models put all they have on one token: what is left of the others is far below what 1 - p could tell."""
    student = torch.tensor([[200.0, 0.0, 1.0, -1.0]], requires_grad=True)
    labels = truncate(torch.tensor([[150.0, 0.0, 2.0, 0.0]]), 2, 1.0)
    loss = soft_label_divergence(student, labels, 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and bool(student.grad.isfinite().all())


def test_labels_of_a_smaller_vocabulary() -> None:
    student, assistant = logits(0, vocabulary=11), logits(1, vocabulary=8)
    actual = soft_label_divergence(student, truncate(assistant, 8, 2.0), 2.0)
    torch.testing.assert_close(actual, soft_label_divergence(student, assistant, 2.0))


def test_half_precision_is_compared_in_single() -> None:
    student, assistant = logits(0).bfloat16(), logits(1).bfloat16()
    for labels in (assistant, truncate(assistant.float(), 11, 2.0)):
        actual = soft_label_divergence(student, labels, 2.0)
        assert actual.dtype is torch.float32
        torch.testing.assert_close(actual, soft_label_divergence(student.float(), assistant.float(), 2.0))
    assert hard_label_loss(student, torch.zeros(5, dtype=torch.long)).dtype is torch.float32


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant, tokens = logits(1), torch.arange(5)
    results = []
    for large in (10**9, 20):
        monkeypatch.setattr(distillation, "_LARGE", large)
        student = logits(0).requires_grad_()
        parts = (
            soft_label_divergence(student, assistant, 2.0),
            soft_label_divergence(student, truncate(assistant, 4, 2.0), 2.0),
            hard_label_loss(student, tokens),
        )
        ramp = torch.linspace(1, 2, 15, dtype=torch.float64)
        (torch.cat(parts) * ramp).sum().backward()
        results.append((torch.cat(parts), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-15)


def test_hard_labels_by_hand() -> None:
    loss = hard_label_loss(torch.tensor([[0.0, np.log(3.0)], [0.0, 0.0]]), torch.tensor([1, 0]))
    assert loss.tolist() == pytest.approx([np.log(4 / 3), np.log(2.0)])


def test_one_task_by_hand() -> None:
    hard = TargetLoss(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0]))
    soft = TargetLoss(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 0.0]))
    loss = distilled(hard, soft, 0.25)
    assert loss.mean.tolist() == [1.75, 0.0] and loss.tokens.tolist() == [2.0, 0.0]
    assert distilled(hard, soft, 0.0).mean.tolist() == [2.0, 0.0] and distilled(hard, soft, 1.0).mean.tolist() == [1.0, 0.0]


def test_tasks_by_hand() -> None:
    """The second post has no second task."""
    label = TargetLoss(torch.tensor([4.0, 6.0]), torch.tensor([2.0, 2.0]))
    chain = TargetLoss(torch.tensor([30.0, 0.0]), torch.tensor([10.0, 0.0]))
    total, denominator = multitask_loss({"label": label, "chain": chain}, {"chain": 0.5, "label": 1.0})
    assert total.tolist() == [3.5, 3.0] and denominator.tolist() == [1.0, 1.0]
    total, denominator = multitask_loss({"label": label, "chain": chain}, {"chain": 0.5, "label": 1.0}, over_tokens=True)
    assert total.tolist() == [19.0, 6.0] and denominator.tolist() == [7.0, 2.0]
