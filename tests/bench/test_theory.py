"""bench.theory: Muon keeps the bound where its assumptions hold, and reaches it where it is tight."""
import json
import statistics

import pytest
import torch

from bench import theory
from bench.theory import BATCHES, EXACT, NEVER, Case, Quadratic, bound, descend
from data.files import ROOT

RESULTS = ROOT / "bench/results/2026-11-28_theory/theory.json"
SLACK = 1e-4  # relative, of fp32 and of the iteration's end

pytestmark = pytest.mark.usefixtures("one_thread")


def ratio(case: Case, seed: int = 0) -> float:
    problem = Quadratic(seed)
    norms, _ = descend(problem, case)
    return statistics.mean(norms) / bound(problem, case)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_bound_is_reached_where_it_is_tight(seed):
    assert 0.997 < ratio(Case(steps=300, lr=0.1, beta=0.0), seed) <= 1 + SLACK


@pytest.mark.parametrize("case", [
    Case(steps=200, beta=0.8), Case(steps=200, batch=4), Case(steps=200, beta=0.0, batch=1),
    Case(steps=50, lr=0.1, batch=16)])
def test_exact_orthogonalization_keeps_the_bound(case):
    assert ratio(case) <= 1 + SLACK


def test_the_constants_are_those_of_the_problem():
    problem = Quadratic(3)
    assert problem.L == pytest.approx(torch.linalg.eigvalsh(problem.H).sum().item())
    X = problem.normal(16, 24).double()
    assert theory.nuclear(problem.H @ X) <= problem.L * theory.spectral(X)
    W = torch.zeros(16, 24, dtype=torch.float64, requires_grad=True)
    value = ((W - problem.minimum) * (problem.H @ (W - problem.minimum))).sum() / 2
    value.backward()
    assert problem.value(W.detach()) == pytest.approx(value.item())
    assert torch.allclose(problem.gradient(W.detach()), W.grad)


def test_decay_keeps_the_weights_in_their_ball():
    for iteration, limit in ((EXACT, 1 + SLACK), ("polar", 1.15)):
        problem = Quadratic(0)
        problem.minimum *= 200
        _, largest = descend(problem, Case(steps=300, lr=0.05, beta=0.0, iteration=iteration), decay=0.5)
        assert 0.99 < largest * 0.5 <= limit


def test_the_committed_results_keep_the_claims_of_the_page():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    problem = Quadratic(found["seed"])
    for row in found["rows"]:
        case = Case(**{name: row[name] for name in Case._fields})
        assert row["bound"] == pytest.approx(bound(problem, case._replace(batch=case.batch or NEVER)))
        part = row["measured"] / row["bound"]
        tight = row["beta"] == 0 and not row["batch"]
        if row["iteration"] == EXACT:
            assert (0.999 if tight else 0) < part <= 1 + SLACK
        if row["iteration"] == "polar":
            assert part <= 1.02
    assert found["ball"][EXACT] <= 1 + SLACK and found["ball"]["polar"] <= 1.15
    assert [row["batch"] for row in theory.by_batch(found)] == [*BATCHES]
    assert -0.3 < theory.slope(*theory.columns(theory.by_batch(found), "batch")) < -0.2
