"""Mixing of heads in blocks against its formula, with other weights for every token."""
import pytest
import torch

from engine.head_mixing import mix_heads, mixing_mask
from tests.helpers.plain_model import mixture
from tests.helpers.tiny import docs_of

H, D = 3, 4


@pytest.mark.parametrize("window", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("lengths", [[16], [1, 1, 5, 9], [3, 11, 7]])
def test_it_equals_its_formula_in_value_and_gradients(window, lengths):
    T, docs = sum(lengths), docs_of(lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, H, D)] * 3 + [(T, H)] * 2 + [(T, H, D)]
    *inputs, g = [torch.randn(shape, generator=generator) for shape in shapes]
    fast, exact = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]

    found = mix_heads(*fast, mixing_mask(docs, window), 0.7)
    q, k, v, w_in, w_out = exact
    heads = [x.unbind(1) for x in (q, k, v)]
    expected = torch.stack(mixture(w_in, w_out, *heads, docs.ids, window, 0.7), 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)  # fp32

    gradients = torch.autograd.grad(found, fast, g), torch.autograd.grad(expected, exact, g.double())
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)  # fp32
