"""muon.py over 2, 3 and 5 gloo processes against one process: the number of ranks must not show in the
result. The questions of bench.muon, which are tests too, ask for the same bits on 1 to 5.

Each world is started once and runs all scenarios; the tests below then look at what the ranks brought
back."""
import copy
import faulthandler
import fcntl
import functools
import hashlib
import math
import os
import time

import pytest
import torch
import torch.distributed as dist

import muon
from tests.helpers.dist import run_ranks
from tests.muon.test_muon import Muon, close, feed, make, same

CASES = {
    "five equal": [(12, 8)] * 5,
    "tall, wide and square": [(24, 8), (8, 24), (12, 12), (20, 6), (5, 9), (8, 3, 3, 3), (8, 24)],
    "one matrix": [(10, 6)],
    "fewer matrices than ranks": [(8, 8), (6, 10)],
    "a bank": [(7, 10, 6), (6, 10), (2, 6, 10)],
}
STEPS = 4
SETTINGS = dict(weight_decay=0.1, normuon_beta2=0.9, cautious=True)
# Of the checkpoints of a bank, in halves
RESUMED = dict(deterministic=True, split_mantissa=True, split=2, **SETTINGS)
pytestmark = pytest.mark.timeout(1800)  # the first test of a world waits for all of it
WORLDS = [2, 3, 5]
FEW = [2, 3]  # for all that has little to do with how many they are


def watched(rank: int, world_size: int, function, *args):
    """A rank that hangs says where, and ends: gloo itself would wait for half an hour. The iteration is fp32,
    see conftest."""
    muon.has_bf16_units = lambda: False
    faulthandler.dump_traceback_later(900, exit=True)
    return function(rank, world_size, *args)


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    """world(W): what each of W ranks brought back from the module's scenarios(rank, W, path), which run once
    in a test run, also where several pytest workers need them; a failure is kept too. 3 ranks come first:
    they write the checkpoint at the path, which the others load."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.getbasetemp()
    name = request.module.__name__.rpartition(".")[2]

    @functools.cache
    def load(W):
        if W != 3:
            load(3)
        with open(folder / f"{name}_{W}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = folder / f"{name}_{W}.pt"
            if not file.exists():
                try:
                    found = run_ranks(W, watched, request.module.scenarios, str(folder / name))
                except Exception as error:
                    found = f"{error}"
                torch.save(found, file)
            found = torch.load(file, weights_only=False)
        if isinstance(found, str):
            pytest.fail(found)
        return found
    return load


def rank_gradients(shapes, rank, dtype=torch.float32):
    return make(shapes, seed=100 + rank, steps=STEPS, dtype=dtype)[1]


def mean_gradients(shapes, world_size):
    ranks = [rank_gradients(shapes, rank) for rank in range(world_size)]
    return [[torch.stack(gs).mean(0) for gs in zip(*steps)] for steps in zip(*ranks)]


def train(shapes, gradients, after=None, dtype=torch.float32, **settings):
    """A run under schedules of lr and momentum. after: called with the optimizer after each step."""
    params, _ = make(shapes, steps=0, dtype=dtype)
    optimizer = Muon(params, **settings)
    for t, step in enumerate(gradients):
        optimizer.param_groups[0].update(lr=0.05 / (t + 1), momentum=0.9 + t / 100)
        feed(params, step)
        if t % 2:
            optimizer.start()
        optimizer.step()
        for p, g in zip(params, step):
            assert g is None or same(p.grad, g) or not g.isfinite().all()
        if after:
            after(optimizer)
    return [p.detach() for p in params], optimizer


def digest(tensors):
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def deterministic_run(shapes, bucket_mb, dtype=torch.float32, gram=False, **settings):
    """Equal gradients on all ranks; (weights' digest, number of buckets)."""
    gradients = make(shapes, steps=STEPS, dtype=dtype)[1]
    (gradients[2][0][1] if len(shapes[0]) == 3 else gradients[2][0]).zero_()  # as of an expert without tokens
    with pytest.MonkeyPatch.context() as patch:
        if gram:
            patch.setattr(muon, "gram_pays", lambda *args: True)
        params, optimizer = train(
            shapes, gradients, bucket_mb=bucket_mb, deterministic=True, dtype=dtype, **settings)
    return digest(params), len(optimizer.buckets)


LOW = dict(dtype=torch.bfloat16, split_mantissa=True)
BF16 = dict(ns_dtype=torch.bfloat16)
DETERMINISTIC = {
    "plain": dict(),
    "everything": SETTINGS,
    "no nesterov": dict(nesterov=False),
    "gram": dict(gram=True),
    "split": dict(split=2, **SETTINGS),
    "split masters, bf16 wire": LOW | BF16 | dict(split=2) | SETTINGS,
    "bf16 wire": BF16 | SETTINGS,
    "masters": LOW | SETTINGS,
    "masters, bf16 wire": LOW | BF16 | dict(normuon_beta2=0.9),
}


def all_deterministic_runs():
    found = {}
    for name, settings in DETERMINISTIC.items():
        case = "a bank" if "bf16" in name or "split" in name else "tall, wide and square"
        for case in CASES if name == "everything" else (case,):
            for mb in (16, 1e-9):
                found[case, name, mb] = deterministic_run(CASES[case], mb, **settings)
    return found


def spoiled_gradients(shapes, rank, kind):
    """Gradients in which rank 1 has something wrong with parameter 1 at step 2."""
    gradients = rank_gradients(shapes, rank)
    if rank == 1:
        gradients[2][1] = None if kind == "missing" else torch.full_like(gradients[2][1], math.nan)
    return gradients


def continue_from(state, shapes=CASES["a bank"], first=2, dtype=torch.bfloat16):
    """Load weights and optimizer of step `first` and run to the end."""
    params = [torch.nn.Parameter(w.clone()) for w in state["weights"]]
    optimizer = Muon(params, **RESUMED)
    optimizer.load_state_dict(state["optimizer"])
    gradients = make(shapes, steps=STEPS, dtype=dtype)[1]
    for t in range(first, STEPS):
        optimizer.param_groups[0].update(lr=0.05 / (t + 1), momentum=0.9 + t / 100)
        feed(params, gradients[t])
        optimizer.step()
    return digest([p.detach() for p in params])


class Recorder:
    """Stands in for a collective of muon.py or muon_extras/fsdp.py: counts the bytes that leave this rank,
    delays some calls, and counts, over all recorders, the calls and bytes between launch and wait."""
    flying = most = held = most_held = 0

    def __init__(self, module, name, delays=()):
        self.module, self.name, self.collective = module, name, getattr(module, name)
        self.delays, self.sent, self.calls = list(delays), 0, 0

    def __call__(self, output, input, *sizes, group=None, async_op=False):
        assert async_op and output.ndim == input.ndim == 1
        world_size = dist.get_world_size(group)
        if sizes:  # an all-to-all
            self.sent += input.nbytes - sizes[1][dist.get_rank(group)] * input.itemsize
        else:  # a ring: sent = received
            self.sent += max(output.nbytes, input.nbytes) * (world_size - 1) // world_size
        self.calls += 1
        if self.delays:
            time.sleep(self.delays[self.calls % len(self.delays)])
        self.handle = self.collective(output, input, *sizes, group=group, async_op=True)
        Recorder.count(1, output.nbytes + input.nbytes)
        return _Wait(self.handle, output.nbytes + input.nbytes)

    def __enter__(self):
        Recorder.flying = Recorder.most = Recorder.held = Recorder.most_held = 0
        setattr(self.module, self.name, self)
        return self

    def __exit__(self, *_):
        setattr(self.module, self.name, self.collective)

    @classmethod
    def count(cls, calls, nbytes):
        cls.flying, cls.held = cls.flying + calls, cls.held + nbytes
        cls.most, cls.most_held = max(cls.most, cls.flying), max(cls.most_held, cls.held)


class _Wait:
    def __init__(self, handle, nbytes):
        self.handle, self.nbytes = handle, nbytes

    def wait(self):
        self.handle.wait()
        Recorder.count(-1, -self.nbytes)


def recorded(rank, run, delay=0.0):
    """run() with counted and delayed collectives: (its result, bytes gathered, reduced, most in flight)."""
    delays = [delay * ((rank + k) % 3) for k in range(5)]
    with (
        Recorder(muon, "all_gather_flat", delays) as gather,
        Recorder(muon, "reduce_scatter_flat", delays) as scatter,
    ):
        return run(), gather.sent, scatter.sent, Recorder.most


def bounded(rank, world_size, sync):
    """One step of six buckets: exchanges in flight when start() returns, before each iteration, most bytes at
    once."""
    shapes = [(16, 32)] * (6 * world_size)
    params, _ = make(shapes, steps=0)
    optimizer = Muon(params, sync_grads=sync, bucket_mb=1e-9, deterministic=True)
    feed(params, make(shapes, steps=1)[1][0])
    orthogonalize, flying = muon.orthogonalize, []

    def spy(*args):
        flying.append(Recorder.flying)
        return orthogonalize(*args)

    def run():
        for _ in range(2):  # as train_gpt.py calls it
            optimizer.start()
            flying.append(Recorder.flying)
            optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalize", spy)
        _, _, _, most = recorded(rank, run, delay=0.002)
    return flying, most, Recorder.most_held, Recorder.flying


def refused(run):
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return str(error)


def scenarios(rank, world_size, checkpoint):
    found = {"rank": rank, "checkpoint": checkpoint}
    found["mean"] = {case: train(shapes, rank_gradients(shapes, rank), sync_grads=True, **SETTINGS)[0]
                     for case, shapes in CASES.items()}
    found["deterministic"] = all_deterministic_runs()

    # bytes on the wire, and slow ranks
    regular = [(16, 32)] * (2 * world_size) + [(24, 24)] * world_size
    wire = dict(ns_dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        gradients = rank_gradients(regular, rank, dtype)[:1]
        found["bytes", dtype] = recorded(rank, lambda: train(regular, gradients, sync_grads=True, dtype=dtype,
                                                             **wire)[0])
    found["bytes", "ddp"] = recorded(rank, lambda: train(regular, make(regular, steps=1)[1], **wire)[0])

    # checkpoints
    gradients = make(CASES["a bank"], steps=STEPS, dtype=torch.bfloat16)[1]
    weights, optimizer = train(CASES["a bank"], gradients[:2], dtype=torch.bfloat16, **RESUMED)
    found["unconsolidated"] = [refused(optimizer.state_dict), refused(lambda: copy.deepcopy(optimizer))]
    optimizer.consolidate_state_dict()
    found["state"] = optimizer.state_dict()["state"]
    if world_size == 3 and rank == 2:
        torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, checkpoint)
    dist.barrier()
    found["resumed"] = continue_from(torch.load(checkpoint, weights_only=True))
    return found | (scenarios_of_few(rank, world_size, optimizer) if world_size in FEW else {})


def scenarios_of_few(rank, world_size, optimizer):
    """optimizer: one whose state has been consolidated."""
    found = {}
    whole = optimizer.state_dict()["state"][0]["momentum_buffer"]
    optimizer.load_state_dict(optimizer.state_dict())
    found["loaded"] = same(optimizer.state_dict()["state"][0]["momentum_buffer"], whole)
    optimizer.step()
    found["momentum"] = sum(x.numel() for state in optimizer.state.values() for key, x in state.items()
                            if "momentum_buffer" in (key, key[0]))
    found["stale"] = refused(optimizer.state_dict)

    # something missing or broken on one rank
    shapes = CASES["tall, wide and square"]
    for kind in ("missing", "nan"):
        weights, optimizer = train(shapes, spoiled_gradients(shapes, rank, kind), sync_grads=True, **SETTINGS)
        optimizer.consolidate_state_dict()
        found[kind] = weights, optimizer.skipped, optimizer.state_dict()["state"]
    found["frozen"] = [frozen(), frozen(sync_grads=True)]
    found["channels last"] = [channels_last(rank, sync_grads=True), channels_last(),
                              channels_last(rank, sync_grads=True, replicate_state=True)]
    found["toggled"] = toggled()
    found["bounded"] = {sync: bounded(rank, world_size, sync) for sync in (True, False)}

    # ranks that disagree
    p, q = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(6, 4))
    found["order"] = refused(lambda: Muon([("a", p), ("b", q)] if rank != 1 else [("b", q), ("a", p)]))
    found["count"] = refused(lambda: Muon([("a", p), ("b", q)] if rank != 1 else [("a", p)]))
    found["setting"] = refused(lambda: Muon([p], ns_steps=5 if rank != 1 else 6))
    found["sync"] = refused(lambda: Muon([p], sync_grads=rank != 1))

    # a group added between steps, on a process group whose ranks do not start at 0
    def grow(group=None):
        params, steps = make(CASES["tall, wide and square"], steps=STEPS)
        optimizer = Muon(params[:4], deterministic=True, process_group=group, **SETTINGS)
        for t, step in enumerate(steps):
            if t == 2:
                optimizer.add_param_group(dict(params=params[4:]))
            feed(params, step)
            optimizer.step()
        return digest([p.detach() for p in params])
    found["grown"] = grow()
    tail = dist.new_group(list(range(1, world_size)))
    found["grown on a subgroup"] = grow(tail) if rank else refused(
        lambda: Muon([torch.zeros(4, 4)], process_group=tail))
    kinds = "nothing", "a step that fails", "a group that is refused"
    found["after errors"] = [after_errors(rank, kind) for kind in kinds]
    return found


def frozen(**settings):
    """A run with masters in which two parameters have no gradient on any rank: weights and units skipped."""
    shapes = CASES["a bank"]
    gradients = [[None, g, None] for _, g, _ in make(shapes, steps=STEPS, dtype=torch.bfloat16)[1]]
    weights, optimizer = train(shapes, gradients, dtype=torch.bfloat16, split_mantissa=True,
                               deterministic=True, **SETTINGS, **settings)
    return weights, optimizer.skipped


def channels_last(rank=1, **settings):
    """A run with masters of convolutions whose rows are no views in memory; rank 1 lacks a gradient once.
    Gradients are small whole numbers, whose sums bf16 holds."""
    params, steps = make([(12, 4, 3, 3), (6, 2, 3, 3), (4, 8, 3, 3)], steps=STEPS, dtype=torch.bfloat16)
    for p in params:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    optimizer = Muon(params, split_mantissa=True, deterministic=True, **SETTINGS, **settings)
    for t, step in enumerate(steps):
        gradients = [(64 * g).round() for g in step]
        if t == 2 and rank == 1:
            gradients[1] = None
        feed(params, gradients)
        optimizer.step()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in params)
    return digest([p.detach() for p in params]), optimizer.skipped


def toggled():
    """A run in which masters and variances are given up for a step: what is asked for anew begins at zero."""
    shapes = CASES["a bank"]
    params, gradients = make(shapes, steps=STEPS, dtype=torch.bfloat16)
    optimizer = Muon(params, deterministic=True)
    for t, step in enumerate(gradients):
        on = t != 2
        optimizer.param_groups[0].update(split_mantissa=on, normuon_beta2=0.9 if on else None)
        feed(params, step)
        optimizer.step()
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict()["state"]
    return digest([*(p.detach() for p in params), *(state[i]["mantissa"] for i in sorted(state))])


def after_errors(rank, kind):
    """Weights after two steps, between which something goes wrong on all ranks; gradients differ per rank."""
    shapes = [(8, 12)] * 10
    params, gradients = make(shapes, seed=rank, steps=3)
    start, _ = make(shapes, steps=0)
    with torch.no_grad():
        for p, q in zip(params, start):
            p.copy_(q)
    optimizer = Muon(params, sync_grads=True, deterministic=True, bucket_mb=1e-9)
    feed(params, gradients[0])
    optimizer.step()
    if kind == "a step that fails":
        def fail(*_):
            raise RuntimeError("out of memory")
        feed(params, gradients[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(muon, "momentum_update", fail)
            assert refused(optimizer.step) == "out of memory"  # while the next bucket's gradients travel
    if kind == "a group that is refused":
        other = torch.nn.Parameter(torch.zeros(4, 4 + rank))
        text = refused(lambda: optimizer.add_param_group(dict(params=[other])))
        assert "expected the same parameters" in text
        assert len(optimizer.param_groups) == 1
    feed(params, gradients[2])
    optimizer.step()
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict()["state"]
    return digest([*(p.detach() for p in params), *(state[i]["momentum_buffer"] for i in sorted(state))])


def too_early(rank, world_size, store):
    """Weights and number of momenta of a rank whose optimizer is older than its process group, and what is
    said when the other one has left."""
    store = dist.FileStore(store, world_size)
    dist.destroy_process_group()
    params, gradients = make([(4, 6), (4, 6)], steps=2)
    optimizer = Muon(params, deterministic=True)
    feed(params, gradients[0])
    optimizer.step()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    feed(params, gradients[1])
    optimizer.step()
    found = digest([p.detach() for p in params]), sum(map(bool, optimizer.state.values()))
    dist.destroy_process_group()
    return *found, refused(optimizer.consolidate_state_dict), refused(optimizer.step)


@functools.cache
def alone():
    return all_deterministic_runs()


def equal_on_all_ranks(ranks, pick):
    first, *others = [pick(found) for found in ranks]
    return all(len(first) == len(other) and all(map(same, first, other)) for other in others)


@pytest.mark.parametrize("W", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_different_gradients_are_averaged_as_one_process_would(world, W, case):
    expected = train(CASES[case], mean_gradients(CASES[case], W), **SETTINGS)[0]
    assert equal_on_all_ranks(world(W), lambda found: found["mean"][case])
    for actual, wanted in zip(world(W)[0]["mean"][case], expected):
        close(actual, wanted, rtol=1e-4, atol=1e-5)  # means of three fp32 numbers differ in the last bit


@pytest.mark.parametrize("W", WORLDS)
def test_the_bits_do_not_depend_on_ranks_or_buckets(world, W):
    for found in [{"deterministic": alone()}, *world(W)]:
        for key, (bits, buckets) in found["deterministic"].items():
            assert bits == alone()[key[0], key[1], 16][0], key
            units = sum(s[0] if len(s) == 3 else 1 for s in CASES[key[0]]) * (2 if "split" in key[1] else 1)
            # The small size closes as soon as it can
            assert (buckets == 1) == (key[2] == 16 or units <= (W if "rank" in found else 1)), key


@pytest.mark.parametrize("W", FEW)
@pytest.mark.parametrize("kind", ["missing", "nan"])
def test_a_bad_gradient_on_one_rank_skips_that_matrix_everywhere(world, W, kind):
    shapes = CASES["tall, wide and square"]
    gradients = mean_gradients(shapes, W)
    gradients[2][1] = None
    expected, optimizer = train(shapes, gradients, **SETTINGS)
    assert equal_on_all_ranks(world(W), lambda found: found[kind][0])
    weights, _, states = world(W)[0][kind]
    for actual, wanted in zip(weights, expected):
        close(actual, wanted, rtol=1e-4, atol=1e-5)
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            close(states[i][key], value, rtol=1e-4, atol=1e-6)
    assert [found[kind][1] for found in world(W)] == [1] * W


@pytest.mark.parametrize("W", FEW)
def test_without_a_gradient_anywhere_nothing_moves(world, W):
    start = [p.detach() for p in make(CASES["a bank"], steps=0, dtype=torch.bfloat16)[0]]
    expected, skipped = frozen()
    assert skipped == (7 + 2) * STEPS and not same(expected[1], start[1])
    for weights, number in [(expected, skipped), *(run for found in world(W) for run in found["frozen"])]:
        assert number == skipped and same(weights[0], start[0]) and same(weights[2], start[2])
    assert all(same(found["frozen"][0][0][1], expected[1]) for found in world(W))


@pytest.mark.parametrize("W", FEW)
def test_masters_of_convolutions_that_lie_channels_last(world, W):
    expected = channels_last()
    assert expected[1] == 1
    assert all(run == expected for found in world(W) for run in found["channels last"])


@pytest.mark.parametrize("W", FEW)
def test_state_that_is_no_longer_asked_for_is_dropped_at_any_number_of_ranks(world, W):
    assert {found["toggled"] for found in world(W)} == {toggled()}


@pytest.mark.parametrize("W", WORLDS)
def test_traffic_is_what_the_ring_model_says(world, W):
    """Gather f N 2 bytes of bf16 updates, reduce-scatter f N 4 or f N 2 bytes of gradients, f = (W - 1) / W,
    and one flag per matrix. With N = 84.9 M and W = 8 this is 148.6 + 297.3 = 445.9 MB, or 297.3 MB with bf16
    gradients."""
    N, units = W * (2 * 16 * 32 + 24 * 24), 3 * W
    for found in world(W):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            _, gathered, reduced, _ = found["bytes", dtype]
            assert gathered == (W - 1) * (N + units) // W * 2 and reduced == (W - 1) * N // W * size
        assert found["bytes", "ddp"][1:3] == ((W - 1) * (N + units) // W * 2, 0)


@pytest.mark.parametrize("W", FEW)
def test_two_exchanges_are_in_flight_at_most_and_computation_hides_two(world, W):
    """With sync_grads the gradients of the next bucket and the results of the one before travel while one is
    computed; what is held does not grow with the number of buckets."""
    # Of two exchanges: what a rank gives and what it gets, with one flag
    nbytes = 2 * (W + 1) * (16 * 32 + 1) * 4
    for found in world(W):
        flying, most, held, left = found["bounded"][True]
        assert flying == [2, 1, 2, 2, 2, 2, 1] * 2 and most == 2 and left == 0
        assert held <= nbytes
        flying, most, held, left = found["bounded"][False]
        assert flying == [0, 0, 1, 1, 1, 1, 1] * 2 and most == 1 and left == 0 and held <= nbytes


@pytest.mark.parametrize("W", FEW)
def test_ranks_that_disagree_all_learn_the_first_difference(world, W):
    shape_a, shape_b = "a of shape (4, 6) in torch.float32", "b of shape (6, 4) in torch.float32"
    for what, ours, theirs in (("order", shape_a, shape_b), ("count", shape_b, "nothing"),
                               ("setting", "ns_steps 5 of group 0", "ns_steps 6 of group 0"),
                               ("sync", "sync_grads True", "sync_grads False")):
        for found in world(W):
            assert found[what] == ("Muon: expected the same parameters and settings on all ranks, found "
                f"{ours} on rank 0 and {theirs} on rank 1; build the optimizer alike on every rank")


@pytest.mark.parametrize("W", FEW)
def test_a_partial_state_is_never_handed_out(world, W):
    for found in world(W):
        assert found["loaded"]
        for text in (*found["unconsolidated"], found["stale"]):
            assert "call consolidate_state_dict() on every rank" in text
    whole = world(W)[0]["state"]
    for found in world(W):
        for i, shape in enumerate(CASES["a bank"]):
            state = found["state"][i]
            assert set(state) == {"momentum_buffer", "second_moment", "mantissa"}
            assert state["momentum_buffer"].shape == state["mantissa"].shape == shape
            assert state["momentum_buffer"].dtype == torch.float32
            assert all((x != 0).any() for x in state["momentum_buffer"])
            assert all(same(value, whole[i][key]) for key, value in state.items())


@pytest.mark.parametrize("W", [1, *WORLDS])
def test_a_checkpoint_of_three_ranks_continues_bit_for_bit(world, W):
    gradients = make(CASES["a bank"], steps=STEPS, dtype=torch.bfloat16)[1]
    straight = digest(train(CASES["a bank"], gradients, dtype=torch.bfloat16, **RESUMED)[0])
    resumed = [found["resumed"] for found in world(W)] if W > 1 else [
        continue_from(torch.load(world(3)[0]["checkpoint"], weights_only=True))]
    assert set(resumed) == {straight}


@pytest.mark.parametrize("W", FEW)
def test_a_group_added_between_steps_moves_the_state_to_its_new_owners(world, W):
    params, steps = make(CASES["tall, wide and square"], steps=STEPS)
    optimizer = Muon(params, deterministic=True, **SETTINGS)
    for t, step in enumerate(steps):
        feed(params, step if t >= 2 else step[:4] + [None] * 3)
        optimizer.step()
    expected = digest([p.detach() for p in params])
    for found in world(W):
        assert found["grown"] == expected
        assert found["grown on a subgroup"] == (expected if found["rank"] else (
            "Muon: expected a process_group that this rank belongs to, found another; "
            "build the optimizer on the ranks of the group only"))


@pytest.mark.parametrize("W", FEW)
def test_a_failed_step_and_a_refused_group_leave_nothing_for_the_next_step(world, W):
    outcomes = {outcome for found in world(W) for outcome in found["after errors"]}
    assert len(outcomes) == 1


@pytest.mark.parametrize("W", FEW)
def test_every_element_of_momentum_lies_on_one_rank(world, W):
    held = [found["momentum"] for found in world(W)]
    assert sum(held) == sum(math.prod(shape) for shape in CASES["a bank"]) and max(held) < 2 * sum(held) / W


def test_an_optimizer_older_than_its_process_group_shares_the_work_from_then_on(tmp_path):
    params, gradients = make([(4, 6), (4, 6)], steps=2)
    optimizer = Muon(params, deterministic=True)
    for step in gradients:
        feed(params, step)
        optimizer.step()
    for found in run_ranks(2, watched, too_early, str(tmp_path / "store")):
        assert found[:2] == (digest([p.detach() for p in params]), 1)
        assert all("Default process group has not been initialized" in text for text in found[2:])
