"""What a Muon is asked: one table, put to everybody by `python -m bench.muon` and to muon.py by the tests.

A question is a function that returns when the optimizer passes and raises when it does not. NotPosed: it has
no such setting, or nothing that could go wrong. Refused: it turned the parameters away when it was built,
which is an honest answer. All else fails, a crash and a hang too. Every subject is judged by this code, on a
CPU, with torch.compile off except where it is what is asked about.
"""
import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.muon.peers import Subject, load_subject
from bench.muon.processes import ChildFailed, NotPosed, Refused, Traffic, first_line, isolated, ranks
from muon import COEFFICIENTS

QUESTIONS = {}  # number -> (title, function)
GPT2_BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # c_attn, attn_proj, fc, mlp_proj; 12 times
CASES = (
    [(12, 8)] * 5,
    [(24, 8), (8, 24), (12, 12), (20, 6), (6, 20), (9, 5), (5, 9)],
    [(10, 6)],
    [(8, 8), (6, 10)],
)
SHAPES = [(24, 8), (8, 24), (16, 16)]
EQUAL = [(12, 8)] * 6  # for questions that have nothing to do with mixed shapes
HALF = 0.1             # relative error in the Frobenius norm of 16-bit iterations: 0.02 to 0.08 are common
SINGLE = 1e-4          # and of those in fp32
ADJUST_LR = {
    "original": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
    "identity": lambda m, n: 1.0,
}


def question(number: str, title: str):
    def add(function):
        QUESTIONS[number] = (title, function)
        return function
    return add


def judge(S: Subject, number: str, limit_s: float = 60) -> tuple[str, str]:
    """Return (pass, fail, refused or "-", why)."""
    def answer():
        torch.compiler.set_stance("force_eager")
        QUESTIONS[number][1](S)
    try:
        isolated(limit_s, answer)
    except NotPosed as why:
        return "-", str(why)
    except Refused as why:
        return "refused", str(why)
    except ChildFailed as why:
        return "fail", str(why).removeprefix("AssertionError: ")
    return "pass", ""


# ----------------------------------------------------------------------------------------------------
# Gradients, steps, and what they should give


def gradients(shapes, steps: int = 1, seed: int = 0, dtype=torch.float32) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(steps)]


def weights(shapes, dtype=torch.float32) -> list[Parameter]:
    torch.manual_seed(7)
    return [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def advance(optimizer, params, steps) -> None:
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = g if g is None else g.clone()
        optimizer.step()


def trained(S: Subject, shapes, steps, **settings) -> list[Tensor]:
    """Return the weights after the steps."""
    params = weights(shapes)
    advance(S(params, **settings), params, steps)
    return [p.detach() for p in params]


def update(S: Subject, *grads: Tensor, **settings) -> list[Tensor]:
    """Return what one step at lr = 1 subtracts from weights of zero."""
    params = [Parameter(torch.zeros_like(g)) for g in grads]
    advance(S(params, lr=1.0, **settings), params, [grads])
    return [-p.detach() for p in params]


def close(actual: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    assert actual.isfinite().all(), f"{what}: not finite"
    expected = expected.detach().double()
    distance = (actual.detach().double() - expected).norm()
    error = (distance / expected.norm().clamp(min=1e-300)).item()
    assert error <= allowed, f"{what}: relative error {error:.2g}, allowed {allowed:g}"


def moved_alike(found, expected, start, what: str) -> None:
    for x, y, before in zip(found, expected, start):
        close(x - before, y - before, HALF, f"{what}, {tuple(before.shape)}")


def digest(tensors) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def bitwise(S: Subject) -> dict:
    return dict(deterministic=True) if S.offers("deterministic") else {}


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, V^T, the m x n matrix with these singular values), in fp64."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
    return U, V.mT, U @ values.double().diag() @ V.mT


def mapped(values: Tensor, coefficients: str, steps: int = 5) -> Tensor:
    """Return what exact iterations make of these singular values, in fp64."""
    safety, triples = COEFFICIENTS[coefficients]
    x = values.double() / (values.double().norm() * safety)
    for i in range(steps):
        a, b, c = triples[min(i, len(triples) - 1)]
        x = a * x + b * x**3 + c * x**5
    return x


def exact_update(S: Subject, U: Tensor, V: Tensor, values: Tensor) -> Tensor:
    scale = ADJUST_LR[S.adjust_lr_fn](U.size(0), V.size(1))
    return scale * U @ mapped(values, S.coefficients).diag() @ V


def allowed_error(settings: dict) -> float:
    return SINGLE if settings.get("ns_dtype") == torch.float32 else HALF


def precisions(S: Subject) -> list[dict]:
    """Return the settings of the default, which may iterate in 16 bits, and of fp32 where it can be set."""
    return [{}, dict(ns_dtype=torch.float32)] if S.offers("ns_dtype") else [{}]


def whole_state(optimizer) -> dict:
    """Return state_dict(), after the call that an implementation documents for several ranks."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def momenta(optimizer, number: int, p: Tensor) -> list[Tensor]:
    """Return what state_dict() holds for a parameter in its size."""
    state = whole_state(optimizer)["state"].get(number, {})
    tensors = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
    return [x.detach().clone().view(p.shape) for x in tensors if x.numel() == p.numel()]


# ----------------------------------------------------------------------------------------------------
# 1-3: ranks, counts, balance


@question("1", "the same bits on every one of 1 to 5 ranks")
def same_bits(S):
    def bits(_):
        return [digest(trained(S, shapes, gradients(shapes, 3), **bitwise(S))) for shapes in CASES]
    found = []
    for W in range(1, 6):
        found += ranks(W, bits)
    for shapes, *several in zip(CASES, *found):
        assert len(set(several)) == 1, f"ranks or worlds differ for shapes {shapes}"


@question("2", "any number of matrices, also fewer than ranks")
def any_number(S):
    for shapes in CASES:
        alone = trained(S, shapes, gradients(shapes, 3))
        for W in (2, 3, 4):
            for answer in ranks(W, lambda _: trained(S, shapes, gradients(shapes, 3))):
                for x, y in zip(answer, alone):
                    close(x, y, HALF, f"{W} ranks")


@question("3", "8 ranks share the products of GPT-2's matrices, each computed once, balance at least 0.97")
def balance(S):
    shapes = [(m // 48, n // 48) for m, n in GPT2_BLOCK * 12]

    def flops(_):
        params = weights(shapes)
        optimizer = S(params)
        with Traffic() as wire:
            with FlopCounterMode(display=False) as counter:
                advance(optimizer, params, gradients(shapes))
        return counter.get_total_flops(), wire.calls
    alone = ranks(1, flops)[0][0]
    shares, calls = zip(*ranks(8, flops))
    if not any(calls):
        raise NotPosed("its ranks exchange nothing")
    assert sum(shares) == alone, f"8 ranks compute {sum(shares) / alone:.2f} times what one does"
    assert max(shares) <= alone / 8 / 0.97, f"balance {alone / 8 / max(shares):.3f}"


# ----------------------------------------------------------------------------------------------------
# 4: DTensor parameters


def sharded(shapes, placement, members, S):
    steps = gradients(shapes, 3)

    def train(rank):
        mesh = DeviceMesh("cpu", list(members))
        if rank not in members:
            return []

        def shards(tensors):
            return [distribute_tensor(x.detach(), mesh, [placement]) for x in tensors]
        params = [Parameter(p) for p in shards(weights(shapes))]
        optimizer = S(params, **(dict(mesh=mesh) if S.offers("mesh") else {}))
        advance(optimizer, params, map(shards, steps))
        return [p.detach().redistribute(mesh, [Replicate()]).to_local() for p in params]
    alone = trained(S, shapes, steps)
    for answer in ranks(max(members) + 1, train):
        moved_alike(answer, alone, weights(shapes), f"{len(members)} ranks")


for number, title, *case in (
        ("4a", "DTensor shards of rows, uneven and empty", [(18, 12), (3, 12), (50, 12)], Shard(0), range(4)),
        ("4b", "DTensor shards of columns", [(12, 18), (16, 8), (12, 50)], Shard(1), range(5)),
        ("4c", "DTensor shards of a bank's matrices", [(6, 8, 12), (3, 12, 8)], Shard(0), range(4)),
        ("4d", "DTensor mesh that leaves out rank 0", [(18, 12), (12, 18)], Shard(0), range(1, 3))):
    question(number, title)(functools.partial(sharded, *case))


# ----------------------------------------------------------------------------------------------------
# 5: checkpoints


@question("5a", "the state on rank 0 holds every momentum")
def complete_state(S):
    def held(_):
        params = weights(EQUAL)
        optimizer = S(params)
        advance(optimizer, params, gradients(EQUAL, 2))
        return [any(x.any().item() for x in momenta(optimizer, i, p)) for i, p in enumerate(params)]
    found = ranks(3, held)[0]
    assert all(found), f"rank 0 of 3 lacks or has zeros for {found.count(False)} of {len(EQUAL)} momenta"


@question("5b", "saved on 3 ranks, continued on 1, 2 and 4, bit for bit")
def reshard(S):
    def train(first, last, saved=None):
        params = weights(EQUAL)
        if saved:
            params = [Parameter(w.clone()) for w in saved[0]]
        optimizer = S(params, **bitwise(S))
        if saved:
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
        for t, grads in enumerate(gradients(EQUAL, 5)[first:last], first):
            torch.manual_seed(t)  # for those that round at random
            advance(optimizer, params, [grads])
        return [p.detach() for p in params], optimizer

    def save(_):
        params, optimizer = train(0, 2)
        state = whole_state(optimizer)
        for i, group in enumerate(state["param_groups"]):
            state["param_groups"][i] = {key: value for key, value in group.items() if not callable(value)}
        return params, state
    saved = ranks(3, save)[0]
    straight = ranks(1, lambda _: digest(train(0, 5)[0]))[0]
    for W in (1, 2, 4):
        for answer in ranks(W, lambda _: digest(train(2, 5, saved)[0])):
            assert answer == straight, f"on {W} ranks it ends elsewhere than without interruption"


@question("5c", "bf16 parameters: fp32 momentum survives save and load")
def fp32_momentum(S):
    params = weights(SHAPES, torch.bfloat16)
    optimizer = S(params)
    advance(optimizer, params, gradients(SHAPES, 3, dtype=torch.bfloat16))
    before = momenta(optimizer, 0, params[0])[0]
    assert before.dtype == torch.float32, f"momentum is {before.dtype}"
    other = S(weights(SHAPES, torch.bfloat16))
    other.load_state_dict(copy.deepcopy(whole_state(optimizer)))
    assert torch.equal(momenta(other, 0, params[0])[0], before), "the loaded momentum is another"


@question("5d", "takes a checkpoint of torch.optim.Muon")
def from_torch(S):
    theirs = weights(SHAPES)
    optimizer = load_subject("torch.optim.Muon")(theirs)
    advance(optimizer, theirs, gradients(SHAPES, 3))
    params = [Parameter(p.detach().clone()) for p in theirs]
    mine = S(params)
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    start = [p.detach().clone() for p in params]
    advance(optimizer, theirs, gradients(SHAPES, seed=3))
    advance(mine, params, gradients(SHAPES, seed=3))
    for p, q, before in zip(theirs, params, start):
        close(q - before, p - before, 2 * HALF, "the step after loading")


# ----------------------------------------------------------------------------------------------------
# 6-9: gradients


@question("6a", "p.grad is not written")
def grad_is_read_only(S):
    for dtype in (torch.float32, torch.bfloat16):
        params = weights(SHAPES, dtype)
        optimizer = S(params)
        for grads in gradients(SHAPES, 2, dtype=dtype):
            advance(optimizer, params, [grads])
            if all(p.grad is None for p in params):
                raise NotPosed("it takes p.grad away")
            for p, g in zip(params, grads):
                assert torch.equal(p.grad, g), f"{dtype}: p.grad changed"


@question("6b", "momentum is the average of gradients, fp32 and bf16, with and without Nesterov")
def momentum_closed_form(S):
    for dtype in (torch.float32, torch.bfloat16):
        for nesterov in (True, False) if S.offers("nesterov") else (True,):
            params = weights(SHAPES, dtype)
            steps = gradients(SHAPES, 3, dtype=dtype)
            optimizer = S(params, nesterov=nesterov)
            advance(optimizer, params, steps)
            for i, p in enumerate(params):
                expected = sum(0.95 ** (2 - t) * steps[t][i].double() for t in range(3))
                M = momenta(optimizer, i, p)[0].double()
                factor = (M * expected).sum() / M.square().sum()  # between plain and averaging momentum
                close(M * factor, expected, 0.02, f"momentum, {dtype}, nesterov={nesterov}")


@question("7", "the size of gradients does not matter, 1e-30 to 1e30")
def scale_invariance(S):
    G = gradients([(24, 16)])[0][0]
    for settings in precisions(S):
        expected = update(S, G, **settings)[0]
        for exponent in (-100, -33, 33, 100):
            found = update(S, G * 2.0**exponent, **settings)[0]
            close(found, expected, allowed_error(settings), f"gradient times 2^{exponent} {settings}")


@question("8a", "zero gradient: finite, nothing moves but decay")
def zero_gradient(S):
    zeros = [[torch.zeros(shape) for shape in SHAPES]]
    for p, w in zip(weights(SHAPES), trained(S, SHAPES, zeros, lr=0.1, weight_decay=0.5)):
        close(w, p * 0.95, 1e-6, "weights")


@question("8b", "missing gradient: that matrix stays, the others move")
def missing_gradient(S):
    params = weights(SHAPES)
    optimizer = S(params, weight_decay=0.1)
    advance(optimizer, params, gradients(SHAPES))
    before = [p.detach().clone() for p in params]
    advance(optimizer, params, [[None, *gradients(SHAPES, seed=1)[0][1:]]])
    stayed = [torch.equal(p, b) for p, b in zip(params, before)]
    assert stayed == [True, False, False], f"matrices that stayed: {stayed}"


def spoiled(spoil, S) -> None:
    """Ask whether ranks agree although one gradient is wrong on one rank, whoever owns that matrix."""
    def train(rank):
        found = []
        with Traffic() as wire:
            for number in (0, 1):
                steps = gradients(EQUAL, 2)
                if rank == 1:
                    steps[1][number] = spoil(steps[1][number])
                found.append(digest(trained(S, EQUAL, steps)))
        return "".join(found), wire.calls
    found, calls = zip(*ranks(2, train))
    if not any(calls):
        raise NotPosed("its ranks exchange nothing")
    assert len(set(found)) == 1, "ranks hold different weights afterwards"


@question("8c", "gradient missing on one rank: no hang, ranks agree")
def missing_on_one_rank(S):
    spoiled(lambda g: None, S)


@question("9a", "NaN or Inf in one matrix: it and its momentum stay, the others step")
def not_finite(S):
    for bad, settings in itertools.product((math.nan, math.inf), precisions(S)):
        steps = gradients(SHAPES, 2)
        steps[1][1][0, 0] = bad
        params = weights(SHAPES)
        optimizer = S(params, **settings)
        advance(optimizer, params, steps[:1])
        before = [p.detach().clone() for p in params]
        M = momenta(optimizer, 1, params[1])[0]
        advance(optimizer, params, steps[1:])
        assert torch.equal(params[1], before[1]), f"{bad}: the weights changed"
        assert torch.equal(momenta(optimizer, 1, params[1])[0], M), f"{bad}: the momentum changed"
        expected = trained(S, SHAPES, gradients(SHAPES, 2), **settings)
        allowed = allowed_error(settings)
        for i in (0, 2):
            close(params[i] - before[i], expected[i] - before[i], allowed, f"{bad}: another matrix")


@question("9b", "NaN on one rank only: ranks agree")
def nan_on_one_rank(S):
    spoiled(lambda g: g * math.nan, S)


# ----------------------------------------------------------------------------------------------------
# 10-16: the mathematics


@question("10", "singular values go where the polynomial says")
def exact_map(S):
    for settings in S.variants:
        allowed = allowed_error(settings)
        for m, n in ((24, 72), (64, 24), (32, 32)):
            least = -3 if allowed == SINGLE else -1  # smaller ones drown in bf16
            values = torch.logspace(0, least, min(m, n))
            U, V, G = with_spectrum(m, n, values)
            found = update(S, G.float(), **settings)[0]
            close(found, exact_update(S, U, V, values), allowed, f"{m} x {n} {settings}")


@question("11", "rank-deficient: the null space stays bounded")
def null_space(S):
    for settings in S.variants:
        U, V, G = with_spectrum(32, 48, torch.ones(8))
        O = update(S, G.float(), **settings)[0].double()
        noise = torch.linalg.matrix_norm(O - U @ (U.mT @ O @ V.mT) @ V, 2).item()
        # Rounding to fp32, 6e-8, times the slope at zero, which is 990 for "polar"; in 16 bits it must stay
        # below what a true direction gets.
        bound = 1e-4 if allowed_error(settings) == SINGLE else 1.0
        assert noise <= bound, f"{noise:.2g} outside of the row space {settings}"


@question("12", "a matrix does not feel its neighbours, flattened ones neither")
def isolation(S):
    cases = [((16, 8), {})]
    if S.offers("flatten"):
        cases += [((8, 3, 3), dict(flatten=True))]
    for shape, settings in cases:
        grads = gradients([shape] * 3)[0]
        for g, together in zip(grads, update(S, *grads, **settings)):
            close(together, update(S, g, **settings)[0], HALF, f"{shape}")


@question("13a", "convolutions: flattened, scaled by the flattened shape")
def convolution(S):
    settings = dict(flatten=True) if S.offers("flatten") else {}
    for shape in ((64, 3, 3, 3), (48, 1, 3, 3)):
        values = torch.linspace(1, 0.1, 9 * shape[1])
        U, V, G = with_spectrum(shape[0], 9 * shape[1], values)
        for order in (torch.contiguous_format, torch.channels_last):
            kernels = G.float().view(shape).contiguous(memory_format=order)
            found = update(S, kernels, **settings)[0].flatten(1)
            close(found, exact_update(S, U, V, values), HALF, f"{shape}")


@question("13b", "banks: every matrix by itself")
def bank(S):
    G = gradients([(4, 16, 8)])[0][0]
    together = update(S, G)[0]
    if (together.flatten(1) - update(S, G.flatten(1))[0]).norm() < HALF * together.norm():
        raise NotPosed("it takes a bank for one flattened matrix")
    for part, g in zip(together, G):
        close(part, update(S, g)[0], HALF, "a matrix of the bank")


@question("13c", "transposed parameters and gradients")
def layouts(S):
    shapes = SHAPES[:2]
    params = [Parameter(p.detach().mT.contiguous().mT) for p in weights(shapes)]
    advance(S(params), params, [[g.mT.contiguous().mT for g in gradients(shapes)[0]]])
    for p, expected in zip(params, trained(S, shapes, gradients(shapes))):
        close(p, expected, 0.01, "weights")


@question("14a", "match_rms_adamw: root mean square 0.2 for six shapes")
def update_rms(S):
    for shape in ((32, 32), (64, 16), (16, 64), (96, 32), (32, 96), (128, 16)):
        values = torch.linspace(1, 0.5, min(shape))
        G = with_spectrum(*shape, values)[2].float()
        rms = update(S, G, adjust_lr_fn="match_rms_adamw")[0].square().mean().sqrt()
        expected = 0.2 * mapped(values, S.coefficients).square().mean().sqrt()
        close(rms, expected, HALF, f"{shape}: root mean square")


@question("14b", "decay is 1 - lr weight_decay in every mode")
def decay(S):
    zeros = [[torch.zeros(shape) for shape in SHAPES]]
    posed = 0
    for name in ADJUST_LR:
        try:
            found = trained(S, SHAPES, zeros, lr=0.1, weight_decay=0.5, adjust_lr_fn=name)
        except NotPosed:
            continue
        posed += 1
        for p, w in zip(weights(SHAPES), found):
            close(w, p * 0.95, 1e-6, f"decay with adjust_lr_fn={name}")
    assert posed, "no mode could be set"


@question("15", "a split matrix is its blocks, unequal ones too")
def split(S):
    rows = [24, 8, 8]
    G = gradients([(40, 16)])[0][0]
    for part, g in zip(update(S, G, split=rows)[0].split(rows), G.split(rows)):
        close(part, update(S, g)[0], HALF, f"block of {len(g)} rows")


@question("16", "five steps as a reference in fp64")
def parity(S):
    lr = 0.1
    momentum = 0.95
    decay = 0.1
    shapes = SHAPES[:2]
    steps = gradients(shapes, 5)
    for settings in S.variants:
        for nesterov in (True, False) if S.offers("nesterov") else (True,):
            found = trained(S, shapes, steps, lr=lr, weight_decay=decay, nesterov=nesterov, **settings)
            for p, w, grads in zip(weights(shapes), found, zip(*steps)):
                start = p.detach().double()
                W = start
                M = torch.zeros_like(W)
                for G in grads:
                    M = momentum * M + (1 - momentum) * G
                    ahead = (1 - momentum) * G + momentum * M if nesterov else M
                    U, values, V = torch.linalg.svd(ahead, full_matrices=False)
                    W = (1 - lr * decay) * W - lr * exact_update(S, U, V, values)
                close(w - start, W - start, allowed_error(settings), f"nesterov={nesterov} {settings}")


# ----------------------------------------------------------------------------------------------------
# 17-20: running it


@question("17", "slow ranks and other buckets change no bit")
def overlap(S):
    def train(rank, longest_delay_s):
        found = []
        sizes = [dict(bucket_mb=mb) for mb in (16, 1e-9)] if S.offers("bucket_mb") else [{}]
        with Traffic(longest_delay_s, seed=rank) as wire:
            for size in sizes:
                found.append(digest(trained(S, EQUAL, gradients(EQUAL, 3), **bitwise(S), **size)))
        return found, wire.calls
    answers = ranks(3, train, 0.0) + ranks(3, train, 0.02)
    if not any(calls for _, calls in answers):
        raise NotPosed("its ranks exchange nothing")
    bits = {bits for found, _ in answers for bits in found}
    assert len(bits) == 1, "the weights depend on timing or buckets"


@question("18a", "ranks that disagree on order or shapes: the right result or an error on every rank")
def disagreement(S):
    shapes = [(8, 12)] * 2 + [(12, 8)] * 2

    def train(rank):
        params = weights(shapes)
        turned = slice(None, None, -1 if rank else 1)
        with Traffic() as wire:
            try:
                advance(S(params[turned]), params[turned], [gradients(shapes)[0][turned]])
            except Exception as error:
                return first_line(error), wire.calls
        return [p.detach() for p in params], wire.calls
    found, calls = zip(*ranks(2, train))
    raised = [isinstance(answer, str) for answer in found]
    if not any(calls) and not any(raised):
        raise NotPosed("its ranks exchange nothing")
    assert len(set(raised)) == 1, "one rank raises, the other does not"
    if not any(raised):
        expected = trained(S, shapes, gradients(shapes))
        for answer in found:
            moved_alike(answer, expected, weights(shapes), "wrong weights, and nobody says so")


@question("18b", "a closure that raises leaves no trace")
def failed_closure(S):
    params = weights(SHAPES)
    optimizer = S(params)
    if "closure" not in inspect.signature(optimizer.step).parameters:
        raise NotPosed("its step takes no closure")

    def closure():
        raise FloatingPointError
    advance(optimizer, params, gradients(SHAPES))
    with contextlib.suppress(FloatingPointError):
        optimizer.step(closure)
    advance(optimizer, params, gradients(SHAPES, seed=1))
    for p, expected in zip(params, trained(S, SHAPES, gradients(SHAPES) + gradients(SHAPES, seed=1))):
        close(p, expected, 0.01, "weights")


@question("19", "scheduler and tensor lr: the same result, nothing compiled anew")
def schedules(S):
    torch.compiler.set_stance("default")
    settings = dict(compile=True) if S.offers("compile") else {}

    def train(lr, scheduled):
        params = weights(SHAPES)
        optimizer = S(params, lr=lr, **settings)
        if scheduled:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for t, grads in enumerate(gradients(SHAPES, 10)):
            if t == 3:
                torch._dynamo.utils.counters.clear()
            if not scheduled:
                for group in optimizer.param_groups:
                    group["lr"] = lr / (1 + t)
            advance(optimizer, params, [grads])
            if scheduled:
                scheduler.step()
        return [p.detach() for p in params], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, _ = train(0.02, False)
    for lr in (0.02, torch.tensor(0.02)):
        found, graphs = train(lr, True)
        for x, y in zip(found, expected):
            close(x, y, 0.02, f"lr {lr!r}")
        assert graphs == 0, f"lr {lr!r}: {graphs} graphs compiled after the third step"


@question("20", "a small network learns, and the same seed gives the same bits")
def learns(S):
    def train():
        torch.manual_seed(0)
        inner = torch.nn.Linear(16, 32, bias=False)
        outer = torch.nn.Linear(32, 8, bias=False)
        x = torch.randn(64, 16)
        y = torch.tanh(x @ torch.randn(16, 8))
        optimizer = S([inner.weight, outer.weight])
        losses = []
        for _ in range(60):
            loss = (outer(torch.tanh(inner(x))) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, digest([inner.weight, outer.weight])
    losses, bits = train()
    assert losses[-1] < 0.3 * losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    assert bits == train()[1], "two runs of one seed differ"
