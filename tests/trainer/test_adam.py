"""adam.py against torch.optim.AdamW and slow formulas, and over gloo ranks against one process."""
import functools

import pytest
import torch

from engine import adam
from engine.adam import Adam
from tests.helpers.bits import same_bits
from tests.helpers.dist import run_ranks

SHAPES = {
    "table": (257, 256),  # sharded over 2 and 4 ranks
    "matrix": (12, 10),  # too small to shard
    "scalar": (1,),
    "odd table": (257, 257),  # too odd to shard
}


def group(p, lr=0.01, wd=0.0, betas=(0.9, 0.99)):
    return dict(params=[p], lr=lr, weight_decay=wd, betas=betas)


def one(p, lr=0.01, wd=0.0, betas=(0.9, 0.99), eps=1e-10, cautious=False):
    return Adam([group(p, lr, wd, betas)], eps, cautious, 0, 1, False)


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_plain_decay_equals_torch_adamw(wd):
    start = torch.randn(20, 7, generator=torch.Generator().manual_seed(5))
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours = one(p, wd=wd, betas=(0.75, 0.95), eps=1e-8)
    theirs = torch.optim.AdamW([q], lr=0.01, weight_decay=wd, betas=(0.75, 0.95), eps=1e-8)
    for t, g in enumerate(gradients(p.shape, 12)):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
        p.grad, q.grad = g.clone(), g.clone()
        ours.step(), theirs.step()
    # fp32, factors applied in another order: a few roundings of 6e-8 of the weight and of each of twelve
    # updates
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_cautious_decay_equals_the_masked_formula_in_float64():
    p = torch.nn.Parameter(torch.randn(30, 9, generator=torch.Generator().manual_seed(5)))
    w, m, v = p.detach().double(), 0.0, 0.0
    adam = one(p, lr=0.05, wd=0.4, betas=(0.5, 0.95), cautious=True)
    for t, g in enumerate(gradients(p.shape, 10), 1):
        p.grad = g
        adam.step()
        m, v = 0.5 * m + 0.5 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        u = 0.05 * (m / (1 - 0.5**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)
        # The mask looks at the weight before the update.
        w = torch.where(u * w > 0, w - u - 0.05 * 0.4 * w, w - u)
        # fp32: some roundings of weights of size 3 (2e-7)
        torch.testing.assert_close(p.double(), w, rtol=0, atol=1e-6)


def test_the_cautious_mask_is_strict_so_untouched_table_rows_keep_their_bits():
    p = torch.nn.Parameter(torch.randn(6, 4))
    before, adam = p.detach().clone(), one(p, lr=0.6, wd=0.015, cautious=True)
    for _ in range(3):
        p.grad = torch.zeros(6, 4)
        p.grad[2] = 1.0
        adam.step()
    assert torch.equal(p[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]]) and not torch.equal(p[2], before[2])
    plain = one(q := torch.nn.Parameter(before.clone()), lr=0.6, wd=0.015)
    q.grad = torch.zeros(6, 4)
    plain.step()
    torch.testing.assert_close(q.detach(), before * (1 - 0.6 * 0.015))


@pytest.mark.parametrize("cautious", [False, True])
def test_bf16_weights_with_split_mantissa_are_fp32_weights_bit_for_bit(cautious):
    start = torch.randn(40, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    split, full = (one(x, lr=1e-4, wd=0.2, betas=(0.5, 0.95), cautious=cautious) for x in (p, q))
    for g in gradients(p.shape, 25):
        p.grad, q.grad = g.bfloat16(), g.bfloat16().float()
        split.step(), full.step()
        bits = q.detach().view(torch.int32)
        high = (bits >> 16).to(torch.int16)  # truncated
        assert torch.equal(p.detach().view(torch.int16), high.view(q.shape))
        assert torch.equal(split.state[p]["low"].view(q.shape), bits.to(torch.int16))
    assert not torch.equal(q.bfloat16(), p.detach())  # rounding would have given other weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 7, 20, 64])
def test_an_update_in_pieces_is_the_update_bit_for_bit(monkeypatch, dtype, piece):
    results = []
    for size in (piece, 10**6):
        monkeypatch.setattr(adam, "PIECE", size)
        p = torch.nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(5)).to(dtype))
        optimizer = one(p, wd=0.3, cautious=True)
        for g in gradients(p.shape, 4):
            p.grad = g.to(dtype)
            optimizer.step()
        results.append((p.detach(), *(x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))))
    for small, whole in zip(*results, strict=True):
        assert torch.equal(small, whole)


def test_one_rank_makes_no_copy_of_its_gradients():
    p = torch.nn.Parameter(torch.ones(30, 7, dtype=torch.bfloat16))
    optimizer, p.grad = one(p), torch.ones_like(p)
    optimizer.start()
    assert optimizer.pending[p][0].data_ptr() == p.grad.data_ptr()


def test_a_parameter_without_gradient_keeps_weights_and_state():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    adam = Adam([group(p, wd=0.5), group(q)], 1e-10, False, 0, 1, False)
    q.grad = torch.ones(3)
    adam.step()
    assert torch.equal(p.detach(), torch.ones(3))
    assert adam.state[p]["step"] == 0 and adam.state[q]["step"] == 1
    p.grad = torch.ones(3)
    adam.step()
    # Bias correction counts the parameter's own steps.
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.01 - 0.005))


# ------------------------------------------------------------------------------------------------------------
# Ranks. Gradients are small integers, so that means over 2 and 4 ranks are exact in bf16 too and all bits
# agree.


def parameters(dtype):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in SHAPES.items()}


def rank_gradient(name, step, rank, dtype):
    """The odd table gets none in step 1."""
    if name == "odd table" and step == 1:
        return None
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    return torch.randint(-31, 32, SHAPES[name], generator=generator).to(dtype)


def steps(params, adam, first, last, ranks, dtype):
    """Steps with the mean gradient of these ranks, or with the gradient of one of them."""
    for step in range(first, last):
        for i, (name, p) in enumerate(params.items()):
            grads = [rank_gradient(name, step, r, dtype) for r in ranks]
            p.grad = None if grads[0] is None else torch.stack([g.float() for g in grads]).mean(0).to(dtype)
            adam.param_groups[i]["lr"] = 0.01 * (i + 1) / (step + 1)
        if step % 2:
            adam.start()
        adam.step()
        adam.finish()
    return {name: p.detach().clone() for name, p in params.items()}


def make(dtype, rank, world):
    """An epsilon of the gradients' size: otherwise a sum instead of a mean would go unnoticed."""
    params = parameters(dtype)
    groups = [group(p, wd=0.1 * i) for i, p in enumerate(params.values())]
    return params, Adam(groups, 0.5, True, rank, world, False)


def copied(states):
    return [{key: x.clone() if torch.is_tensor(x) else x for key, x in state.items()} for state in states]


def train(dtype, rank, world, ranks):
    """Weights after 3 and 5 steps, the full state after 3, and the numbers of the first moment kept here."""
    params, adam = make(dtype, rank, world)
    found = dict(three=steps(params, adam, 0, 3, ranks, dtype), full=copied(adam.full_state()))
    found["sizes"] = {name: adam.state[p]["exp_avg"].numel() for name, p in params.items()}
    found["five"] = steps(params, adam, 3, 5, ranks, dtype)
    return found


def go_on(dtype, rank, world, ranks, before):
    """Weights after 5 steps, from what train() found elsewhere after 3."""
    params, adam = make(dtype, rank, world)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before["three"][name])
    adam.load_full_state(before["full"])
    return steps(params, adam, 3, 5, ranks, dtype)


@functools.cache
def alone(dtype, world):
    """One process on the mean over `world` ranks."""
    return train(dtype, 0, 1, range(world))


def on_rank(rank, world, expected):
    found = {}
    for dtype, one_process in expected.items():
        found[dtype] = train(dtype, rank, world, [rank])
        found[dtype]["resumed"] = go_on(dtype, rank, world, [rank], one_process)
    return found


@functools.cache
def together(world):
    return run_ranks(world, on_rank, {dtype: alone(dtype, world) for dtype in DTYPES})


DTYPES = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process_on_the_mean_of_their_gradients_bit_for_bit(world, dtype):
    expected = alone(dtype, world)
    for rank in together(world):
        found = rank[dtype]
        for part in ("three", "five", "full"):
            assert same_bits(found[part], expected[part]), part
        assert same_bits(found["resumed"], expected["five"])
        # Only large divisible parameters are sharded, and their state with them.
        assert found["sizes"] == {**expected["sizes"], "table": 257 * 256 // world}
