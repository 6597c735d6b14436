"""attention.py: every attention backend against its formula, and how one is chosen."""
import functools
import inspect
import math

import pytest
import torch
import torch.nn.attention.varlen

from data.errors import UsageError
from engine import attention
from engine.attention import BACKENDS, choose_backend, pair, paired_docs, unpair
from tests.helpers.plain_model import attend, attend_in_pairs
from tests.helpers.tiny import docs_of

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
# float64 all through: sums in another order differ by some 1e-15
EXACT = dict(rtol=1e-12, atol=1e-12)
CASES = {  # document lengths, window
    "ragged, window shorter": ([1, 5, 1, 17, 13], 4),
    "ragged, window longer than documents": ([1, 5, 1, 17, 13], 30),
    "window longer than the sequence": ([9, 4], 50),
    "window of one": ([3, 8, 2], 1),
    "one document, a multiple of the window": ([24], 8),
    "one document, no multiple": ([29], 8),
    "documents of one token": ([1] * 7, 3),
    "a single token": ([1], 5),
    "documents end on blocks": ([8, 16, 8], 8),
}
PAIRED = "ragged, window shorter", "ragged, window longer than documents", "documents of one token"
HERE = {name: BACKENDS[name] for name in ("masked", "blocked", "flex", "varlen")}
HERE["blocked, without BlockProducts"] = attention.blocked_mask, attention.blocked_attention


@pytest.fixture(autouse=True)
def attention_of_gpus_on_a_cpu(monkeypatch):
    """FlexAttention refuses gradients on a CPU although its plain form has them; varlen has a stand-in."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *a: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in_varlen)


def stand_in_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """Documented meaning of torch.nn.attention.varlen.varlen_attn, by the formula."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous()
    assert int(cu_q[0]) == 0 and int(cu_q[-1]) == len(q) and torch.equal(cu_q, cu_k)
    lengths = cu_q.diff().tolist()
    assert min(lengths) >= 0 and max(lengths) <= min(max_q, max_k) and window_size[1] == 0
    return plain_attention(q, k, v, [n for n in lengths if n], window_size[0], scale)


VARLEN = torch.nn.attention.varlen.varlen_attn


def leaves(T, H=2, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = torch.randn(4, T, H, d, generator=generator, dtype=torch.float64).unbind()
    return [x.requires_grad_() for x in (q, k, v)], g


def plain_attention(q, k, v, lengths, window, scale, paired=False):
    """Every head by itself, or heads 2h and 2h + 1 as a pair. q, k, v: (T, H, d)."""
    document = docs_of(lengths).ids
    heads = [x.unbind(1) for x in (q, k, v)]
    if paired:
        partners = [(a, a + 1) for a in range(0, q.size(1), 2)]
        y = attend_in_pairs(*heads, partners, document, window, scale)
    else:
        y = [attend(*one, document, window, scale) for one in zip(*heads)]
    return torch.stack(y, 1)


def values_and_gradients(attention, qkv, g):
    y = attention(*qkv)
    return [y, *torch.autograd.grad((y * g).sum(), qkv)]


@functools.cache
def expected(case, paired):
    lengths, window = CASES[case]
    inputs = leaves(sum(lengths), 4 if paired else 2)
    return values_and_gradients(lambda *qkv: plain_attention(*qkv, lengths, window, 0.7, paired), *inputs)


@pytest.mark.parametrize("case, paired", [
    *((case, False) for case in CASES), *((case, True) for case in PAIRED)])
@pytest.mark.parametrize("name", HERE)
def test_a_backend_equals_its_formula_in_values_and_gradients(name, case, paired):
    lengths, window = CASES[case]
    make, attend = HERE[name]
    docs = docs_of(lengths, capacity=12)
    mask = make(paired_docs(docs) if paired else docs, window)

    def fast(q, k, v):
        if paired:
            by_pairs = (pair(x, "neighbours") for x in (q, k, v))
            return unpair(attend(*by_pairs, mask, 0.7), "neighbours")
        return attend(q, k, v, mask, 0.7)

    found = values_and_gradients(fast, *leaves(sum(lengths), 4 if paired else 2))
    names = "values", "gradient of q", "gradient of k", "gradient of v"
    for what, a, b in zip(names, found, expected(case, paired), strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m: f"{what}: {m}")


def test_varlen_takes_the_arguments_that_this_torch_has():
    inspect.signature(VARLEN).bind(0, 0, 0, 0, 0, 0, 0, scale=0.1, window_size=(4, 0))


# ------------------------------------------------------------------------------------------------------------
# The choice


def test_a_wish_is_granted_and_a_cpu_gets_blocked():
    assert choose_backend("masked", 8, 0.1, CPU, torch.float32) == ("masked", "asked for")
    assert choose_backend("auto", 8, 0.1, CPU, torch.float32)[0] == "blocked"


@pytest.mark.parametrize("wish", ["varlen", "flex"])
def test_a_wish_that_a_cpu_cannot_grant_is_refused(wish):
    with pytest.raises(UsageError, match=f"expected .*blocked or masked.* on a CPU, found '?{wish}"):
        choose_backend(wish, 8, 0.1, CPU, torch.float32)


def choose(monkeypatch, **candidates):
    """The choice among candidates, as on a GPU: name -> attention function."""
    for name, candidate in candidates.items():
        monkeypatch.setitem(BACKENDS, name, (BACKENDS["masked"][0], candidate))
    return attention.first_correct(["varlen", "flex"], 8, 0.3, CPU, torch.float32)


def good(q, k, v, mask, scale):
    return attention.masked_attention(q, k, v, mask, scale)


def raising(*args):
    raise ImportError("no kernel image\nfor this device")


def unscaled(q, k, v, mask, scale):
    return good(q, k, v, mask, 1.0)


class PoisonedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.nan


def test_the_first_candidate_that_works_is_taken_and_reasons_are_given_for_the_others(monkeypatch):
    name, reason = choose(monkeypatch, varlen=good, flex=raising)
    assert name == "varlen" and "self-test error 0" in reason
    name, reason = choose(monkeypatch, varlen=raising, flex=good)
    assert name == "flex" and "varlen: ImportError: no kernel image" in reason and "\n" not in reason
    name, reason = choose(monkeypatch, varlen=raising, flex=raising)
    assert name == "blocked" and "varlen: ImportError" in reason and "flex: ImportError" in reason


WRONG = {
    "scale": unscaled,
    "NaN": lambda q, k, v, mask, scale: good(q, k, v, mask, scale) * math.nan,
    "window one too short": lambda q, k, v, mask, scale: good(q, k, v, mask.triu(-63), scale),
    "documents and window": lambda q, k, v, mask, scale: good(q, k, v, torch.ones_like(mask).tril(), scale),
    "no gradient of k": lambda q, k, v, mask, scale: good(q, k.detach() + 0 * k, v, mask, scale),
    "NaN gradient": lambda q, k, v, mask, scale: good(q, k, PoisonedGradient.apply(v), mask, scale),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_candidate_with_wrong_numbers_is_refused(mistake, monkeypatch):
    name, reason = choose(monkeypatch, varlen=WRONG[mistake], flex=good)
    assert name == "flex" and "varlen: self-test error" in reason
