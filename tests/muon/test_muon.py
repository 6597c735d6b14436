"""muon.py in one process: every formula against a slow one in float64, every refusal by its sentence."""
import ast
import copy
import functools
import inspect
import io
import math
import os
import pickle
import platform
import subprocess
import sys
import typing
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import muon
import train_gpt
from bench.muon.questions import ADJUST_LR, mapped, with_spectrum
from muon import COEFFICIENTS, newton_schulz_flops, orthogonalize
from muon import place_units, runs, stacks_of
from tools.plan import shapes_of

Muon = functools.partial(muon.Muon, flatten=False)  # 3-D parameters are banks here
FP32 = dict(rtol=1e-5, atol=1e-5)  # single precision through five Newton-Schulz steps; measured about 2e-6
SHAPES = [(24, 40), (40, 24), (32, 32), (3, 16, 24), (2, 24, 16), (12, 5, 3, 3), (60, 2, 3, 3)]


def triples(name, steps):
    safety, rows = COEFFICIENTS[name]
    return safety, [rows[min(i, len(rows) - 1)] for i in range(steps)]


SCALES = {None: ADJUST_LR["original"]} | ADJUST_LR


def oracle(W, gradients, lr=0.02, momentum=0.95, weight_decay=0.0, nesterov=True, ns_steps=5,
           ns_coefficients="polar", adjust_lr_fn=None, cautious=False, normuon_beta2=None):
    """Muon on one matrix in float64, one line per formula. lr and momentum: one value, or one per step."""
    W, M, V = W.double(), 0.0, 0.0
    for t, G in enumerate(gradients):
        rate, mu = (x[t] if isinstance(x, list) else x for x in (lr, momentum))
        M = mu * M + (1 - mu) * G.double()
        X = (1 - mu) * G.double() + mu * M if nesterov else M
        safety, steps = triples(ns_coefficients, ns_steps)
        X = X / (safety * X.norm())
        for a, b, c in steps:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        if normuon_beta2 is not None:
            square = (X**2).mean(1 if W.size(0) >= W.size(1) else 0, keepdim=True)
            V = normuon_beta2 * V + (1 - normuon_beta2) * square
            X = X / V.sqrt() * (X.norm() / (X / V.sqrt()).norm())
        decay = rate * weight_decay * ((X * W >= 0) if cautious else 1)
        W = W - decay * W - rate * SCALES[adjust_lr_fn](*W.shape) * X
    return W


def flops(m, n, steps=5):
    """Return the FLOPs of the standard form: two products along the long side and one of squares a step."""
    return steps * (4 * min(m, n) ** 2 * max(m, n) + 2 * min(m, n) ** 3)


def iterated(G, name, steps):
    """What `steps` of a schedule make of G: the scalar polynomial on its singular values, in float64."""
    U, x, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ mapped(x, name, steps).diag() @ Vh


def matrices(x):
    """The list of (m, n) matrices that a parameter-shaped tensor stands for."""
    return list(x) if x.ndim == 3 else [x.flatten(1)]


def make(shapes, seed=0, dtype=torch.float32, steps=3):
    """Parameters of size 0.1 and, for each step, their gradients: Gaussian, but with a spectrum far from
    zero."""
    generator = torch.Generator().manual_seed(seed)

    def gradient(shape):
        def one(m, n):
            G = torch.randn(m, n, generator=generator)
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            return U @ torch.diag(torch.linspace(0.2, 1, min(m, n))) @ Vh
        probe = torch.empty(shape)
        return torch.stack([one(*x.shape) for x in matrices(probe)]).reshape(shape).to(dtype)
    params = [torch.nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(dtype)) for s in shapes]
    return params, [[gradient(s) for s in shapes] for _ in range(steps)]


def feed(params, gradients):
    for p, g in zip(params, gradients):
        p.grad = None if g is None else g.clone()


def train(params, gradients, lrs=None, **settings):
    """Run all steps; returns the optimizer."""
    optimizer = Muon(params, **settings)
    for t, step in enumerate(gradients):
        if lrs:
            optimizer.param_groups[0]["lr"] = lrs[t]
        feed(params, step)
        optimizer.step()
    return optimizer


def save_and_load(state, weights_only=True):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), **(tolerance or FP32))


# --- orthogonalize ---

MATRICES = [(32, 32), (12, 48), (128, 8)]  # aspect 1 to 16, wide and tall
FORMS = [False, True]  # on the Gram matrix or not


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("m, n", MATRICES)
@pytest.mark.parametrize("gram", FORMS)
def test_every_singular_value_goes_through_the_polynomial(name, m, n, gram):
    """In fp32 and fp16, for 1 to 8 steps, down to 1e-5 of the largest value. Where both steps and decades are
    many, the rounding of the input alone, times a slope at 0 of 1e4 and more, is larger than these
    tolerances."""
    for steps in range(1, 9):
        G = with_spectrum(m, n, torch.logspace(-5 if steps <= 5 else -3, 0, min(m, n)))[2].float()
        expected = iterated(G, name, steps)
        # Measured 1.1e-5
        close(orthogonalize(G, steps, name, torch.float32, gram), expected, rtol=0, atol=3e-5)
        if steps > 5:
            continue
        G = with_spectrum(m, n, torch.logspace(-3, 0, min(m, n)))[2].float()
        # Without the restarts: 1e-3 above and 0.5 here
        half = orthogonalize(G, steps, name, torch.float16, gram)
        close(half, iterated(G, name, steps), rtol=0, atol=3e-2)  # measured 1.1e-2
        assert half.dtype == torch.float16


@pytest.mark.parametrize("m, n, dtype, expected", [
    (16, 32, torch.float32, True), (32, 16, torch.float32, True), (16, 31, torch.float32, False),
    (16, 16, torch.float32, False), (16, 64, torch.float16, True), (16, 64, torch.bfloat16, False),
    (256, 512, torch.bfloat16, True), (256, 511, torch.bfloat16, False), (255, 512, torch.bfloat16, False)])
def test_the_form_is_chosen_by_shape_and_dtype(monkeypatch, m, n, dtype, expected):
    used = []

    def spy(triples, gram, dtype, segments=muon.segments):
        if triples != range(5):  # of which FLOPs are counted
            used.append(gram)
        return segments(triples, gram, dtype)
    monkeypatch.setattr(muon, "segments", spy)
    G = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    orthogonalize(G, dtype=dtype)
    train([torch.nn.Parameter(G)], [[G]], ns_dtype=dtype)
    assert used == [expected] * 2


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("spectrum", [
    torch.ones(256), torch.linspace(0.1, 1, 256), torch.logspace(-3, 0, 256), 1 / torch.arange(1.0, 257),
    torch.tensor([1.0] + [1e-2] * 255), torch.tensor([1.0] * 8 + [0.0] * 248)], ids=[
    "flat", "linear", "three decades", "1 over k", "one above all", "rank 8"])
def test_the_gram_form_in_bf16_adds_little_to_the_rounding(name, spectrum):
    """Looked at in the smallest matrices that take it."""
    G = with_spectrum(256, 1024, spectrum)[2].float()
    expected = iterated(G, name, 5)
    standard, by_gram = ((orthogonalize(G, 5, name, torch.bfloat16, gram) - expected).norm() / expected.norm()
                         for gram in FORMS)
    assert by_gram < max(1.1 * standard, 0.08)  # measured 0.007 to 0.06, or beside standard's 0.09 to 0.8


@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("gram", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_flops_are_those_that_torch_counts(steps, gram, dtype):
    for B, m, n in ((1, 8, 8), (2, 8, 24), (3, 40, 8)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(B, m, n), steps, dtype=dtype, gram=gram)
        assert counter.get_total_flops() == B * newton_schulz_flops(m, n, steps, gram, dtype)
    assert newton_schulz_flops(8, 24, steps, False, dtype) == flops(8, 24, steps)
    if gram and steps == 5 and dtype == torch.float32:  # one restart
        assert newton_schulz_flops(24, 8, 5, True, dtype) == 8 * 8 * 8 * 24 + 28 * 8**3


class OneTriangle:
    """A stand-in for a symmetric kernel: computes one triangle of the product, mirrors it, and counts."""

    def __init__(self):
        self.products = self.flops = 0

    def __call__(self, A, B, C=None, alpha=1.0, beta=1.0):
        product = alpha * (A @ B) + (0 if C is None else beta * C)
        assert A.ndim == 3 and (product - product.mT).abs().max() <= 1e-5 * product.abs().max()
        self.products += 1
        self.flops += 2 * A.size(0) * A.size(1) * A.size(2) * B.size(2)
        return product.triu() + product.triu(1).mT


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("gram", FORMS)
def test_a_symmetric_kernel_gets_exactly_the_symmetric_products(monkeypatch, steps, gram):
    """The optimizer hands it on, and does so, too."""
    monkeypatch.setattr(muon, "gram_pays", lambda *args: gram)
    G = torch.stack([with_spectrum(8, 24, torch.linspace(0.1, 1, 8), seed)[2].float() for seed in range(2)])
    kernel = OneTriangle()
    p = torch.nn.Parameter(torch.zeros_like(G))
    train([p], [[G]], lr=1.0, symmetric=kernel, ns_steps=steps, ns_coefficients="quintic")
    close(-p.detach(), orthogonalize(G, steps, "quintic", torch.float32, gram))
    restarts = max(0, -(-(steps - 2) // 3))
    rectangular = 1 + restarts if gram else steps  # X <- Q X, the only product that is not symmetric
    whole = 2 * newton_schulz_flops(8, 24, steps, gram, torch.float32)
    assert kernel.flops == whole - rectangular * 2 * 2 * 8 * 8 * 24
    assert kernel.products == (4 * steps - 2 * (1 + restarts) if gram else 2 * steps)


@pytest.mark.parametrize("name, low, high", [("jordan", 0.682, 1.134), ("quintic", 0.978, 1.032),
                                             ("polar", 0.859, 1.141)])
def test_five_steps_end_in_the_known_band(name, low, high):
    """The bands that the three schedules reach from values in 0.01 .. 1: a wrong digit in a table leaves
    them."""
    safety, steps = triples(name, 5)
    x = torch.logspace(-2, 0, 20001, dtype=torch.float64) / safety
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    assert abs(x.min() - low) < 6e-4 and abs(x.max() - high) < 6e-4


def test_an_iteration_in_fp32_stays_so_under_autocast():
    G = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    (p, q), _ = make([(16, 24)] * 2, steps=0)
    q.data.copy_(p.data)
    optimizer, other = (Muon([each], ns_dtype=torch.float32) for each in (p, q))
    feed([p, q], [G[0], G[0]])
    expected = orthogonalize(G, dtype=torch.float32)
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(orthogonalize(G, dtype=torch.float32), expected)
        other.step()
    assert same(p.detach(), q.detach())


def test_a_compiled_iteration_switches_autocast_only_where_it_is_on():
    """torch's cache keeps no graph that does, and a second start would compile it again."""
    G = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(G, dtype=torch.float32)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph
    compiled = torch.compile(orthogonalize, backend=keep, fullgraph=True)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert same(compiled(G, dtype=torch.float32), expected)
    switching = [any("autocast" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert switching == [False, True]


def test_more_steps_than_triples_repeat_the_last_and_fewer_use_the_first():
    G, rows = with_spectrum(8, 12, torch.linspace(0.1, 1, 8))[2].float(), COEFFICIENTS["quintic"][1]
    assert same(orthogonalize(G, 7, "quintic"), orthogonalize(G, 7, [*rows, rows[-1], rows[-1]]))
    assert same(orthogonalize(G, 2, "quintic"), orthogonalize(G, 2, rows[:2]))


# --- the whole update ---

@pytest.mark.parametrize("settings", [
    dict(), dict(nesterov=False, weight_decay=0.1), dict(ns_coefficients="jordan", ns_steps=6),
    dict(ns_coefficients="quintic"), dict(weight_decay=0.3, cautious=True), dict(normuon_beta2=0.9),
    dict(normuon_beta2=0.95, cautious=True, weight_decay=0.2, momentum=0.8),
    *(dict(adjust_lr_fn=name, weight_decay=0.1) for name in SCALES)], ids=str)
def test_three_steps_equal_the_oracle_for_every_shape(settings):
    params, gradients = make(SHAPES)
    start = [p.detach().clone() for p in params]
    lrs = [0.02, 0.05, 0.01]
    train(params, gradients, lrs=lrs, **settings)
    for i, p in enumerate(params):
        for W, old, *Gs in zip(*map(matrices, (p.detach(), start[i], *(step[i] for step in gradients)))):
            close(W, oracle(old, Gs, lr=lrs, **settings))


SPLITS = {  # shape of the parameter, split, flatten, rows of the blocks
    "fused qkv": ((24, 16), 3, False, [8, 8, 8]),
    "grouped queries": ((24, 10), (16, 4, 4), False, [16, 4, 4]),  # the queries tall, keys and values wide
    "per head": ((24, 16), 6, False, [4] * 6),
    "per head, as rows": ((12, 16), [2] * 6, False, [2] * 6),
    "one block": ((9, 16), (9,), False, [9]),
    "uneven": ((18, 7), (5, 6, 7), False, [5, 6, 7]),
    "bank": ((3, 12, 8), (6, 2, 4), False, [6, 2, 4]),
    "bank in halves": ((3, 12, 8), 2, False, [6, 6]),
    "grouped convolution": ((12, 2, 3, 3), 2, False, [6, 6]),
    "flattened": ((12, 2, 5), (8, 4), True, [8, 4]),
    "flattened, in one": ((6, 10, 3), None, True, [6]),
}


def blocks(x, sizes, flatten):
    """The blocks of rows, as 2-D tensors, of something that is shaped like the parameter."""
    return [block for X in ([x.flatten(1)] if flatten else matrices(x)) for block in X.split(sizes)]


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("settings", [
    dict(), dict(normuon_beta2=0.9, weight_decay=0.1, cautious=True),
    dict(dtype=torch.bfloat16, split_mantissa=True, normuon_beta2=0.9, weight_decay=0.1,
         adjust_lr_fn="spectral_unclamped")], ids=str)
def test_a_split_equals_separate_parameters_bit_for_bit(case, settings):
    shape, split, flatten, sizes = SPLITS[case]
    settings = dict(settings)
    (fused,), gradients = make([shape], dtype=settings.pop("dtype", torch.float32), steps=4)
    parts = [torch.nn.Parameter(block.clone()) for block in blocks(fused.detach(), sizes, flatten)]
    resumed = torch.nn.Parameter(fused.detach().clone())
    optimizer = train([fused], gradients[:2], split=split, flatten=flatten, deterministic=True, **settings)
    saved, halfway = save_and_load(optimizer.state_dict()), fused.detach().clone()
    for step in gradients[2:]:
        feed([fused], step)
        optimizer.step()
    separate = train(parts, [blocks(g, sizes, flatten) for (g,) in gradients], deterministic=True, **settings)
    assert all(map(same, blocks(fused.detach(), sizes, flatten), [p.detach() for p in parts]))

    whole, theirs = optimizer.state_dict()["state"][0], separate.state_dict()["state"]
    for key in whole.keys() - {"second_moment"}:
        assert all(map(same, blocks(whole[key], sizes, flatten), [theirs[i][key] for i in range(len(parts))]))
    if "second_moment" in whole:  # per matrix, the numbers of its blocks one after the other
        lengths = [max(p.shape) for p in parts]
        assert whole["second_moment"].shape == (len(parts) // len(sizes), sum(lengths[:len(sizes)]))
        flat = whole["second_moment"].flatten().split(lengths)
        assert all(same(a, theirs[i]["second_moment"].flatten()) for i, a in enumerate(flat))

    with torch.no_grad():
        resumed.copy_(halfway)
    again = Muon([resumed], split=split, flatten=flatten, deterministic=True, **settings)
    again.load_state_dict(saved)
    for step in gradients[2:]:
        feed([resumed], step)
        again.step()
    assert same(resumed.detach(), fused.detach())


def test_matrices_of_one_kind_share_an_iteration_and_agree_with_one_by_one(monkeypatch):
    """Tall and wide matrices, those of banks, and the blocks of a split."""
    given = [(12, 20), (20, 12), (3, 20, 12), (12, 12), (36, 20)]
    (*params, fused), gradients = make(given, steps=2)
    (*others, single), _ = make(given)
    groups = [dict(params=params), dict(params=[fused], split=3)]
    optimizer, shapes = Muon(groups, normuon_beta2=0.9), []

    def spy(G, *args):
        shapes.append(tuple(G.shape))
        return orthogonalize(G, *args)
    monkeypatch.setattr(muon, "orthogonalize", spy)
    for step in gradients:
        feed([*params, fused], step)
        optimizer.step()
    assert sorted(shapes) == [(1, 12, 12)] * 2 + [(8, 12, 20)] * 2
    groups = [dict(params=others), dict(params=[single], split=(12, 12, 12))]
    after = Muon(groups, normuon_beta2=0.9, deterministic=True)
    for step in gradients:
        feed([*others, single], step)
        after.step()
    for p, q in zip([*params, fused], [*others, single]):
        close(p.detach(), q.detach())


@pytest.mark.parametrize("shape, split, rows", [
    ((24, 16), 5, 24), ((24, 16), (16, 4), 24), ((24, 16), (16, 4, 4, 1), 24), ((3, 12, 8), (1, 1, 1), 12),
    ((3, 12, 8), 5, 12), ((6, 2, 3, 3), 4, 6)])
def test_a_split_that_does_not_sum_is_refused_by_name(shape, split, rows):
    good, w = torch.nn.Parameter(torch.zeros(rows, 4)), torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError) as error:
        Muon([dict(params=[("good", good)], split=None), dict(params=[("w", w)], split=split)])
    assert str(error.value) == (
        f"Muon: w: expected a split of its {rows} rows, found {split}; change it for this group")


@pytest.mark.parametrize(
    "settings", [dict(), dict(flatten=True), dict(split=2), dict(flatten=True, split=(4, 6))], ids=str)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_banks_and_1d_convolutions_may_lie_in_any_order_in_memory(settings, order):
    (p,), gradients = make([(10, 4, 6)])

    def lying(x):
        return x.permute(order).contiguous().permute(*(order.index(d) for d in range(3)))
    odd = torch.nn.Parameter(lying(p.detach()))
    assert not odd.is_contiguous()
    settings = dict(settings, normuon_beta2=0.9, weight_decay=0.1, cautious=True)
    train([p], gradients, **settings)
    train([odd], [[lying(g)] for (g,) in gradients], **settings)
    close(odd.detach(), p.detach())


def test_groups_keep_their_own_settings_and_changes_between_steps_count():
    params, gradients = make([(12, 8), (12, 8)], steps=3)
    start = [p.detach().clone() for p in params]
    optimizer = Muon([dict(params=params[:1], lr=0.1),
                      dict(params=params[1:], weight_decay=0.5, ns_coefficients="jordan")])
    plan = optimizer.placements
    for t, step in enumerate(gradients):
        for group in optimizer.param_groups:
            group["momentum"] = [0.8, 0.9, 0.95][t]
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / (t + 1))
        optimizer.param_groups[1]["ns_steps"] = 5
        feed(params, step)
        optimizer.step()
    mus = [0.8, 0.9, 0.95]
    expected = oracle(start[0], [s[0] for s in gradients], lr=[0.1, 0.05, 0.1 / 3], momentum=mus)
    close(params[0].detach(), expected)
    close(params[1].detach(), oracle(start[1], [s[1] for s in gradients], momentum=mus, weight_decay=0.5,
                                     ns_coefficients="jordan"))
    assert optimizer.placements is plan


@pytest.mark.parametrize("settings", [{}, dict(weight_decay=0.1, cautious=True, normuon_beta2=0.9)], ids=str)
def test_split_mantissa_equals_fp32_masters_bit_for_bit(settings):
    shapes = [(24, 40), (40, 24), (3, 16, 24), (12, 5, 3, 3)]
    halves, gradients = make(shapes, dtype=torch.bfloat16, steps=25)
    full = [torch.nn.Parameter(p.detach().float()) for p in halves]
    optimizer = train(halves, gradients, lr=1e-3, split_mantissa=True, **settings)
    train(full, [[g.float() for g in step] for step in gradients], lr=1e-3, **settings)
    for p, q, state in zip(halves, full, optimizer.state_dict()["state"].values()):
        bits = (p.detach().view(torch.int16).int() << 16) | (state["mantissa"].int() & 0xFFFF)
        assert same(bits.view(torch.float32), q.detach())
        assert state["mantissa"].dtype == torch.int16 and state["mantissa"].unique().numel() > 100


def test_bf16_weights_are_rounded_once_per_step():
    (p,), ((g,),) = make([(24, 40)], dtype=torch.bfloat16, steps=1)
    exact = torch.nn.Parameter(p.detach().float())
    train([p], [[g]], weight_decay=0.1)
    train([exact], [[g.float()]], weight_decay=0.1)
    assert same(p.detach(), exact.detach().bfloat16())


# --- gradients: read only, missing, not finite ---

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_bad_gradient_skips_its_matrix_alone(bad):
    shapes = [(12, 8), (12, 8), (3, 12, 8), (8, 12)]
    settings = dict(weight_decay=0.1, normuon_beta2=0.9, split_mantissa=True, deterministic=True)
    runs = {}
    for spoil in (False, True):
        params, gradients = make(shapes, dtype=torch.bfloat16, steps=4)
        if spoil:
            gradients[2][1] = None
            if bad is None:
                gradients[2][0] = None
            else:
                gradients[2][0].view(-1)[5] = bad
                gradients[2][2][1, 3, 3] = bad
        optimizer = Muon(params, **settings)
        history = []
        for step in gradients:
            feed(params, step)
            optimizer.step()
            history.append(([p.detach().clone() for p in params], optimizer.state_dict()["state"]))
        runs[spoil] = history, optimizer.skipped
    (good, none), (spoiled, skipped) = runs[False], runs[True]
    assert none == 0 and skipped == (2 if bad is None else 3)
    untouched = {(0, 0), (1, 0)} | (set() if bad is None else {(2, 1)})
    for i, p in enumerate(good[2][0]):
        for k in range(len(matrices(p))):
            # As before the step, or as if all had been well
            expected = spoiled[1] if (i, k) in untouched else good[2]
            assert same(matrices(spoiled[2][0][i])[k], matrices(expected[0][i])[k])
            for key, value in spoiled[2][1][i].items():
                of_one = (lambda x: x[k]) if key == "second_moment" else (lambda x: matrices(x)[k])
                assert same(of_one(value), of_one(expected[1][i][key])), key
            moved = not same(matrices(spoiled[3][0][i])[k], matrices(spoiled[2][0][i])[k])
            assert moved  # and the next good gradient moves it again


@pytest.mark.parametrize("bad", [1e300, 1e39])
def test_a_float64_gradient_that_float32_cannot_hold_is_skipped(bad):
    params, _ = make([(12, 8), (12, 8)], dtype=torch.float64)
    before = params[0].detach().clone()
    eye = torch.eye(12, 8).double()
    optimizer = train(params, [[eye * bad, eye]], weight_decay=0.1)
    assert same(params[0].detach(), before) and optimizer.skipped == 1
    assert not optimizer.state_dict()["state"][0]["momentum_buffer"].any()
    assert not torch.equal(params[1].detach(), before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float16, 1e-3)])
def test_other_floating_point_weights_follow_the_oracle(dtype, tolerance):
    (p,), gradients = make([(12, 20)], dtype=dtype)
    before = p.detach().clone()
    train([p], gradients, weight_decay=0.1)
    assert p.dtype == dtype
    close(p.detach(), oracle(before, [g for (g,) in gradients], weight_decay=0.1), rtol=0, atol=tolerance)


# --- refusals ---

@pytest.mark.parametrize("value", [
    torch.zeros(7), torch.zeros(()), torch.zeros(4, 0), torch.zeros(0, 4, 4),
    torch.zeros(4, 4, dtype=torch.complex64), torch.zeros(4, 4, dtype=torch.int32)], ids=str)
def test_a_parameter_it_cannot_take_is_refused_by_name(value):
    good = torch.nn.Parameter(torch.zeros(4, 4))
    sentence = (f"expected real matrices of some size, found shape {tuple(value.shape)} in {value.dtype}; "
                "leave it to another optimizer, such as AdamW")
    for name, params in (("w", [("good", good), ("w", value)]),
                         ("w", [dict(params=[("good", good)]), dict(params=[("w", value)])]),
                         ("parameter 1 of group 0", [good, value])):
        with pytest.raises(ValueError) as error:
            Muon(params)
        assert str(error.value) == f"Muon: {name}: {sentence}"


BAD = {
    "lr": [-0.1, torch.tensor([0.1, 0.2]), math.nan, None, "fast"],
    "momentum": [1.0, -0.1, None, math.nan],
    "weight_decay": [-1, "a", math.nan],
    "ns_steps": [0, 2.5, True, None],
    "ns_coefficients": ["cubic", [], (3.4, -4.7), [(1, 2)], 5, ["abc"], None, [(1, 2, "x")]],
    "adjust_lr_fn": ["rms", [1]],
    "normuon_beta2": [1.0, "a", -0.1],
    "nesterov": [1, None],
    "eps": [-1.0],
    "flatten": ["yes"],
    "split": [0, True, 2.0, [], (4, 0), (2.0, 2), "ab", (4, -4, 4)],
}
BAD_OPTIONS = {
    "ns_dtype": [torch.float64, "fp16"], "bucket_mb": [0, -1, math.inf, "many", None],
    "sync_grads": ["no", 2, None], "replicate_state": ["yes", 2], "deterministic": [None, "1"],
}


@pytest.mark.parametrize("setting", BAD)
def test_a_setting_out_of_range_is_refused_by_name(setting):
    p, q = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    for value in BAD[setting]:
        for number, given in enumerate(([dict(params=[p]) | {setting: value}],
                                        [dict(params=[p]), dict(params=[q]) | {setting: value}])):
            said = f"Muon: {setting} of group {number}: expected .*, found .*; change it"
            with pytest.raises(ValueError, match=said):
                Muon(given)


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_by_name(option):
    for value in BAD_OPTIONS[option]:
        said = f"Muon: {option}: expected .*, found .*; change it"
        with pytest.raises(ValueError, match=said):
            Muon([torch.nn.Parameter(torch.zeros(4, 4))], **{option: value})
        optimizer = Muon([torch.nn.Parameter(torch.zeros(4, 4))])
        setattr(optimizer, option, value)
        with pytest.raises(ValueError, match=said):
            optimizer.step()
    with pytest.raises(ValueError, match="expected parameters, all on one device, found none"):
        Muon([dict(params=[])])


# --- plan ---

GPT2 = [shape for _ in range(12) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]


def plan_of(shapes, world_size, cap):
    return place_units([flops(*shape) for shape in shapes], [m * n for m, n in shapes], world_size, cap)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 61])
@pytest.mark.parametrize("cap", [1, 5000, 10**9])
def test_every_unit_is_placed_once_within_the_lpt_bound(world_size, cap):
    generator = torch.Generator().manual_seed(world_size)
    units = [tuple(int(x) for x in torch.randint(2, 90, (2,), generator=generator)) for _ in range(60)]
    plan, costs = plan_of(units, world_size, cap), [flops(*unit) for unit in units]
    flat = [u for bucket in plan.buckets for ids in bucket for u in ids]
    assert sorted(flat) == list(range(60))
    loads = [sum(costs[u] for bucket in plan.buckets for u in bucket[r]) for r in range(world_size)]
    assert loads == plan.loads and plan.efficiency == pytest.approx(sum(costs) / world_size / max(loads))
    lower = max(max(costs), sum(costs) / world_size)
    assert max(loads) <= lower + (1 - 1 / world_size) * max(costs)
    order = [max(costs[u] for ids in bucket for u in ids) for bucket in plan.buckets]
    assert order == sorted(order, reverse=True)
    for bucket, later in zip(plan.buckets, [*plan.buckets[1:], [[]] * world_size]):
        # A rank's bucket is full if there are more, and was not before its last unit
        for ids, more in zip(bucket, later):
            fill, last = (sum(units[u][0] * units[u][1] for u in us) for us in (ids, [max(
                ids, key=lambda u: (-costs[u], u))] if ids else []))
            assert (fill >= cap or not more) and (fill - last < cap)
            assert not more or ids and min(costs[u] for u in ids) >= max(costs[u] for u in more)


def test_swaps_after_the_greedy_pass_balance_the_gram_form_too():
    costs = [newton_schulz_flops(m, n, 5, max(m, n) >= 2 * min(m, n), torch.float32) for m, n in GPT2]
    plan = place_units(costs, [m * n for m, n in GPT2], 8, 4_000_000)
    assert plan.efficiency == pytest.approx(0.990, abs=5e-4)  # 0.965 without them
    assert plan == place_units(costs, [m * n for m, n in GPT2], 8, 4_000_000)
    assert place_units([7, 6, 5, 4, 4, 4], [1] * 6, 2, 9).loads == [15, 15]  # greedy: 7 4 4 and 6 5 4
    assert max(place_units([5, 5, 4, 4, 3, 3, 3], [1] * 7, 3, 9).loads) == 9  # 27 in all; greedy: 11
    assert place_units([], [], 2, 9).buckets == []  # as on a rank without a matrix of its own
    many = [(i * 7919) % 1009 + 1 for i in range(400)]
    assert place_units(many, many, 16, 10_000).efficiency > 0.999


@pytest.mark.parametrize("shape, settings", [((10, 3, 4), dict()), ((12, 4), dict(split=3)),
                                             ((10, 6, 4), dict(split=2)), ((2, 7, 4), dict(split=(3, 4)))])
@pytest.mark.parametrize("count", [1, 3, 4, 100])
def test_runs_cover_every_matrix_of_a_stack_once(shape, settings, count):
    x = torch.arange(math.prod(shape)).view(shape)
    group, = Muon([x.float()], **settings).param_groups
    stacks = stacks_of(x, shape, group)
    matrices = [stack for stack in stacks for _ in range(len(stack))]
    for together in True, False:
        given, found = Counter(), {stack.number: [] for stack in stacks}
        for i in range(0, len(matrices), count):
            for run in runs(matrices[i:i + count], given, lambda stack: together):
                assert len(run) <= count and (together or len(run) == 1)
                found[run.number].append(run.of(x))
        for stack in stacks:
            assert torch.equal(torch.cat(found[stack.number]), stack.of(x))
            assert len(found[stack.number]) <= (len(stack) - 1) // count + 2 or not together
    found = torch.cat([stack.of(x).flatten() for stack in stacks])
    assert sorted(found) == list(range(x.numel()))


def test_eight_ranks_share_the_banks_of_track_small_evenly(monkeypatch):
    monkeypatch.setattr(muon, "world_and_rank", lambda group: (8, 0))
    monkeypatch.setattr(muon, "of_all_ranks", lambda fact, group: [fact])
    model = shapes_of(train_gpt.Config.for_track("small"))
    optimizer = Muon([getattr(model, name) for name in train_gpt.MATRICES], ns_dtype=torch.bfloat16)
    placement, = optimizer.placements
    held = [[sum(stack.numel for stack in mine) for mine in bucket.stacks] for bucket in optimizer.buckets]
    sent = 8 * sum(map(max, held))
    assert sent < 1.2 * sum(map(sum, held))  # padded by 15 %
    assert placement.efficiency > 0.98       # 0.997
    assert len(placement.buckets) == 3


# --- in place of torch.optim.Muon ---

JORDAN = 3.4445, -4.7750, 2.0315
TORCH = dict(lr=0.03, weight_decay=0.1, momentum=0.9, nesterov=False, ns_coefficients=JORDAN, eps=1e-7,
             ns_steps=4, adjust_lr_fn="match_rms_adamw")
OURS = TORCH | dict(ns_coefficients="jordan", eps=0.0)


def test_torch_names_mean_what_they_mean_there():
    shapes = [(24, 40), (40, 24), (32, 32)]
    results = []
    for settings in (TORCH, OURS):
        params, gradients = make(shapes)
        train(params, gradients, **settings)
        results.append(params)
    for a, b in zip(*results):
        assert same(a.detach(), b.detach())
    assert TORCH.items() <= Muon([dict(params=params, **TORCH)]).param_groups[0].items()


def test_its_first_arguments_come_in_the_order_of_torch():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (muon.Muon, torch.optim.Muon))
    assert list(ours)[:len(theirs)] == list(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs):])
    assert all(p.annotation is not p.empty for name, p in ours.items() if name != "self")
    assert typing.get_type_hints(muon.Muon.__init__)["process_group"] == torch.distributed.ProcessGroup | None


@pytest.mark.parametrize("settings", [
    TORCH, dict(ns_coefficients=JORDAN), dict(ns_coefficients=JORDAN, adjust_lr_fn="identity"),
    dict(normuon_beta2=0.9, ns_coefficients=JORDAN)], ids=str)
def test_torch_muon_continues_from_our_checkpoint(settings):
    shapes = [(24, 40), (40, 24), (32, 32)]
    ours, gradients = make(shapes, steps=5)
    theirs, _ = make(shapes)
    optimizer = train(ours, gradients[:2], **settings)
    with torch.no_grad():
        for p, q in zip(theirs, ours):
            p.copy_(q)
    peer = torch.optim.Muon(theirs, lr=1.0)
    peer.load_state_dict(save_and_load(optimizer.state_dict()))
    optimizer.param_groups[0]["normuon_beta2"] = None  # torch has no such thing
    moved = [p.detach().clone() for p in ours]
    for step in gradients[2:]:
        for params, each in ((ours, optimizer), (theirs, peer)):
            feed(params, step)
            each.step()
    for p, q, start in zip(ours, theirs, moved):
        assert (p.detach() - q.detach()).norm() < 0.03 * (q.detach() - start).norm()


# --- surroundings: closures, schedulers, checkpoints, pickles, compile ---

@pytest.mark.parametrize("through", [
    copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: save_and_load(x, weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("named", [False, True])
def test_a_copy_continues_bit_for_bit_on_its_own_parameters(through, named):
    settings = dict(weight_decay=0.1, normuon_beta2=0.9, cautious=True, deterministic=True, bucket_mb=1e-3)
    params, gradients = make(SHAPES, steps=4)
    gradients[1][0] = None
    given = [(f"w{i}", p) for i, p in enumerate(params)] if named else params
    groups = [dict(params=given[:3], split=2, role="hidden"), dict(params=given[3:], eps=1e-9)]
    optimizer = Subclass(groups, lr=0.03, flatten=False, **settings)
    for group in optimizer.param_groups:
        group["momentum"] = 0.8
    for step in gradients[:2]:
        feed(params, step)
        optimizer.step()
    others, copied = through((params, optimizer))
    assert type(copied) is Subclass and copied.skipped == optimizer.skipped == 2
    assert [p for group in copied.param_groups for p in group["params"]] == others
    assert others[0] is not params[0]
    for ours, theirs in zip(optimizer.param_groups, copied.param_groups):
        assert ours | dict(params=None) == theirs | dict(params=None)
    for step in gradients[2:]:
        for which, each in ((params, optimizer), (others, copied)):
            feed(which, step)
            each.step()
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, others))
    saved = copied.state_dict()
    saved["state"][2]["momentum_buffer"] = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=f"{'w2' if named else 'parameter 2 of group 0'}: expected a mom"):
        copied.load_state_dict(saved)


class Subclass(muon.Muon):
    pass


def test_group_keys_unknown_to_us_survive():
    (p, q), ((g, h),) = make([(12, 8), (8, 12)], steps=1)
    optimizer = Muon([dict(params=[p], role="attention", layer=3), dict(params=[q], role="mlp")])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    feed([p, q], [g, h])
    optimizer.step()
    saved = save_and_load(optimizer.state_dict())
    other = Muon([dict(params=[p]), dict(params=[q])])
    other.load_state_dict(saved)
    for each in (optimizer, other):
        assert [group["role"] for group in each.param_groups] == ["attention", "mlp"]
        assert each.param_groups[0]["layer"] == 3 and each.param_groups[0]["initial_lr"] == 0.02


def test_what_shapes_the_state_is_ours_not_the_checkpoint_s():
    (p,), gradients = make([(12, 8)])
    saved = train([p], gradients, split=2, lr=0.5).state_dict()
    other = Muon([torch.nn.Parameter(torch.zeros(12, 8))], split=3)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["split"], group["flatten"], group["lr"]) == (3, False, 0.5)


def spoilt(i, **entries):
    return lambda saved: saved["state"][i].update(entries)


def without(i, name):
    return lambda saved: saved["state"][i].pop(name)


def of_another_optimizer(saved):
    for i, state in saved["state"].items():
        saved["state"][i] = dict(exp_avg=state["momentum_buffer"], step=torch.ones(()))


def regrouped(**entries):
    return lambda saved: saved["param_groups"][0].update(entries)


@pytest.mark.parametrize("spoil, sentence", [
    (without(1, "momentum_buffer"), "w1: expected a momentum_buffer of .*, found none; load the whole state"),
    (of_another_optimizer, "w0: expected a momentum_buffer of .*, found none; load the whole state"),
    (without(0, "second_moment"), "w0: expected a second_moment of shape .*, found none"),
    (without(2, "mantissa"), "w2: expected a mantissa of shape .*, found none"),
    (spoilt(2, mantissa=torch.zeros(4, 4)), r"w2: expected a mantissa of shape \(8, 12\), found \(4, 4\)"),
    (spoilt(0, second_moment=torch.zeros(1, 8)), "w0: expected a second_moment of shape"),
    (spoilt(2, momentum_buffer=torch.zeros(12, 8)),
     r"w2: expected a momentum_buffer of shape \(8, 12\), found \(12, 8\)"),
    (lambda saved: saved["param_groups"].append(dict(saved["param_groups"][0], params=[3])),
     r"expected groups of \[3\] parameters, found \[3, 1\]; load a checkpoint of this model"),
    (lambda saved: saved["param_groups"][0]["params"].pop(), r"expected groups of \[3\] .*, found \[2\]"),
    (regrouped(param_names=["w0", "w2", "w1"]), "expected w1, found w2 in its place; build the optimizer"),
    (regrouped(momentum=2.0), "momentum of group 0: expected 0 <= momentum < 1, found 2.0")])
def test_a_broken_checkpoint_is_refused_and_leaves_the_optimizer_as_it_was(spoil, sentence):
    settings = dict(normuon_beta2=0.9, split_mantissa=True, deterministic=True)
    shapes = [(12, 8), (12, 8), (8, 12)]
    params, gradients = make(shapes, dtype=torch.bfloat16)
    straight, _ = make(shapes, dtype=torch.bfloat16)
    optimizer = train([(f"w{i}", p) for i, p in enumerate(params)], [], **settings)
    reference = Muon(straight, **settings)
    for t, step in enumerate(gradients):
        if t == 2:
            saved = optimizer.state_dict()
            saved["state"] = {i: dict(s) for i, s in saved["state"].items()}
            saved["param_groups"] = [dict(g, params=list(g["params"]), lr=9.0) for g in saved["param_groups"]]
            spoil(saved)
            with pytest.raises(ValueError, match=f"^(Muon: )?{sentence}"):
                optimizer.load_state_dict(saved)
        for which, each in ((params, optimizer), (straight, reference)):
            feed(which, step)
            each.step()
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, straight))


@pytest.mark.parametrize("names", [["module.a", "module.b"], None])
def test_a_checkpoint_of_a_wrapped_model_or_without_names_loads(names):
    params, gradients = make([(12, 8), (12, 8)], steps=1)
    optimizer = Muon(list(zip("ab", params)))
    feed(params, gradients[0])
    optimizer.step()
    saved = optimizer.state_dict()
    group, = saved["param_groups"]
    assert group.pop("param_names") == ["a", "b"]
    optimizer = Muon(list(zip("ab", make([(12, 8), (12, 8)])[0])))
    optimizer.load_state_dict({**saved, "param_groups": [group | ({"param_names": names} if names else {})]})
    assert same(optimizer.state_dict()["state"][1]["momentum_buffer"], saved["state"][1]["momentum_buffer"])


@pytest.mark.parametrize("name, on, off", [
    ("second_moment", dict(normuon_beta2=0.9), dict(normuon_beta2=None)),
    ("mantissa", dict(split_mantissa=True), dict(split_mantissa=False))])
def test_state_that_is_no_longer_asked_for_is_dropped(name, on, off):
    params, gradients = make([(12, 8)], dtype=torch.bfloat16)
    optimizer = train(params, gradients[:2], **on)
    optimizer.param_groups[0].update(off)
    feed(params, gradients[2])
    optimizer.step()
    assert [*optimizer.state[params[0]]] == ["momentum_buffer"]
    optimizer.param_groups[0].update(on)
    optimizer.step()
    assert optimizer.state[params[0]][name].any()


def test_the_bits_do_not_depend_on_how_a_gradient_lies_in_memory():
    (p, q), ((G, _),) = make([(9, 16), (9, 16)], steps=1)
    q.data.copy_(p.data)
    p.grad = G
    q.grad = G.mT.contiguous().mT
    for each in (p, q):
        Muon([each], deterministic=True).step()
    assert same(p.detach(), q.detach())


@pytest.mark.parametrize("loaded", [True, False])
def test_masters_asked_for_later_are_refused_for_what_is_not_bf16(loaded):
    params, gradients = make([(12, 8)])
    optimizer = train(params, gradients[:1])
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="expected torch.bfloat16 for split_mantissa, found torch.float32"):
        if loaded:
            low, steps = make([(12, 8)], dtype=torch.bfloat16)
            optimizer.load_state_dict(train(low, steps, split_mantissa=True).state_dict())
        optimizer.param_groups[0]["split_mantissa"] = True
        optimizer.step()
    assert same(params[0].detach(), before)


@pytest.mark.parametrize("optimizer_type", [Muon, torch.optim.Muon])
def test_a_checkpoint_of_a_parameter_that_never_had_a_gradient_loads(optimizer_type):
    params, gradients = make([(12, 8), (12, 8)])
    saved = optimizer_type(params)
    feed(params, [gradients[0][0], None])
    saved.step()
    optimizer = Muon(params, deterministic=True)
    with pytest.warns(UserWarning, match="parameter 1 of group 0 has no state in the checkpoint; it starts"):
        optimizer.load_state_dict(saved.state_dict())
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert same(momentum, saved.state_dict()["state"][0]["momentum_buffer"])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = Muon(twins[1:], deterministic=True)
    fresh.param_groups[0].update({k: v for k, v in optimizer.param_groups[0].items() if k in muon.RULES})
    feed(params, gradients[1])
    feed(twins, gradients[1])
    optimizer.step()
    fresh.step()
    assert same(params[1].detach(), twins[1].detach()) and not same(params[0].detach(), twins[0].detach())


def test_a_fresh_state_loads_as_zeros_and_a_state_before_masters_keeps_what_it_has():
    params, gradients = make([(12, 8)], dtype=torch.bfloat16)
    optimizer = train(params, gradients)
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    with_masters = Muon(params, split_mantissa=True)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["split_mantissa"]
    with_masters.load_state_dict(saved)
    state = with_masters.state_dict()["state"][0]
    assert same(state["momentum_buffer"], momentum) and "mantissa" not in state  # zero at its first use
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("bad, sentence", [
    (dict(params=[torch.zeros(4, 4, device="meta")]), "expected parameters, all on one device"),
    (dict(params=[torch.zeros(4)]), "expected real matrices of some size"),
    (dict(params=[torch.zeros(4, 4)], split=3), "expected a split of its 4 rows"),
    (dict(params=[torch.zeros(4, 4)], lr=-1), "lr of group 1: expected one number, 0 or more")])
def test_a_refused_group_leaves_nothing_behind(bad, sentence):
    params, gradients = make([(12, 8), (3, 8, 12)], steps=4)
    straight, _ = make([(12, 8), (3, 8, 12)])
    optimizer, reference = Muon(params[:1], deterministic=True), Muon(straight[:1], deterministic=True)
    for t, step in enumerate(gradients):
        if t == 1:
            with pytest.raises(ValueError, match=sentence):
                optimizer.add_param_group(bad)
        if t == 2:
            optimizer.add_param_group(dict(params=params[1:]))
            reference.add_param_group(dict(params=straight[1:]))
        for which, each in ((params, optimizer), (straight, reference)):
            feed(which, step)
            each.step()
    assert all(same(p.detach(), q.detach()) for p, q in zip(params, straight))
    assert len(optimizer.param_groups) == 2


def test_compiled_functions_agree_and_schedules_do_not_recompile(monkeypatch):
    from torch._dynamo.testing import CompileCounter
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter, **options))
    torch._dynamo.reset()
    muon.fuse.cache_clear()
    shapes = [(24, 40), (40, 24), (3, 16, 24)]
    settings = dict(weight_decay=0.1, cautious=True, normuon_beta2=0.9, split_mantissa=True)
    fused, gradients = make(shapes, dtype=torch.bfloat16, steps=6)
    plain, _ = make(shapes, dtype=torch.bfloat16)
    optimizer, counts = Muon(fused, compile=True, **settings), []
    reference = Muon(plain, **settings)
    for t, step in enumerate(gradients):
        for each in (optimizer, reference):
            each.param_groups[0].update(lr=0.02 / (t + 1), momentum=0.9 + t / 100, weight_decay=0.1 * t)
        feed(fused, step)
        feed(plain, step)
        optimizer.step()
        reference.step()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * 6
    muon.fuse.cache_clear()  # it holds what the counter has compiled
    for p, q in zip(fused, plain):
        # A bf16 step at most: fp32 and fp64 scalars round apart
        close(p.detach(), q.detach(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("settings", [
    dict(), dict(split_mantissa=True, dtype=torch.bfloat16), dict(ns_dtype=torch.bfloat16),
    dict(deterministic=True, nesterov=False)], ids=str)
def test_a_step_needs_no_value_of_any_tensor_and_so_never_waits_for_the_device(monkeypatch, settings):
    """On the meta device there is no value to be read, by Python or by torch; to print one is to read it."""
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    params = [torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)) for shape in SHAPES]
    rates = dict(lr=torch.empty((), device="meta"), weight_decay=0.1, cautious=True, normuon_beta2=0.9)
    optimizer = Muon(params, **rates, **settings)
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda x: 1 / 0)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")  # what is set is checked
        feed(params, map(torch.empty_like, params))
        optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].is_meta for p in params)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the allocator of glibc")
def test_a_step_reuses_the_memory_of_the_one_before():
    """Count the pages that a step gets anew in a program that has freed nothing large yet: they were 900."""
    code = """if True:
        import resource
        import torch
        from muon import Muon
        torch.set_num_threads(1)
        params = [torch.ones(shape) for shape in [(384, 128), (128, 128), (512, 128), (128, 512)] * 2]
        for p in params:
            p.grad = torch.eye(*p.shape)
        optimizer = Muon(params, ns_dtype=torch.bfloat16)
        faults = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            optimizer.step()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert faults[-1] < 100, faults"""
    subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(muon.__file__), check=True)


def test_nothing_but_torch_and_the_standard_library_is_imported_and_a_copy_works_in_a_package(tmp_path):
    tree = ast.parse(open(muon.__file__).read())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("")
    (tmp_path / "theirs/optim.py").write_text(open(muon.__file__).read())
    code = "from theirs.optim import Muon, torch; p = torch.ones(3, 4); p.grad = p + 0; "
    code += "Muon([p]).step(); assert (p < 1).all()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
