"""PyTorch's own inputs for its Muon, with which its test suite tries every optimizer, put to ours.

Where ours answers otherwise than torch.optim.Muon, DIFFERENT says how and why."""
import copy
import itertools
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from muon import Muon

pytest.importorskip("expecttest")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.Muon)
INPUTS = INFO.optim_inputs_func("cpu")
ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)
TORCH_DEFAULTS = dict(lr=1e-3, weight_decay=0.1, ns_coefficients=(3.4445, -4.7750, 2.0315), eps=1e-7)
DIFFERENT = {  # an error input -> (the error of ours, its sentence), each with the reason
    # Every refusal is a sentence of one form: expected ..., found ...; what to do.
    "Tensor lr must be 1-element": (ValueError, "lr of group 0: expected one number, 0 or more"),
    "only support `original` and `match_rms_adamw`": (ValueError, "adjust_lr_fn of group 0: expected one of"),
    "unsupported adjust_lr_fn": (ValueError, "adjust_lr_fn of group 0: expected one of"),  # torch 2.14
    # A bank of matrices or a 1-D convolution: ours takes both, and asks which it is.
    "only support 2D parameters": (ValueError, "expected flatten=False for a bank of matrices"),
    # torch notices at the first step; ours when it is built, before a training has begun.
    "does not support complex parameters": (ValueError, "expected real matrices of some size"),
}


@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)
@pytest.mark.parametrize("schedule", [None, *itertools.chain(*INFO.scheduler_inputs)])
def test_it_goes_where_torch_muon_goes(given, schedule):
    """Three matrices, ten steps; bf16, in which torch iterates, has three digits."""
    kinds = {}
    for kind, settings in ((Muon, TORCH_DEFAULTS | given.kwargs), (torch.optim.Muon, given.kwargs)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((10, 5), (5, 10), (8, 8))]
        start = [p.detach().clone() for p in params]
        optimizer = kind(params, **copy.deepcopy(settings))  # a scheduler writes into a tensor lr
        scheduler = schedule(optimizer) if schedule else None
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = sum((p.square()).sum() for p in params)
            loss.backward()
            return loss
        for _ in range(10):
            losses.append(optimizer.step(closure).item())
            if scheduler:
                scheduler.step(*losses[-1:] if isinstance(scheduler, ReduceLROnPlateau) else ())
        assert losses[-1] < losses[0]
        kinds[kind] = [p.detach() - before for p, before in zip(params, start)]
    for ours, theirs in zip(*kinds.values()):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("given", ERRORS, ids=lambda given: given.optimizer_error_input.desc)
def test_it_refuses_what_torch_muon_refuses(given):
    case = given.optimizer_error_input
    params = case.params or [torch.nn.Parameter(torch.randn(1, 1))]
    error, sentence = DIFFERENT.get(case.desc, (given.error_type, given.error_regex))
    with pytest.raises(error, match=sentence), warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon(params, **case.kwargs)
        if given.error_on == OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()
