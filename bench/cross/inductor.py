"""What inductor makes of a graph for the pretended GPU: Triton's sources, the bytes and operations of every
kernel, the memory that the graph needs beside its inputs; and the machine code of the sources.
"""
import contextlib
import copy
import hashlib
import math
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.cross.device import Chip
from bench.cross.touched import bytes_touched
from bench.cross.trace import Graph
from tools.gpus import Gpu

OPTIMIZERS = {"adam": "Adam", "muon": "Muon"}  # file -> part; Adam calls functions of muon.py
TABLES = "bigram", "value_embeddings", "first_embedding"


class Kernel(NamedTuple):
    """One launch in a graph."""
    kind: str  # triton, or the operation of a library
    part: str  # as bench.step names them
    name: str
    bytes: int
    flops: int
    fp8: bool


class Driver:
    """What Triton asks of a GPU's driver in order to compile."""

    def __init__(self, chip: Chip):
        self.target = GPUTarget("cuda", 10 * chip.major + chip.minor, 32)
        facts = dict(max_shared_mem=chip.shared_bytes, multiprocessor_count=chip.processors, warpSize=32,
                     max_num_regs=65_536, mem_clock_rate=0, mem_bus_width=0, sm_clock_rate=0)
        self.utils = SimpleNamespace(get_device_properties=lambda device: facts)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0

    def set_current_device(self, device) -> None:
        pass

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        return None


# ------------------------------------------------------------------------------------------------------------
# Inductor


class Compiler:
    """Compiles graphs as far as Triton's sources, and keeps these."""

    def __init__(self, chip: Chip, gpu: Gpu):
        self.chip, self.gpu = chip, gpu
        self.sources = {}  # digest -> (name, source, the last graph that it is of)
        self.graph = None
        driver.set_active(Driver(chip))

    def __call__(self, graph: Graph) -> None:
        """Give the graph its kernels and its extra_bytes."""
        self.graph = graph
        copied = torch.fx.GraphModule(graph.gm, copy.deepcopy(graph.gm.graph))
        copied.meta = graph.gm.meta
        generate = GraphLowering.codegen

        def codegen(lowering):
            code = generate(lowering)
            graph.kernels = [row for node in lowering.scheduler.nodes for row in kernels_of(node)]
            graph.extra_bytes = extra_bytes(lowering)
            return code

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(GraphLowering, "codegen", codegen))
            stack.enter_context(mock.patch.object(AsyncCompile, "triton", self.keep))
            stack.enter_context(without_device(self.gpu))
            began = time.process_time()
            compile_fx_inner(copied, graph.inputs, **graph.options)
            graph.seconds = time.process_time() - began

    def keep(self, name: str, source: str, device_str: str = "cuda"):
        digest = hashlib.sha256(source.encode()).hexdigest()
        self.sources[digest] = name, source, self.graph
        return SimpleNamespace(run=None, name=name)

    def sources_of(self, chosen) -> list[tuple[str, str]]:
        """Return (name, source) of the kernels of graphs that are chosen."""
        return [(name, source) for name, source, graph in self.sources.values() if chosen(graph)]


@contextlib.contextmanager
def without_device(gpu: Gpu):
    """Answer what inductor would measure by the data sheet, and let it start and time nothing."""
    import torch._inductor.scheduler as scheduler
    import torch._inductor.utils as utils
    from torch._inductor.runtime import triton_helpers

    with contextlib.ExitStack() as stack:
        for module in (scheduler, utils):
            stack.enter_context(mock.patch.object(module, "get_gpu_dram_gbps", lambda: 1000 * gpu.tb_s))
            stack.enter_context(mock.patch.object(module, "get_device_tflops", lambda dtype: gpu.tflops))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(inductor_config.patch(
            force_disable_caches=True, use_static_triton_launcher=False))
        yield


def product_of(inner, kind: str, origins: list):
    """Return the graph's node of a product that a kernel of this kind computes; None if it is none."""
    if "mm" not in kind:
        return None
    # Of an operation with several outputs inductor knows no node.
    named = [one for one in origins if "mm" in one.name and re.sub(r"_\d+$", "", one.name) in kind]
    return inner.get_origin_node() or next(iter(named), None)


def kernel_of(node) -> Kernel | None:
    """Return the kernel of a scheduler's node; None for what launches none or runs on the host."""
    device = node.get_device()
    if device is None or device.type != "cuda":
        return None
    inner = getattr(node, "node", None)
    if not node.is_extern():
        kind = "template" if node.is_template() else "triton"
    elif type(inner).__name__ == "MultiOutput":
        return None
    else:
        kind = getattr(inner, "python_kernel_name", None) or type(inner).__name__
    origins = [origin for one in node.get_nodes() for origin in one.node.get_origins()]
    own = product_of(inner, kind, origins)
    if own is not None:
        origins = [own]  # the others belong to the kernels that made its inputs
    part = most_telling({part_of(origin, kind) for origin in origins})
    moved = bytes_touched(node)
    if kind == "UserDefinedTritonKernel":  # inductor counts what is only written as read too
        moved = sum(size_of(x) for x in inner.inputs)
    elif moved == 0:
        return None  # memory without contents
    try:
        flops = node.estimate_flops() or (own is not None and count_flops_fx(own)) or 0
    except Exception:  # it knows no formula for some operations
        flops = 0
    names = {re.sub(r"_\d+$", "", origin.name) for origin in origins if origin.op == "call_function"}
    return Kernel(kind, part, " ".join(sorted(names))[:80], moved, flops, "scaled_mm" in kind)


def kernels_of(node) -> list[Kernel]:
    """Return the kernels of a scheduler's node: two where torch copies what it adds to a product to where it
    writes the product, as it does with all but a row."""
    kernel = kernel_of(node)
    if kernel is None:
        return []
    if "addmm" in kernel.kind or "baddbmm" in kernel.kind:
        added = node.node.inputs[0]
        if len(added.get_size()) == len(node.node.get_size()):
            copy = kernel._replace(kind="copy", name=f"copy {kernel.name}", bytes=2 * size_of(added), flops=0)
            return [copy, kernel]
    return [kernel]


def size_of(buffer) -> int:
    return int(math.prod(buffer.get_size())) * buffer.get_dtype().itemsize


LIBRARIES = {
    "varlen": "attention", "flex": "attention", "scaled_dot": "attention", "table_gradient": "tables"}


def part_of(origin, kind: str) -> str:
    """Return the part of an operation by its kind, or by the functions of the trainer that it stands in."""
    for word, part in LIBRARIES.items():
        if word in kind:
            return part
    frames = re.findall(r'/(\w+)\.py", line \d+, in (\w+)', origin.meta.get("stack_trace") or "")
    files = {file for file, _ in frames}
    functions = {function for _, function in frames}
    for file, optimizer in OPTIMIZERS.items():
        if file in files:
            return optimizer
    if "head_loss" in files:
        return "head and loss"
    if "mm" in kind and functions & {"attention", "layer_weights"}:
        return "projections"
    if "mm" in kind and "layer" in functions:
        return "MLP"
    if functions & set(TABLES) and re.match("embedding|index|gather|full", origin.name):
        return "tables"
    return "elementwise"


def most_telling(parts: set[str]) -> str:
    """Return the part of a kernel that was fused from several."""
    order = "Muon", "Adam", "attention", "head and loss", "tables", "projections", "MLP"
    return next((part for part in order if part in parts), "elementwise")


def extra_bytes(lowering) -> int:
    """Return the bytes at the worst moment of a graph's own plan, beside those that live when it begins."""
    from torch._inductor import memory

    scheduler, nodes = lowering.scheduler, lowering.scheduler.nodes
    outputs = OrderedSet(lowering.get_output_names())
    inputs = OrderedSet(lowering.graph_inputs.keys())
    with V.set_graph_handler(lowering):
        freeable = memory.get_freeable_input_buf(nodes, inputs)
        memory.assign_memory_planning_info_for_scheduler_buffers(nodes, scheduler.name_to_buf)
        memory.assign_memory_planning_info_for_scheduler_nodes(
            nodes, scheduler.name_to_fused_node, scheduler.name_to_buf, freeable)
        for name in lowering.removed_buffers & set(scheduler.name_to_buf):  # they never leave their kernel
            planned = scheduler.name_to_buf[name].mpi_buffer
            planned.size_alloc = planned.size_free = 0
        peak, _ = memory.estimate_peak_memory(nodes, freeable, outputs)
    return peak - sum(buffer.mpi_buffer.size_free for buffer in freeable.values())


# ------------------------------------------------------------------------------------------------------------
# Machine code


def machine_code(source: str, name: str) -> list[dict]:
    """Return what ptxas says of each choice of tile sizes that inductor would time: registers, bytes of stack
    (spills), bytes of shared memory."""
    tuner = getattr(PyCodeCache.load(source), name)
    tuner.precompile(warm_cache_only=True)
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    rows = []
    for result in tuner.compile_results:
        kernel = result.kernel
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True).stdout
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
        rows.append(dict(name=name, choice=str(result.config), registers=int(used["REG"]),
                         stack=int(used["STACK"]), shared=kernel.metadata.shared))
    return rows


def all_machine_code(compiler: Compiler, sources: list[tuple]) -> tuple[list[dict], list[dict]]:
    """Return the rows of these kernels, and those that cannot be compiled, each with the reason."""
    rows, failed = [], []
    for name, source in sources:
        try:
            with without_device(compiler.gpu):
                rows += machine_code(source, name)
        except Exception as error:  # whatever the compilers raise
            failed.append(dict(name=name, why=f"{type(error).__name__}: {error}".replace("\n", " ")[:200]))
    return rows, failed
