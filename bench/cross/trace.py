"""The trainer's own Run at full size on tensors without memory: which graphs it makes and when, where the
host would wait for the device, what lives in its memory, and what runs outside of graphs.

Times and values are none of this: every number read from the device is zero.
"""
import contextlib
import functools
import gc
import os
import sys
import time
from collections import Counter, defaultdict
from unittest import mock

import torch
import torch.distributed as dist
from torch._functorch._aot_autograd import autograd_cache
from torch._guards import TracingContext
from torch._inductor.codecache import FxGraphCache
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import train_gpt
from data import loader
from data.files import ROOT
from engine import attention
from engine.kernels import Kernels, keep_compiled
from engine.ranks import Runtime
from muon import symmetric_product
from train_gpt import Config, Run

aten = torch.ops.aten
HOST = torch.device("cpu")
LOOKED_AT = 2**24  # bytes of an allocation after which the memory in use is added up
OURS = "muon.py", "engine/", "data/", "train_gpt.py"
PARTS_OF_FILES = {"muon.py": "Muon", "engine/adam.py": "Adam"}
PARTS_OF_FUNCTIONS = {"context": "masks", "to_device": "data", "accumulate": "gradient sums"}


def places():
    """Yield (file, line, function) of the trainer's lines that are being executed, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        file = code.co_filename.removeprefix(f"{ROOT}/")
        if file.startswith(OURS):
            yield file, frame.f_lineno, code.co_name
        frame = frame.f_back


def here() -> str:
    return "{}:{} {}".format(*next(places(), ("elsewhere", 0, "")))


def eager_part() -> str:
    """Return the part, as bench.step names them, of an operation outside of graphs."""
    parts = (PARTS_OF_FILES.get(file) or PARTS_OF_FUNCTIONS.get(function) for file, _, function in places())
    return next(filter(None, parts), "other")


def sent_bytes(name: str, tensors: list[torch.Tensor], ranks: int) -> float:
    """Return the bytes that each rank of a ring sends in a collective. tensors: all that it takes, of which
    the largest is the whole."""
    rounds = 2 if "allreduce" in name else 1  # a sum to the owners, and its way back
    return rounds * max(x.nbytes for x in tensors) * (ranks - 1) / ranks


def storage_of(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class Graph:
    """A graph that inductor was given. gm: what it computes; inputs, options: more of what inductor takes."""

    def __init__(self, name: str, phase: str, gm, inputs, options: dict):
        self.name, self.phase, self.gm, self.inputs, self.options = name, phase, gm, inputs, options
        self.backward = bool(options.get("is_backward"))
        self.outputs = [node.meta["val"] if isinstance(node, torch.fx.Node) else node
                        for node in gm.graph.output_node().args[0]]
        self.expected = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        given = {storage_of(x): i for i, x in enumerate(self.expected) if isinstance(x, torch.Tensor)}
        self.sources = [given.get(storage_of(x)) if isinstance(x, torch.Tensor) else None
                        for x in self.outputs]  # which input an output is, or looks into
        self.kernels = []  # set by bench.cross.inductor
        # At its worst moment, beside what lives when it is called; set by bench.cross.inductor.
        self.extra_bytes = 0
        self.seconds = 0.0  # CPU seconds that inductor took

    @property
    def kept_bytes(self) -> int:
        """Memory of the outputs that are no inputs: of a forward graph, what it keeps for the backward."""
        made = [x for x, source in zip(self.outputs, self.sources)
                if isinstance(x, torch.Tensor) and source is None]
        sizes = {storage_of(x): x.untyped_storage().nbytes() for x in made}
        return sum(n.node.hint if isinstance(n, torch.SymInt) else n for n in sizes.values())

    def run(self, args: list) -> list:
        """Return tensors without contents. Symbols in their shapes get the values that the arguments have."""
        made = {}  # storage of an output of the graph -> what stands for it
        values = {}
        for expected, arg in zip(self.expected, args):
            tensor = isinstance(arg, torch.Tensor)
            pairs = zip(expected.shape, arg.shape) if tensor else [(expected, arg)]
            values |= {n.node.expr: int(m) for n, m in pairs if isinstance(n, torch.SymInt)}

        def number(n) -> int:
            return int(n.node.expr.subs(values)) if isinstance(n, torch.SymInt) else n

        def make(x, source):
            if not isinstance(x, torch.Tensor):
                return number(x)
            size, stride = ([number(n) for n in numbers] for numbers in (x.size(), x.stride()))
            offset = number(x.storage_offset())
            if source is not None:
                arg = args[source]
                offset += arg.storage_offset() - number(self.expected[source].storage_offset())
                return arg.view(x.dtype).as_strided(size, stride, offset)
            key = storage_of(x)  # what is kept twice lies in memory once
            if key not in made:
                made[key] = torch.empty(number(x.untyped_storage().nbytes()), dtype=torch.uint8,
                                        device=x.device)
            return made[key].view(x.dtype).as_strided(size, stride, offset)

        return [make(x, source) for x, source in zip(self.outputs, self.sources)]

    def __str__(self) -> str:
        return f"{self.name}{' backward' if self.backward else ''}"


class Trace:
    """What was seen, by phase of the run."""

    def __init__(self):
        self.phase = "start"
        self.compiling = ""  # name of the function whose graphs inductor is given
        self.graphs = []
        self.calls = Counter()  # (phase, number of the graph) -> calls
        self.waits = Counter()  # (phase, what, place) -> times
        self.eager = defaultdict(Counter)  # (phase, part, operation) -> n, bytes, flops, sent
        self.peaks = {}  # phase -> (bytes in use, at which place)
        self.compiled = lambda graph: None  # called with each new graph
        self.saved = []  # steps of checkpoints
        self.seconds = Counter()  # phase -> CPU seconds of this process
        self.crowded = 0  # sequences with more documents than entries for them
        self.refused = Counter()  # function and reason why torch's cache does not keep its graph -> graphs
        self.storages = {}
        self.pinned = {}

    def wait(self, what: str) -> None:
        self.waits[self.phase, what, here()] += 1

    # Memory

    def live_bytes(self) -> int:
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())

    def note_peak(self, more: int = 0, what=None) -> None:
        total = self.live_bytes() + more
        if total > self.peaks.get(self.phase, (0, None))[0]:
            self.peaks[self.phase] = total, str(what or here())

    def pin(self, tensor):
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor) -> bool:
        found = self.pinned.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    # Operations outside of graphs

    def saw(self, func, args, kwargs, result) -> None:
        if func.is_view:
            return
        changed = args[0] if result is None else result  # torch._foreach_copy_ returns nothing
        outputs = [x for x in tree_leaves(changed) if isinstance(x, torch.Tensor) and x.is_cuda]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_cuda]
        if not outputs:
            return
        largest = 0
        for x in outputs:
            storage = x.untyped_storage()
            if storage._cdata not in self.storages or self.storages[storage._cdata][0].expired():
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                largest = max(largest, storage.nbytes())
        if largest >= LOOKED_AT:
            self.note_peak()
        if func.name().startswith(("aten::empty", "aten::new_empty")):
            return
        row = self.eager[self.phase, eager_part(), func.name()]
        row["n"] += 1
        if func.namespace == "c10d":
            row["sent"] += sent_bytes(func.name(), inputs, dist.get_world_size())
        row["bytes"] += sum(x.numel() * x.itemsize for x in {id(x): x for x in (*inputs, *outputs)}.values())
        if func.overloadpacket in flop_registry:
            row["flops"] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)


class PretendedDevice(FakeTensorMode):
    """Fake tensors that report to a trace what is done with them outside of graphs."""

    avoid_device_init = True  # torch must not make a real tensor on the device

    def __init__(self, trace: Trace):
        super().__init__(allow_non_fake_inputs=True)
        self.trace = trace

    def dispatch(self, func, types, args=(), kwargs={}):
        if TracingContext.try_get() is not None:
            return super().dispatch(func, types, args, kwargs)
        kwargs = dict(kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if func is aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self.trace.wait("a number read")
            return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if torch.Tag.dynamic_output_shape in func.tags and any(
                isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves(args)):
            self.trace.wait(f"a shape read: {func.name()}")
        self.check_copy(func, args, kwargs)
        result = super().dispatch(func, types, args, kwargs)
        if pinned:
            self.trace.pin(result)
        self.trace.saw(func, args, kwargs, result)
        return result

    def check_copy(self, func, args, kwargs) -> None:
        """Note a copy between host and device for which the host waits."""
        if func is aten._to_copy.default:
            source = host = args[0]
            target = torch.device(kwargs.get("device") or source.device).type
            waits = not kwargs.get("non_blocking")
        elif func is aten.copy_.default:
            target, source = args[0].device.type, args[1]
            host = args[1] if target == "cuda" else args[0]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            return
        new = target == "cpu" and func is aten._to_copy.default  # in memory that is not pinned
        if source.device.type != target and (waits or new or not self.trace.is_pinned(host)):
            self.trace.wait(f"a copy to {target}")


# ------------------------------------------------------------------------------------------------------------
# torch.compile, as far as inductor


def function_being_compiled() -> str:
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_name == "_compile" and frame.f_code.co_filename.endswith("convert_frame.py"):
            name = frame.f_locals["code"].co_name
            return "GPT" if name == "forward" else name
        frame = frame.f_back
    return "unknown"


def recording(trace: Trace):
    """Return a function in place of torch.compile: its graphs are recorded, and make empty results when
    called."""
    compile_truly = torch.compile

    def inner(gm, inputs, **kwargs):
        graph = Graph(trace.compiling, trace.phase, gm, inputs, kwargs)
        number = len(trace.graphs)
        trace.graphs.append(graph)
        _, found = FxGraphCache.prepare_key(gm, inputs, kwargs, [], remote=False)
        if reason := found.get("cache_bypass_reason"):
            trace.refused[f"{graph}: {reason}"] += 1
        trace.compiled(graph)

        def call(args):
            trace.calls[trace.phase, number] += 1
            trace.note_peak(graph.extra_bytes, graph)
            given = list(args)
            args.clear()
            return graph.run(given)

        call._boxed_call = True
        return call

    def backend(gm, inputs):
        trace.compiling = function_being_compiled()
        return compile_fx(gm, inputs, inner_compile=inner)

    def compile(function=None, **options):  # always with this backend: another would compile again
        return compile_truly(function, backend=backend, **options)

    return compile


def asking_cache(trace: Trace, make_key):
    """Return torch's function that finds a graph's place in its cache; it notes why a graph has none."""
    def key(*args):
        try:
            return make_key(*args)
        except Exception as error:  # whatever torch then takes for a reason to compile
            trace.refused[f"{trace.compiling}: {' '.join(str(error).split())}"] += 1
            raise

    return key


class OnHost(TorchDispatchMode):
    """Makes on the host what is asked of the device: the few numbers of which inductor folds constants."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: HOST if isinstance(x, torch.device) else x for name, x in (kwargs or {}).items()}
        return func(*(HOST if isinstance(x, torch.device) else x for x in args), **kwargs)


def fold_on_host(fold):
    def run(*args, **kwargs):
        with OnHost():
            return fold(*args, **kwargs)
    return run


@contextlib.contextmanager
def pretending(trace: Trace):
    """Trace everything inside on fake tensors of the GPU that bench.cross.device pretends."""
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.pad_mm as pad_mm

    compile = recording(trace)
    cache_key = asking_cache(trace, autograd_cache.autograd_cache_key)
    folder = joint_graph.UniformValueConstantFolder
    make_tensor = torch.tensor

    def tensor(*args, pin_memory=False, **kwargs):
        made = make_tensor(*args, **kwargs)
        return trace.pin(made) if pin_memory else made

    patches = [
        mock.patch.object(torch, "compile", compile),
        mock.patch.object(attention, "compiled", functools.cache(compile)),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args: trace.pin(self)),
        mock.patch.object(folder, "run", fold_on_host(folder.run)),
        mock.patch.object(fuse_attention, "_sfdp_init", lambda *args, **kwargs: None),  # it runs patterns
        mock.patch.object(pad_mm, "_should_pad", lambda *args, **kwargs: False),  # it times both
        mock.patch.object(autograd_cache, "autograd_cache_key", cache_key),
        torch._inductor.config.patch(compile_threads=1),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(PretendedDevice(trace))
        yield


# ------------------------------------------------------------------------------------------------------------
# A run


@contextlib.contextmanager
def first_of(ranks: int):
    """Be the first of some ranks, of which the others answer at once and send nothing."""
    if ranks == 1:
        yield
        return
    variables = dict(
        RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")

    def gather_objects(into, mine, group=None):
        into[:] = [mine] * len(into)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        gather = mock.patch.object(dist, "all_gather_object", gather_objects)
        with mock.patch.dict(os.environ, variables), gather:
            yield
    finally:
        dist.destroy_process_group()


class SilentLog:
    """Takes what a run would write."""
    run_id = "cross"  # no folder of this name appears: nothing is saved

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def pretended_kernels(cfg: Config, backend: str, fp8: bool) -> Kernels:
    """Return the kernels that a GPU which passes these self-tests would choose."""
    keep_compiled()
    return Kernels(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        compiled=True,
        attention=backend,
        fp8_head=fp8,
        onednn=False,
        bf16=False,
        ns_dtype=torch.bfloat16,
        symmetric=symmetric_product,
        mlp_fp8=cfg.mlp_fp8 != "off" and fp8,
        fused_mlp=torch.cuda.get_device_capability()[0] in (9, 10))


def make_run(cfg: Config, backend: str, fp8: bool) -> Run:
    """Return a run on the pretended GPU with these kernels instead of those that self-tests would choose, and
    without a vocabulary, which only a table filled at the start needs."""
    chosen = pretended_kernels(cfg, backend, fp8)
    choose = mock.patch.object(Kernels, "choose", staticmethod(lambda cfg, device: chosen))
    with choose, mock.patch.object(train_gpt, "encoding_for", lambda *args, **kwargs: None):
        return Run(cfg, Runtime())


def follow(trace: Trace, run: Run, before: str = "") -> None:
    """Let the trace know which phase the run is in: a step by its number, a validation, a checkpoint, or what
    is between. before: what the names of its phases begin with."""
    def phased(function, name):
        def call(*args):
            phase = trace.phase = before + (name or f"step {run.step}")
            began = time.process_time()
            result = function(*args)
            trace.seconds[phase] += time.process_time() - began
            trace.phase = "between steps"
            return result
        return call

    run.train_step = phased(run.train_step, None)
    run.evaluate = phased(run.evaluate, "validation")
    run.warm_up = phased(run.warm_up, "warm-up")
    run.save = phased(run.save, "saving")
    run.load = phased(run.load, "loading")


def on_host(state):
    """Return a checkpoint as it would be read again: what lies on the device is copied to the host."""
    return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) and x.is_cuda else x, state)


def whole_schedule(trace: Trace, cfg: Config, backend: str, fp8: bool, ranks: int) -> None:
    """Trace a whole run of one of some ranks: start, warm-up, every step, validation and checkpoint. Then
    trace another one that goes on from each of these checkpoints."""
    saved = []

    def keep(path, state) -> None:
        saved.append(on_host(state))

    def counted(*args):
        trace.crowded += 1
        return share_entries(*args)

    share_entries = loader.share_entries
    keeps = mock.patch.object(train_gpt, "write_checkpoint", keep)
    counts = mock.patch.object(loader, "share_entries", counted)
    with first_of(ranks), pretending(trace), keeps, counts:
        run = make_run(cfg, backend, fp8)
        follow(trace, run)
        run.warm_up()
        train_gpt.train(run, SilentLog())
        del run
        gc.unfreeze()  # what train() froze: else this run would lie in memory beside the next
        gc.collect()

        checkpoints = list(saved)
        trace.saved = [state["step"] for state in checkpoints]
        if not checkpoints:
            return
        trace.compiled = lambda graph: None  # its kernels are those of the first
        run = make_run(cfg, backend, fp8)
        follow(trace, run, "resumed: ")
        run.warm_up()
        for state in checkpoints:
            run.load("checkpoint", state)
            train_gpt.train(run, SilentLog())
