import math

import pytest
import torch
import torch.nn.functional as F

from network.head_loss import CPU_CHUNK, Taught, head_loss, head_scores

WIDTH, WORDS = 24, 70


def inputs(count: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(WORDS, WIDTH, generator=generator) * 0.3).requires_grad_()
    bias = torch.zeros(WORDS, dtype=dtype)
    bias[:4] = -1e4 if dtype == torch.float16 else -math.inf
    targets = torch.randint(4, WORDS, (count,), generator=generator)
    return hidden, weight, bias, targets, torch.rand(count, generator=generator) / count


def plain(hidden, weight, bias, targets, row_weights):
    logits = F.linear(hidden.float(), weight, bias.float())
    return (F.cross_entropy(logits, targets, reduction="none") * row_weights).sum()


@pytest.mark.parametrize("count", [1, CPU_CHUNK, 2 * CPU_CHUNK + 7])
def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(count):
    values = inputs(count)
    expected = plain(*values)
    gradients = torch.autograd.grad(expected, values[:2])
    loss = head_loss(*values)
    (3 * loss).backward()  # whatever comes after it is part of the chain rule
    torch.testing.assert_close(loss, expected)
    for tensor, gradient in zip(values[:2], gradients, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient)


@pytest.mark.parametrize("count", [1, CPU_CHUNK, 2 * CPU_CHUNK + 7])
def test_what_is_taught_takes_the_place_of_the_tokens(count):
    """A teacher of another width, which forbids the same ids."""
    hidden, weight, bias, _, row_weights = inputs(count)
    said = Taught(torch.randn(count, 5), torch.randn(WORDS, 5))
    q = torch.softmax(said.hidden @ said.weight.T + bias, -1)
    log_p = torch.log_softmax(F.linear(hidden, weight, bias), -1)
    expected = -((q * log_p.masked_fill(bias == -math.inf, 0)).sum(-1) * row_weights).sum()
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = head_loss(hidden, weight, bias, said, row_weights)
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected)
    for tensor, gradient in zip((hidden, weight), gradients, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient)


def test_a_frozen_head_gets_no_gradient_and_changes_no_other():
    values = inputs(CPU_CHUNK + 3)
    head_loss(*values).backward()
    expected = values[0].grad.clone()
    values[0].grad = values[1].grad = None
    head_loss(values[0], values[1].detach(), *values[2:]).backward()
    assert torch.equal(values[0].grad, expected) and values[1].grad is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision_stays_close(dtype, tolerance):
    values = inputs(300, dtype)
    expected = plain(*values)
    gradients = torch.autograd.grad(expected, values[:2])
    scale = 2.0 ** 16  # as GradScaler does: without it FP16 would lose the small ones
    loss = head_loss(*values)
    (loss * scale).backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert values[0].grad.dtype == dtype and values[1].grad.dtype == torch.float32
    for tensor, gradient in zip(values[:2], gradients, strict=True):
        size = gradient.float().abs().max()
        error = (tensor.grad.float() / scale - gradient.float()).abs().max()
        assert error < tolerance * size


def test_scores_are_the_same_probabilities():
    hidden, weight, bias, targets, _ = inputs(2 * CPU_CHUNK + 7)
    logits = F.linear(hidden, weight, bias)
    nats, correct = head_scores(hidden, weight, bias, targets)
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert not nats.requires_grad


def test_forbidden_ids_get_no_probability_and_no_gradient():
    hidden, weight, bias, targets, row_weights = inputs(50)
    head_loss(hidden, weight, bias, targets, row_weights).backward()
    assert torch.equal(weight.grad[:4], torch.zeros(4, WIDTH)) and weight.grad[4:].abs().min() > 0
