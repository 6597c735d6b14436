"""Mixing of heads in blocks against its formula, one token and one head at a time."""
import pytest
import torch

from engine.head_mixing import mix_heads, mixing_mask
from tests.helpers.tiny import docs_of

H, D = 3, 4


def slow(q, k, v, w1, w2, lengths, window, scale):
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    gains = []
    for t in range(len(q)):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if document[s] == document[t]]
        p = [torch.softmax(scale * torch.stack([q[t, h] @ k[s, h] for s in seen]), 0) for h in range(H)]
        A = sum(w1[t, h] * p[h] for h in range(H))
        read = [sum(A[n] * v[s, h] for n, s in enumerate(seen)) for h in range(H)]
        gains.append(torch.stack([w2[t, h] * read[h] for h in range(H)]))
    return torch.stack(gains)


@pytest.mark.parametrize("window", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("lengths", [(16,), (1, 1, 5, 9), (3, 11, 7)])
def test_it_equals_its_formula_in_value_and_gradients(window, lengths):
    T, generator = sum(lengths), torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in [(T, H, D)] * 3 + [(T, H)] * 2]
    weight = torch.randn(T, H, D, generator=generator)
    fast_inputs = [x.clone().requires_grad_() for x in inputs]
    exact_inputs = [x.double().requires_grad_() for x in inputs]

    fast = mix_heads(*fast_inputs, mixing_mask(docs_of(list(lengths)), window), 0.7)
    exact = slow(*exact_inputs, lengths, window, 0.7)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-6)  # fp32

    gradients = torch.autograd.grad((fast * weight).sum(), fast_inputs)
    expected = torch.autograd.grad((exact * weight.double()).sum(), exact_inputs)
    for found, other in zip(gradients, expected):
        torch.testing.assert_close(found.double(), other, rtol=1e-4, atol=1e-5)  # fp32


def test_without_weight_for_the_result_nothing_is_gained():
    q, k, v = torch.randn(3, 9, H, D)
    w1, w2 = torch.ones(9, H), torch.zeros(9, H)
    assert not mix_heads(q, k, v, w1, w2, mixing_mask(docs_of([9]), 4), 1.0).any()
