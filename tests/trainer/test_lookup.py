"""engine/lookup.py against F.embedding, and engine/transpose.py against x.t()."""
import pytest
import torch
import torch.nn.functional as F

from engine.lookup import Lookup
from engine.transpose import transposed
from tests.helpers.triton import interpret


def gradient_of(lookup, table, index, weights):
    return torch.autograd.grad((lookup(index, table) * weights).sum(), table)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (3, 20)])
def test_rows_and_gradient_are_those_of_an_embedding_in_float64(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(11, 5, generator=generator).to(dtype).requires_grad_()
    index = torch.randint(0, 9, shape, generator=generator)  # each several times, two never
    weights = torch.randn(*shape, 5, generator=generator).to(dtype)
    assert torch.equal(Lookup.apply(index, table), F.embedding(index, table))
    exact = gradient_of(F.embedding, table.detach().double().requires_grad_(), index, weights.double())
    for lookup in (Lookup.apply, torch.compile(Lookup.apply, backend="aot_eager", fullgraph=True)):
        error = (gradient_of(lookup, table, index, weights).double() - exact).norm() / exact.norm()
        assert error < (1e-6 if dtype == torch.float32 else 2**-7)  # roundings of sums of about seven numbers


def test_transposed_is_a_transposed_copy():
    x = torch.arange(35, dtype=torch.uint8).view(5, 7)
    assert torch.equal(transposed(x), x.t()) and transposed(x).is_contiguous()


TILES = """
import torch, triton
torch.cuda.is_available = lambda: True  # else the kernel is not even defined
from engine.transpose import TILE, transpose_tile
for m, n in ((TILE, TILE), (300, 130), (1, 257), (64, 50)):
    x = torch.randint(0, 256, (m, n), dtype=torch.uint8)
    y = torch.empty(n, m, dtype=torch.uint8)
    transpose_tile[triton.cdiv(m, TILE), triton.cdiv(n, TILE)](x, y, m, n, TILE)
    assert torch.equal(y, x.t()), (m, n)
"""


def test_the_tiles_of_the_kernel_cover_any_shape_once():
    interpret(TILES)
