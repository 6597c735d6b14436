"""Twenty questions about a Muon, as checks that any optimizer can be put to:
python -m bench.muon --only=checks [--subjects=muon.py] [--checks=4a,5b]

A check returns when the optimizer passes and raises when it does not. NotPosed: it has no such setting, or nothing that
could go wrong; Refused: it turned the parameters away when it was built, which is an honest answer. The rest fails, a
crash and a hang too. Every subject is judged by this code, on a CPU, with torch.compile off except where it is the
subject of the check.
"""
import copy
import functools
import hashlib
import inspect
import random
import time

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bench.muon_peers import WIRE, Failed, NotPosed, Refused, Subject, first_line, isolated, load, ranks
import muon  # after muon_peers, which counts what goes through torch.distributed

CHECKS = {}  # key -> (title, function); keys are the numbers of the plan, a letter where a question has parts
CASES = ([(12, 8)] * 5, [(24, 8), (8, 24), (12, 12), (20, 6), (6, 20), (9, 5), (5, 9)], [(10, 6)], [(8, 8), (6, 10)])
SHAPES = [(24, 8), (8, 24), (16, 16)]
EQUAL = [(12, 8)] * 6  # for questions that have nothing to do with mixed shapes
HALF = 0.1        # relative error in the Frobenius norm that 16-bit iterations may have: 0.02 to 0.08 are common
SINGLE = 1e-4     # and those in fp32


def check(key: str, title: str):
    return lambda function: CHECKS.setdefault(key, (title, function))[1]


def gradients(shapes, steps: int = 1, seed: int = 0, dtype=torch.float32) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(steps)]


def weights(shapes, dtype=torch.float32, value: float | None = None) -> list[torch.nn.Parameter]:
    torch.manual_seed(7)
    return [torch.nn.Parameter((torch.randn(s) if value is None else torch.full(s, value)).to(dtype)) for s in shapes]


def advance(optimizer, params, steps, copies: bool = True) -> None:
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = g.clone() if copies and g is not None else g
        optimizer.step()


def run(S: Subject, shapes, steps, value: float | None = None, dtype=torch.float32, **settings) -> list[Tensor]:
    """Weights after the steps."""
    params = weights(shapes, dtype, value)
    advance(S(params, **settings), params, steps)
    return [p.detach() for p in params]


def update(S: Subject, *grads: Tensor, **settings) -> list[Tensor]:
    """What one step at lr = 1 subtracts from weights of zero."""
    return [-w for w in run(S, [g.shape for g in grads], [grads], value=0.0, lr=1.0, **settings)]


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.isfinite().all(), f"{what}: not finite"
    error = ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()
    assert error <= tolerance, f"{what}: relative error {error:.2g}, allowed {tolerance:g}"


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)).hexdigest()


def bitwise(S: Subject) -> dict:
    return dict(deterministic=True) if S.offers("deterministic") else {}


def tolerance(settings: dict) -> float:
    return SINGLE if settings.get("ns_dtype") == torch.float32 else HALF


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V^T, the m x n matrix with these singular values), in fp64."""
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, len(values), dtype=torch.float64))[0] for k in (m, n))
    return U, V.mT, U @ values.double().diag() @ V.mT


def singular_value_map(values: Tensor, coefficients: str, steps: int = 5) -> Tensor:
    """What the exact iteration makes of these singular values, in fp64."""
    safety, triples = muon.COEFFICIENTS[coefficients]
    x = values.double() / (values.double().norm() * safety)
    for i in range(steps):
        a, b, c = triples[min(i, len(triples) - 1)]
        x = a * x + b * x**3 + c * x**5
    return x


def reference(S: Subject, W: Tensor, steps: list[Tensor], lr, momentum, weight_decay, nesterov) -> Tensor:
    """W after the steps, by singular value decomposition in fp64."""
    W, M = W.double(), torch.zeros_like(W, dtype=torch.float64)
    for G in steps:
        M = momentum * M + (1 - momentum) * G.double()
        U, values, V = torch.linalg.svd((1 - momentum) * G.double() + momentum * M if nesterov else M, full_matrices=False)
        scale = muon.ADJUST_LR[S.adjust_lr](*W.shape)
        W = W - lr * weight_decay * W - lr * scale * U @ singular_value_map(values, S.coefficients).diag() @ V
    return W


def whole_state(optimizer) -> dict:
    """state_dict(), after the call that an implementation documents for several ranks."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def state_tensors(state) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [x for part in parts for x in state_tensors(part)]


def momentum_of(optimizer, number: int, p: Tensor) -> Tensor:
    found = [x for x in state_tensors(whole_state(optimizer)["state"].get(number, {})) if x.numel() == p.numel()]
    assert found, f"no momentum of parameter {number} in state_dict()"
    return found[0].detach().clone().view(p.shape)


# ----------------------------------------------------------------------------------------------------------------------
# 1-3: ranks, counts, plans

@check("1", "the same bits on every one of 1 to 5 ranks")
def same_bits(S):
    def rank_run(_):
        return [digest(run(S, shapes, gradients(shapes, 3), **bitwise(S))) for shapes in CASES]
    found = [answer for W in (1, 2, 3, 4, 5) for answer in ranks(W, rank_run)]
    for number in range(len(CASES)):
        assert len({answer[number] for answer in found}) == 1, f"ranks or worlds differ for shapes {CASES[number]}"


@check("2", "any number of matrices, also fewer than ranks")
def any_number(S):
    alone = [run(S, shapes, gradients(shapes, 3)) for shapes in CASES]
    for W in (2, 3, 4):
        for answer in ranks(W, lambda _: [run(S, shapes, gradients(shapes, 3)) for shapes in CASES]):
            for a, e in zip(answer, alone):
                [close(x, y, HALF, f"{W} ranks") for x, y in zip(a, e)]


@check("3", "the plan: every unit once, balance of GPT-2 on 8 ranks at least 0.97")
def plan(S):
    if S.name != "muon.py":
        raise NotPosed("it shows no plan")
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
    costs, sizes = [muon.newton_schulz_flops(*s, 5, False) for s in shapes], [m * n for m, n in shapes]
    for W in (1, 2, 3, 4, 8, 16, 32):
        plan = muon.place_units(costs, sizes, W, 4_000_000)
        units = [u for bucket in plan.buckets for mine in bucket for u in mine]
        assert sorted(units) == list(range(48)) and plan == muon.place_units(costs, sizes, W, 4_000_000)
        two = sum(sorted(costs, reverse=True)[W - 1:W + 1])  # W + 1 units on W ranks: two of them meet
        bound = (4 / 3 - 1 / (3 * W)) * max(sum(costs) / W, max(costs), two)
        assert max(plan.loads) <= bound and sum(plan.loads) == sum(costs), f"{W} ranks: loads {plan.loads}, bound {bound}"
        assert W != 8 or plan.efficiency >= 0.97, f"efficiency {plan.efficiency:.3f} on 8 ranks"


# ----------------------------------------------------------------------------------------------------------------------
# 4: DTensor parameters

def sharded(how, S):
    shapes, placement, W, members = (*how, list(range(how[2])))[:4]
    steps = gradients(shapes, 3)
    alone = run(S, shapes, steps)

    def rank_run(rank):
        mesh = DeviceMesh("cpu", members)
        if rank not in members:
            return []
        place = lambda x: distribute_tensor(x, mesh, [placement])
        params = [torch.nn.Parameter(place(p.detach())) for p in weights(shapes)]
        optimizer = S(params, **(dict(mesh=mesh) if S.shards else {}))
        advance(optimizer, params, [[place(g) for g in grads] for grads in steps], copies=False)
        return [p.detach().redistribute(mesh, [Replicate()]).to_local() for p in params]
    for answer in ranks(W, rank_run):
        for actual, expected, start in zip(answer, alone, weights(shapes)):
            close(actual - start.detach(), expected - start.detach(), HALF, f"{tuple(start.shape)} on {W} ranks")


for key, title, *how in (
        ("4a", "DTensor shards of rows, uneven and empty", [(18, 12), (3, 12), (50, 12)], Shard(0), 4),
        ("4b", "DTensor shards of columns", [(12, 18), (16, 8), (12, 50)], Shard(1), 5),
        ("4c", "DTensor shards of a bank's matrices", [(6, 8, 12), (3, 12, 8)], Shard(0), 4),
        ("4d", "DTensor mesh that leaves out rank 0", [(18, 12), (12, 18)], Shard(0), 3, [1, 2])):
    check(key, title)(functools.partial(sharded, how))


# ----------------------------------------------------------------------------------------------------------------------
# 5: checkpoints

@check("5a", "the state on rank 0 holds every momentum")
def complete_state(S):
    def rank_run(rank):
        params = weights(EQUAL)
        optimizer = S(params)
        advance(optimizer, params, gradients(EQUAL, 2))
        state = whole_state(optimizer)["state"]
        return [any(x.numel() >= 96 and x.any() for x in state_tensors(state.get(i, {}))) for i in range(len(EQUAL))]
    found = ranks(3, rank_run)[0]
    assert all(found), f"rank 0 of 3 lacks or has zeros for {found.count(False)} of {len(EQUAL)} momenta"


@check("5b", "saved on 3 ranks, continued on 1, 2 and 4, bit for bit")
def reshard(S):
    def train(first, last, saved=None):
        params = [torch.nn.Parameter(w.clone()) for w in saved[0]] if saved else weights(EQUAL)
        optimizer = S(params, **bitwise(S))
        if saved:
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
        for t, grads in enumerate(gradients(EQUAL, 5)[first:last], first):
            torch.manual_seed(t)  # for those that round at random
            advance(optimizer, params, [grads])
        return [p.detach() for p in params], optimizer

    def save(_):
        w, optimizer = train(0, 2)
        state = whole_state(optimizer)
        state["param_groups"] = [{k: v for k, v in g.items() if not callable(v)} for g in state["param_groups"]]
        return w, state
    saved, straight = ranks(3, save)[0], digest(ranks(1, lambda _: train(0, 5)[0])[0])
    for W in (1, 2, 4):
        for answer in ranks(W, lambda _: digest(train(2, 5, saved)[0])):
            assert answer == straight, f"on {W} ranks it ends elsewhere than without interruption"


@check("5c", "bf16 parameters: fp32 momentum survives save and load")
def fp32_momentum(S):
    params = weights(SHAPES, torch.bfloat16)
    optimizer = S(params)
    advance(optimizer, params, gradients(SHAPES, 3, dtype=torch.bfloat16))
    before = momentum_of(optimizer, 0, params[0])
    assert before.dtype == torch.float32, f"momentum is {before.dtype}"
    other = S(weights(SHAPES, torch.bfloat16))
    other.load_state_dict(copy.deepcopy(whole_state(optimizer)))
    assert torch.equal(momentum_of(other, 0, params[0]), before), "the loaded momentum is another"


@check("5d", "takes a checkpoint of torch.optim.Muon")
def from_torch(S):
    theirs, params, steps = load("torch.optim.Muon"), weights(SHAPES), gradients(SHAPES, 3)
    optimizer = theirs(params)
    advance(optimizer, params, steps)
    mine = S(ours := [torch.nn.Parameter(p.detach().clone()) for p in params])
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    start = [p.detach().clone() for p in params]
    advance(optimizer, params, gradients(SHAPES, seed=3))
    advance(mine, ours, gradients(SHAPES, seed=3))
    for p, q, before in zip(params, ours, start):
        close(q.detach() - before, p.detach() - before, 2 * HALF, "the step after loading")


# ----------------------------------------------------------------------------------------------------------------------
# 6-9: gradients

@check("6a", "p.grad is not written")
def grad_is_read_only(S):
    for dtype in (torch.float32, torch.bfloat16):
        params, steps = weights(SHAPES, dtype), gradients(SHAPES, 2, dtype=dtype)
        optimizer = S(params)
        for grads in steps:
            advance(optimizer, params, [grads])
            if all(p.grad is None for p in params):
                raise NotPosed("it takes p.grad away")
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads)), f"{dtype}: p.grad changed"


@check("6b", "momentum is the average of gradients, fp32 and bf16, with and without Nesterov")
def momentum_closed_form(S):
    for dtype in (torch.float32, torch.bfloat16):
        for nesterov in (True, False) if S.offers("nesterov") else (True,):
            params, steps = weights(SHAPES, dtype), gradients(SHAPES, 3, dtype=dtype)
            optimizer = S(params, nesterov=nesterov)
            advance(optimizer, params, steps)
            for i, p in enumerate(params):
                expected = sum(0.95 ** (2 - t) * steps[t][i].double() for t in range(3))
                M = momentum_of(optimizer, i, p).double()
                M = M * ((M * expected).sum() / M.square().sum())  # plain and averaging momentum differ by a factor
                close(M, expected, 0.02, f"momentum, {dtype}, nesterov={nesterov}")


@check("7", "the size of gradients does not matter, 1e-30 to 1e30")
def scale_invariance(S):
    G = gradients([(24, 16)])[0][0]
    expected = update(S, G)[0]
    for exponent in (-100, -33, 33, 100):
        close(update(S, G * 2.0**exponent)[0], expected, 0.02, f"gradient times 2^{exponent}")


@check("8a", "zero gradient: finite, nothing moves but decay")
def zero_gradient(S):
    start, zeros = weights(SHAPES), [[torch.zeros(s) for s in SHAPES]]
    for p, w in zip(start, run(S, SHAPES, zeros, lr=0.1, weight_decay=0.5)):
        close(w, p.detach() * 0.95, 1e-6, "weights")


@check("8b", "missing gradient: that matrix stays, the others move")
def missing_gradient(S):
    params = weights(SHAPES)
    optimizer = S(params, weight_decay=0.1)
    advance(optimizer, params, gradients(SHAPES))
    before = [p.detach().clone() for p in params]
    advance(optimizer, params, [[None, *gradients(SHAPES, seed=1)[0][1:]]])
    assert torch.equal(params[0], before[0]), "a matrix without a gradient moved"
    assert all(not torch.equal(p, b) for p, b in zip(params[1:], before[1:])), "the others did not move"


def spoiled(spoil, S) -> None:
    """Ranks agree although something is wrong with one gradient on one rank, whoever owns that matrix."""
    def rank_run(rank):
        WIRE.reset()
        found = []
        for number in (0, 1):
            steps = gradients(EQUAL, 2)
            if rank == 1:
                steps[1][number] = spoil(steps[1][number])
            found.append(digest(run(S, EQUAL, steps)))
        return found, WIRE.calls
    answers = ranks(2, rank_run)
    if not any(calls for _, calls in answers):
        raise NotPosed("its ranks exchange nothing")
    assert len({tuple(found) for found, _ in answers}) == 1, "ranks hold different weights afterwards"


check("8c", "gradient missing on one rank: no hang, ranks agree")(functools.partial(spoiled, lambda g: None))


@check("9a", "NaN or Inf in one matrix: it and its momentum stay, the others step")
def not_finite(S):
    for bad in (float("nan"), float("inf")):
        steps = gradients(SHAPES, 2)
        steps[1][1][0, 0] = bad
        params = weights(SHAPES)
        optimizer = S(params)
        advance(optimizer, params, steps[:1])
        before, M = params[1].detach().clone(), momentum_of(optimizer, 1, params[1])
        advance(optimizer, params, steps[1:])
        assert torch.equal(params[1], before), f"{bad}: the weights changed"
        assert torch.equal(momentum_of(optimizer, 1, params[1]), M), f"{bad}: the momentum changed"
        for i in (0, 2):
            close(params[i].detach(), run(S, SHAPES, gradients(SHAPES, 2))[i], SINGLE, f"{bad}: another matrix")


check("9b", "NaN on one rank only: ranks agree")(functools.partial(spoiled, lambda g: g * float("nan")))


# ----------------------------------------------------------------------------------------------------------------------
# 10-16: the mathematics

def exact_update(S, U, V, values) -> Tensor:
    return muon.ADJUST_LR[S.adjust_lr](U.size(0), V.size(1)) * U @ singular_value_map(values, S.coefficients).diag() @ V


@check("10", "singular values go where the polynomial says")
def exact_map(S):
    for settings in S.variants:
        for m, n in ((24, 72), (64, 24), (32, 32)):
            allowed = tolerance(settings)
            values = torch.logspace(0, -3 if allowed == SINGLE else -1, min(m, n))  # smaller ones drown in bf16
            U, V, G = with_spectrum(m, n, values)
            close(update(S, G.float(), **settings)[0], exact_update(S, U, V, values), allowed, f"{m} x {n} {settings}")


@check("11", "rank-deficient: the null space stays bounded")
def null_space(S):
    for settings in S.variants:
        U, V, G = with_spectrum(32, 48, torch.ones(8))
        O = update(S, G.float(), **settings)[0].double()
        noise = torch.linalg.matrix_norm(O - U @ (U.mT @ O @ V.mT) @ V, 2).item()
        # rounding to fp32, 6e-8, times the slope at zero, which is 990 for "polar"; in 16 bits it must stay
        # below what a true direction gets
        assert noise <= (1e-4 if tolerance(settings) == SINGLE else 1.0), f"{noise:.2g} outside of the row space {settings}"


@check("12", "a matrix does not feel its neighbours, flattened ones neither")
def isolation(S):
    for shapes, settings in ((([(16, 8)] * 3, {})), ([(8, 3, 3)] * 3, dict(flatten=True))):
        if settings and not S.offers("flatten"):
            continue
        grads = gradients(shapes)[0]
        for g, together in zip(grads, update(S, *grads, **settings)):
            close(together, update(S, g, **settings)[0], HALF, f"{tuple(g.shape)}")


@check("13a", "convolutions: flattened, scaled by the flattened shape")
def convolution(S):
    settings = dict(flatten=True) if S.name == "dion" else {}
    for shape in ((64, 3, 3, 3), (48, 1, 3, 3)):
        U, V, G = with_spectrum(shape[0], 9 * shape[1], values := torch.linspace(1, 0.1, 9 * shape[1]))
        for G4 in (G.float().view(shape), G.float().view(shape).contiguous(memory_format=torch.channels_last)):
            close(update(S, G4, **settings)[0].flatten(1), exact_update(S, U, V, values), HALF, f"{shape}")


@check("13b", "banks: every matrix by itself")
def bank(S):
    G = gradients([(4, 16, 8)])[0][0]
    together = update(S, G)[0]
    if (together.flatten(1) - update(S, G.flatten(1))[0]).norm() < HALF * together.norm():
        raise NotPosed("it takes a bank for one flattened matrix")
    for part, g in zip(together, G):
        close(part, update(S, g)[0], HALF, "a matrix of the bank")


@check("13c", "transposed parameters and gradients")
def layouts(S):
    expected = run(S, [(24, 8), (8, 24)], gradients([(24, 8), (8, 24)]))
    params = [torch.nn.Parameter(p.detach().mT.contiguous().mT) for p in weights([(24, 8), (8, 24)])]
    advance(S(params), params, [[g.mT.contiguous().mT for g in gradients([(24, 8), (8, 24)])[0]]], copies=False)
    for p, e in zip(params, expected):
        close(p.detach(), e, 0.01, "weights")


@check("14a", "match_rms_adamw: root mean square 0.2 for six shapes")
def update_rms(S):
    for shape in ((32, 32), (64, 16), (16, 64), (96, 32), (32, 96), (128, 16)):
        values = torch.linspace(1, 0.5, min(shape))
        expected = 0.2 * singular_value_map(values, S.coefficients).square().mean().sqrt()
        rms = update(S, with_spectrum(*shape, values)[2].float(), adjust_lr="match_rms_adamw")[0].square().mean().sqrt()
        close(rms, expected, HALF, f"{shape}: root mean square")


@check("14b", "decay is 1 - lr weight_decay in every mode")
def decay(S):
    posed = 0
    for name in muon.ADJUST_LR:
        try:
            w = run(S, SHAPES, [[torch.zeros(s) for s in SHAPES]], lr=0.1, weight_decay=0.5, adjust_lr=name)
        except NotPosed:
            continue
        posed += 1
        for p, x in zip(weights(SHAPES), w):
            close(x, 0.95 * p.detach(), 1e-6, f"decay with adjust_lr={name}")
    assert posed, "no mode could be set"


@check("15", "a split matrix is its blocks, unequal ones too")
def split(S):
    G = gradients([(40, 16)])[0][0]
    together = update(S, G, split=[24, 8, 8])[0]
    for part, g in zip(together.split([24, 8, 8]), G.split([24, 8, 8])):
        close(part, update(S, g.clone())[0], HALF, f"block of {len(g)} rows")


@check("16", "five steps as a reference in fp64")
def parity(S):
    for settings in S.variants:
        for nesterov in (True, False) if S.offers("nesterov") else (True,):
            steps = gradients(SHAPES[:2], 5)
            found = run(S, SHAPES[:2], steps, lr=0.1, weight_decay=0.1, nesterov=nesterov, **settings)
            for p, w, grads in zip(weights(SHAPES[:2]), found, zip(*steps)):
                start = p.detach().double()
                expected = reference(S, start, list(grads), 0.1, 0.95, 0.1, nesterov)
                close(w - start, expected - start, tolerance(settings), f"nesterov={nesterov} {settings}")


# ----------------------------------------------------------------------------------------------------------------------
# 17-20: running it

@check("17", "slow ranks and other buckets change no bit")
def overlap(S):
    def rank_run(rank, sleep):
        dice = random.Random(rank)
        WIRE.reset((lambda: time.sleep(dice.random() / 50)) if sleep else None)
        sizes = [dict(bucket_mb=mb) for mb in (16, 1e-9)] if S.offers("bucket_mb") else [{}]
        return [digest(run(S, EQUAL, gradients(EQUAL, 3), **bitwise(S), **size)) for size in sizes], WIRE.calls
    calm, slow = ranks(3, rank_run, False), ranks(3, rank_run, True)
    if not any(calls for _, calls in calm):
        raise NotPosed("its ranks exchange nothing")
    assert len({bits for found, _ in calm + slow for bits in found}) == 1, "the weights depend on timing or buckets"


@check("18a", "ranks that disagree on order or shapes: the right result or an error on every rank")
def disagreement(S):
    shapes = [(8, 12)] * 2 + [(12, 8)] * 2

    def rank_run(rank):
        WIRE.reset()
        params, grads, turn = weights(shapes), gradients(shapes)[0], [3, 2, 1, 0] if rank else [0, 1, 2, 3]
        try:
            optimizer = S([params[i] for i in turn])
            advance(optimizer, [params[i] for i in turn], [[grads[i] for i in turn]])
            return [p.detach() for p in params], WIRE.calls
        except Exception as error:
            return first_line(error), WIRE.calls
    answers = ranks(2, rank_run)
    raised = [isinstance(found, str) for found, _ in answers]
    if not any(calls for _, calls in answers) and not any(raised):
        raise NotPosed("its ranks exchange nothing")
    assert len(set(raised)) == 1, "one rank raises, the other does not"
    for found, _ in answers if not raised[0] else ():
        for actual, expected, start in zip(found, run(S, shapes, gradients(shapes)), weights(shapes)):
            close(actual - start.detach(), expected - start.detach(), HALF, "wrong weights, and nobody says so")


@check("18b", "a closure that raises leaves no trace")
def failed_closure(S):
    params = weights(SHAPES)
    optimizer = S(params)
    if "closure" not in inspect.signature(optimizer.step).parameters:
        raise NotPosed("its step takes no closure")
    advance(optimizer, params, gradients(SHAPES))

    def closure():
        raise FloatingPointError
    try:
        optimizer.step(closure)
    except FloatingPointError:
        pass
    advance(optimizer, params, gradients(SHAPES, seed=1))
    straight = run(S, SHAPES, gradients(SHAPES) + gradients(SHAPES, seed=1))
    for p, e in zip(params, straight):
        close(p.detach(), e, 0.01, "weights")


@check("19", "scheduler and tensor lr: the same result, nothing compiled anew")
def schedules(S):
    torch.compiler.set_stance("default")
    compiled = dict(compile=True) if S.offers("compile") else {}
    steps = gradients(SHAPES, 10)

    def train(lr, schedule):
        params = weights(SHAPES)
        optimizer = S(params, lr=lr, **compiled)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)) if schedule else None
        for t, grads in enumerate(steps):
            if t == 3:
                torch._dynamo.utils.counters.clear()
            if not schedule:
                for group in optimizer.param_groups:
                    group["lr"] = 0.02 / (1 + t)
            advance(optimizer, params, [grads])
            if schedule:
                scheduler.step()
        return [p.detach() for p in params], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, _ = train(0.02, False)
    for lr in (0.02, torch.tensor(0.02)):
        found, graphs = train(lr, True)
        [close(f, e, 0.02, f"lr {lr!r}") for f, e in zip(found, expected)]
        assert graphs == 0, f"lr {lr!r}: {graphs} graphs compiled after the third step"


@check("20", "a small network learns, and the same seed gives the same bits")
def learns(S):
    def train():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False), torch.nn.Tanh(), torch.nn.Linear(32, 8, bias=False))
        x = torch.randn(64, 16)
        y = torch.tanh(x @ torch.randn(16, 8))
        optimizer, losses = S(net.parameters(), lr=0.02), []
        for _ in range(60):
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, digest([p.detach() for p in net.parameters()])
    (losses, bits), again = train(), train()
    assert losses[-1] < 0.3 * losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    assert bits == again[1], "two runs of one seed differ"


# ----------------------------------------------------------------------------------------------------------------------

def _judge(S: Subject, function) -> None:
    torch.compiler.set_stance("force_eager")
    random.seed(0)
    function(S)


def judge(S: Subject, key: str, seconds: float = 60) -> tuple[str, str]:
    """(pass, fail, refused or "-", why)."""
    try:
        isolated(seconds, _judge, S, CHECKS[key][1])
        return "pass", ""
    except NotPosed as why:
        return "-", str(why)
    except Refused as why:
        return "refused", str(why)
    except Failed as why:
        return "fail", str(why).removeprefix("AssertionError: ")
