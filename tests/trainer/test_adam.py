"""adam.py against torch.optim.AdamW and slow formulas, and over gloo ranks against one process."""
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
from tests.helpers.dist import run_ranks

from engine import adam
from engine.adam import Adam

SHAPES = {  # sharded over 2 and 4 ranks; too small to shard; too odd to shard
    "table": (257, 256), "matrix": (12, 10), "scalar": (1,), "odd table": (257, 257),
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
    # fp32, factors applied in another order: a few roundings of 6e-8 of the weight and of each of twelve updates
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
        w = torch.where(u * w > 0, w - u - 0.05 * 0.4 * w, w - u)  # the mask looks at the weight before the update
        torch.testing.assert_close(p.double(), w, rtol=0, atol=1e-6)  # fp32: some roundings of weights of size 3 (2e-7)


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


def test_a_tiny_epsilon_lets_tiny_gradients_move_weights_by_the_learning_rate():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e-7, -1e-5, 1.0])
    one(p, lr=0.01, eps=1e-10).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.01, 0.01, -0.01]), rtol=1.1e-3, atol=0)  # 1e-10 / 1e-7


@pytest.mark.parametrize("cautious", [False, True])
def test_bf16_weights_with_split_mantissa_are_fp32_weights_bit_for_bit(cautious):
    start = torch.randn(40, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    split, full = (one(x, lr=1e-4, wd=0.2, betas=(0.5, 0.95), cautious=cautious) for x in (p, q))
    for g in gradients(p.shape, 25):
        p.grad, q.grad = g.bfloat16(), g.bfloat16().float()
        split.step(), full.step()
        bits = q.detach().view(torch.int32)
        assert torch.equal(p.detach().view(torch.int16), (bits >> 16).to(torch.int16).view(q.shape))  # truncated
        assert torch.equal(split.state[p]["low"].view(q.shape), bits.to(torch.int16))
    assert not torch.equal(q.bfloat16(), p.detach())  # rounding would have given other weights: the test can tell


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
    assert torch.equal(p.detach(), torch.ones(3)) and adam.state[p]["step"] == 0 and adam.state[q]["step"] == 1
    p.grad = torch.ones(3)
    adam.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.01 - 0.005))  # bias correction counts its own steps


# ---------------------------------------------------------------------------------------------------------------------
# Ranks. Gradients are small integers, so that means over 2 and 4 ranks are exact in bf16 too and all bits must agree.


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
    return params, Adam([group(p, wd=0.1 * i) for i, p in enumerate(params.values())], 0.5, True, rank, world, False)


def copied(states):
    return [{key: value.clone() if torch.is_tensor(value) else value for key, value in s.items()} for s in states]


@functools.cache
def alone(dtype, world):
    """Weights after 3 and 5 steps of one process on the mean over `world` ranks, and its state after 3."""
    params, adam = make(dtype, 0, 1)
    three = steps(params, adam, 0, 3, range(world), dtype)
    state = copied(adam.full_state())
    return three, steps(params, adam, 3, 5, range(world), dtype), state


def ranks_train(rank, world, resumed):
    """Per dtype: weights after 3 steps, state, weights after 5; also after 3 steps of another world, resumed here."""
    results = {}
    for dtype, (weights, state) in resumed.items():
        params, adam = make(dtype, rank, world)
        three = steps(params, adam, 0, 3, [rank], dtype)
        sharded = [name for name, p in params.items() if adam.sharded(p)]
        sizes = {name: adam.state[p]["exp_avg"].numel() for name, p in params.items()}
        full = copied(adam.full_state())
        five = steps(params, adam, 3, 5, [rank], dtype)
        again, adam = make(dtype, rank, world)
        with torch.no_grad():
            for name, p in again.items():
                p.copy_(weights[name])
        adam.load_full_state(state)
        results[dtype] = dict(three=three, five=five, full=full, sharded=sharded, sizes=sizes,
                              resumed=steps(again, adam, 3, 5, [rank], dtype))
    return results


def four_then_pairs(rank, world, resumed, folder):
    """Four ranks together, then the same processes as two pairs, which saves starting more of them."""
    results = {4: ranks_train(rank, 4, resumed[4])}
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/pair{rank // 2}", 2), rank=rank % 2, world_size=2)
    return {**results, 2: ranks_train(rank % 2, 2, resumed[2])}


@functools.cache
def all_ranks():
    dtypes = torch.float32, torch.bfloat16
    resumed = {w: {dtype: (alone(dtype, w)[0], alone(dtype, w)[2]) for dtype in dtypes} for w in (2, 4)}
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(4, four_then_pairs, resumed, folder)


def ranks_together(world):
    return [rank[world] for rank in all_ranks()]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


WORLDS = pytest.mark.parametrize("world, dtype", [(w, d) for w in (2, 4) for d in (torch.float32, torch.bfloat16)])


@WORLDS
def test_ranks_with_different_gradients_equal_one_process_on_their_mean_bit_for_bit(world, dtype):
    three, five, _ = alone(dtype, world)
    for rank in ranks_together(world):
        assert equal(rank[dtype]["three"], three) and equal(rank[dtype]["five"], five)


@WORLDS
def test_only_large_divisible_parameters_are_sharded_and_their_state_with_them(world, dtype):
    for rank in ranks_together(world):
        assert rank[dtype]["sharded"] == ["table"]
        whole = {"matrix": 120, "scalar": 1, "odd table": 257 * 257}
        assert rank[dtype]["sizes"] == {"table": 257 * 256 // world, **whole}


@WORLDS
def test_full_state_is_the_state_of_one_process_on_every_rank(world, dtype):
    for rank in ranks_together(world):
        for found, expected in zip(rank[dtype]["full"], alone(dtype, world)[2], strict=True):
            assert equal(found, expected)


@WORLDS
def test_state_of_one_process_goes_on_at_another_world_size(world, dtype):
    for rank in ranks_together(world):
        assert equal(rank[dtype]["resumed"], alone(dtype, world)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_several_ranks_goes_on_in_one_process(dtype):
    rank = ranks_together(2)[1][dtype]
    params, adam = make(dtype, 0, 1)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(rank["three"][name])
    adam.load_full_state(rank["full"])
    assert equal(steps(params, adam, 3, 5, range(2), dtype), alone(dtype, 2)[1])
