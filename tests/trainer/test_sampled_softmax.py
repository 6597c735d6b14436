"""The loss over a sample of the vocabulary against its definition, the definition against its formula, and
runs that train with it."""
import math

import pytest
import torch

from engine.head_loss import head_loss, multi_token_loss, sampled_loss, softcap
from engine.kernels import Kernels
from engine.lookup import Lookup
from engine.sampled_softmax import Sample, draw_sample, sampled_loss_and_gradient
from muon import ONEDNN
from tests.helpers.bits import same_bits
from tests.helpers.dist import run_ranks
from tests.helpers.runs import on_rank, run
from tests.helpers.tiny import BARE, THREE_LAYERS, build, config, context, docs_of, make_run
from tests.trainer.test_head import assert_near, compiled

CPU = torch.device("cpu")
CAP = 23.0, 5.0, 7.5
T, V, D = 37, 300, 12
SAMPLE = draw_sample(V, 128, (5,), CPU)
WHOLE = Sample(torch.arange(V).roll(7), torch.zeros(V))
PREFIXES = torch.randint(-60, V, (T,), generator=torch.Generator().manual_seed(3)).clamp(min=-1)
PARTS = [((1.0,), None), ((1.0, 0.5, 0.25), None), ((0.7, 0.0), None), ((1.0, 0.5, 0.25), PREFIXES)]


def example(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(T, D, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return x, head, torch.randint(0, V, (T,), generator=generator)


# ------------------------------------------------------------------------------------------------------------
# The sample and the definition


def test_a_sample_is_half_fixed_half_drawn_and_stands_for_every_row_once():
    draws = [draw_sample(V, 128, (0, step), CPU) for step in range(200)]
    for ids, log_weights in draws:
        assert ids[:64].tolist() == list(range(64)) and len(set(ids.tolist())) == 128 and ids.max() < V
        assert log_weights[:64].eq(0).all() and log_weights.exp().sum().item() == pytest.approx(V)
    assert set(torch.cat([ids for ids, _ in draws]).tolist()) == set(range(V))
    assert torch.equal(draws[3].ids, draw_sample(V, 128, (0, 3), CPU).ids)
    assert len({tuple(ids.tolist()) for ids, _ in draws}) == 200


def test_the_sampled_loss_equals_its_formula():
    logits = 3 * torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = example()[2]
    drawn = dict(zip(SAMPLE.ids.tolist(), SAMPLE.log_weights.exp().tolist()))
    expected = 0.0
    for k, weight in enumerate((1.0, 0.5)):
        for t in range(T - k):
            y, row = targets[t + k].item(), logits[t].tolist()
            total = sum(w * math.exp(row[j]) for j, w in drawn.items() if j != y)
            expected -= weight * math.log(math.exp(row[y]) / (total + math.exp(row[y])))
    found = sampled_loss(logits, targets, torch.tensor([1.0, 0.5]), SAMPLE)
    assert found.item() == pytest.approx(expected, rel=1e-6)  # weights are fp32
    hits = [drawn.get(y, 0) for y in targets.tolist()]
    assert 0 in hits and 1 in hits and max(hits) > 1  # not drawn, fixed, drawn


@pytest.mark.parametrize("weights, prefixes", PARTS)
def test_over_the_whole_vocabulary_the_sampled_loss_is_the_loss(weights, prefixes):
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(1))
    args = logits, example()[2], torch.tensor(weights)
    torch.testing.assert_close(sampled_loss(*args, WHOLE, prefixes), multi_token_loss(*args, prefixes))


def test_the_mean_of_the_sum_over_samples_is_the_sum():
    """exp(loss) exp(z_y) is the sum. Each target's mean is within four standard errors."""
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = logits.exp().sum().item()
    for target in (3, 64, 299):  # fixed, and two that may be drawn
        y = torch.tensor([target])
        sums = []
        for step in range(2000):
            loss = sampled_loss(logits, y, torch.ones(1), draw_sample(V, 128, (target, step), CPU))
            sums.append((loss + logits[0, target]).exp())
        sums = torch.stack(sums)
        error = sums.std().item() / math.sqrt(len(sums))
        assert 0 < error < 0.01 * exact and abs(sums.mean().item() - exact) < 4 * error


# ------------------------------------------------------------------------------------------------------------
# Head and loss in one


def both(x, head, targets, weights, cap, prefixes=None, sample=SAMPLE, apply=head_loss, **options):
    """(loss, its gradients of x and head) in one pass and by the definition in float64, of which twice the
    loss is used."""
    weights = torch.tensor(weights)
    ours = apply(x, head, targets, weights, cap, prefixes=prefixes, sample=sample, **options)
    logits = softcap(x.double() @ head.double().t(), cap)
    exact = sampled_loss(logits, targets, weights, sample, prefixes)
    return [(loss, *torch.autograd.grad(2 * loss, (x, head))) for loss in (ours, exact)]


@pytest.mark.parametrize("cap", [(), CAP])
@pytest.mark.parametrize("weights, prefixes", PARTS)
def test_the_sampled_loss_in_one_pass_equals_its_definition_eager_and_compiled(
        cap, weights, prefixes):
    for sample in (SAMPLE, WHOLE):
        assert_near(*both(*example(), weights, cap, prefixes, sample), 1e-5)  # fp32
    if ONEDNN is not None:
        assert_near(*both(*example(), weights, cap, prefixes, onednn=True), 1e-5)
    assert_near(*both(*example(), weights, cap, prefixes, size=5), 1e-5)  # 10 tokens at a time
    apply = compiled(head_loss)
    assert_near(*both(*example(), weights, cap, prefixes, size=5, apply=apply, lookup=Lookup.apply), 1e-5)


def test_slices_are_apart():
    x, head, targets = example()
    x, targets = x[:36], targets[:36]
    weights = torch.tensor([1.0, 0.5])
    joined = head_loss(x, head, targets, weights, CAP, slices=2, sample=SAMPLE)
    halves = [head_loss(x[part], head, targets[part], weights, CAP, sample=SAMPLE)
              for part in (slice(18), slice(18, 36))]
    torch.testing.assert_close(joined, sum(halves))


def test_large_logits_and_targets_that_are_certain_keep_their_digits():
    """A drawn target of weight 2.7 e^z is not taken off a sum that it rules: what is left would be noise."""
    target = SAMPLE.ids[-1].item()
    logits = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([[15.0], [30.0], [60.0], [1000.0]])
    logits[:, -1] = own[:, 0]
    ahead = torch.full((4, 1), target)
    args = SAMPLE, ahead, torch.ones(4, 1), ()
    _, g, g_own = sampled_loss_and_gradient(logits, own, *args)
    exact = torch.logsumexp(logits[:3, :-1].double() + SAMPLE.log_weights[:-1], 1) - own[:3, 0].double()
    torch.testing.assert_close(-g_own[:3, 0].double(), torch.sigmoid(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(g.sum(1), -g_own[:, 0], rtol=1e-5, atol=0)
    assert g[:, -1].eq(0).all() and g.isfinite().all() and g_own[3] == 0


@pytest.mark.parametrize("scale", [1e-3, 3.0])
@pytest.mark.parametrize("cap", [(), CAP])
def test_fp8_gradients_are_near_the_exact_ones_and_within_their_bound(scale, cap):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(64, 32, generator=generator)).to(torch.bfloat16).requires_grad_()
    head = (0.3 * torch.randn(V, 32, generator=generator)).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, V, (64,), generator=generator)
    ours, exact = both(x, head, targets, (1.0, 0.5), cap, fp8=True)
    for a, b, bound in zip(ours, exact, (0.01, 0.1, 0.1)):  # as without a sample
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert 0 < error < bound, error
    bf16, _ = both(x, head, targets, (1.0, 0.5), cap)
    assert all(not torch.equal(a, b) for a, b in zip(ours[1:], bf16[1:]))  # it really went through FP8

    certain = 40 * torch.nn.functional.one_hot(torch.arange(64) + 64, 128).float()
    _, g, _ = sampled_loss_and_gradient(
        certain, torch.zeros(64, 2), SAMPLE, torch.zeros(64, 2, dtype=torch.int64), torch.ones(64, 2), cap)
    slope = cap[0] / cap[2] / 4 if cap else 1.0
    assert g.abs().max() <= 2 * slope and (cap or g.max() > 1.9)


@pytest.mark.parametrize("rows", [128, 384, 640])
def test_pieces_have_the_lengths_that_products_in_fp8_ask_for_on_a_gpu(rows, monkeypatch):
    """It multiplies along multiples of 16 only."""
    multiply, shapes = torch._scaled_mm, []

    def watched(a, b, *args, **kwargs):
        shapes.append((a.shape, b.shape))
        return multiply(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, 32, generator=generator).to(torch.bfloat16) for n in (208, 1024))
    sample = draw_sample(1024, rows, (0,), CPU)
    head_loss(x, head, torch.arange(208), torch.ones(1), CAP, 16, fp8=True, sample=sample)
    assert len(shapes) == 3 * math.ceil(208 / (16 * (1024 // rows)))  # products of each piece
    assert all(n % 16 == 0 for pair in shapes for shape in pair for n in shape)


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_nothing_as_large_as_the_sample_s_logits_is_kept_for_the_backward_pass(wrap):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, D, generator=generator).requires_grad_()
    head = torch.randn(V, D, generator=generator).requires_grad_()
    targets, kept = torch.randint(0, V, (256,), generator=generator), []
    apply = wrap(head_loss)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        apply(x, head, targets, torch.ones(1), CAP, sample=SAMPLE)
    streams = 3 * x.numel() + 128 * D  # x, its gradient, rows of the targets, gradient of the sample's rows
    assert sum(kept) <= streams + 4 * 256 + 256 * 128 // 10


# ------------------------------------------------------------------------------------------------------------
# Models and runs


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_over_the_whole_vocabulary_has_the_gradients_of_one_without_a_sample(tied):
    cfg = config(BARE)
    model = build(cfg)
    tokens = torch.randint(0, 257, (33,), generator=torch.Generator().manual_seed(0))
    whole = Sample(torch.arange(cfg.padded_vocab), torch.zeros(cfg.padded_vocab))
    results = []
    for sample in (None, whole):
        ctx = context(model, docs_of([20, 12]), tied=tied)._replace(sample=sample)
        model.zero_grad()
        loss = model(tokens[:-1], tokens[1:], ctx, torch.tensor([1.0, 0.5]))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), *gradients))
    assert_near(*results, 1e-4)  # fp32, through the layers


RUN = "--head_rows=128,128,128,0", "--pack_tokens=0", "--adam_every=2", "--save_every=2", "--save_final=1"


@pytest.fixture(scope="module")
def alone(folder):
    result = run(folder, *RUN)
    assert (result.code, result.err) == (0, "")
    return result


def test_a_run_learns_validates_over_all_tokens_and_says_what_its_training_loss_is(folder, alone):
    plain = run(folder, *RUN, "--head_rows=0")
    assert alone.val[0] == plain.val[0] and alone.train[1] != plain.train[1]
    assert alone.val[12] < alone.val[0] - 0.5
    assert "\ntraining loss: summed over 128, 128, 128, all of 257 tokens by stage" in alone.log
    assert "\ntraining loss: summed" not in plain.log


def test_every_world_size_draws_the_same_samples(folder, alone):
    for result in run_ranks(2, on_rank, folder, [*RUN]):
        assert (result.code, result.err) == (0, "")
        assert result.train == pytest.approx(alone.train, abs=2e-5)  # as in test_train.py
        assert result.val == pytest.approx(alone.val, abs=2e-5)


def test_a_resumed_run_draws_the_same_samples(folder, alone):
    resumed = run(folder, f"--resume={alone.checkpoints[1]}")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.train == {step: loss for step, loss in alone.train.items() if step > 4}
    last = [torch.load(result.checkpoints[-1], weights_only=True) for result in (alone, resumed)]
    assert same_bits(*(state["model"] for state in last))


def test_other_seeds_other_slices_and_other_steps_draw_other_samples(folder):
    one, other = (make_run(folder, THREE_LAYERS, head_rows=(128,), seed=seed) for seed in (0, 1))
    draws = [one.draw(0, 0), one.draw(0, 1), one.draw(1, 0), other.draw(0, 0)]
    assert len({tuple(ids.tolist()) for ids, _ in draws}) == 4
    ids = torch.cat([one.draw(step, 0).ids for step in range(40)])
    assert ids.max() == 383  # padding is drawn as well


def test_rows_are_those_of_the_stage_in_draws_and_flops(folder):
    run = make_run(folder, THREE_LAYERS, head_rows=(128, 0, 256))
    starts = run.cfg.stage_starts
    last = *(start - 1 for start in starts[1:]), run.cfg.train_steps - 1
    for steps in (starts, last):
        samples = [run.draw(step, 0) for step in steps]
        assert [sample and len(sample.ids) for sample in samples] == [128, None, 256, 256]
    whole = make_run(folder, THREE_LAYERS)
    saved = [whole.model.flops_per_token(stage) - run.model.flops_per_token(stage) for stage in range(4)]
    assert saved == [6 * rows * 32 for rows in (384 - 128, 0, 384 - 256, 384 - 256)]


def test_rows_of_the_head_are_looked_up_as_those_of_other_tables(monkeypatch):
    """On a GPU torch.compile's own gradient of them would take an fp32 buffer as large as the table."""
    model = build(config(BARE))
    lookups = []

    def watched(self, index, table):
        lookups.append(table)
        return torch.nn.functional.embedding(index, table)

    monkeypatch.setattr(Kernels, "lookup", watched)
    ctx = context(model, docs_of([20, 12]))._replace(sample=draw_sample(384, 128, (0,), CPU))
    tokens = torch.arange(33)
    model(tokens[:-1], tokens[1:], ctx, torch.ones(1))
    assert lookups[-1] is model.head
