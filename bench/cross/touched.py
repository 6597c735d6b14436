"""How much of its tensors a kernel reads and writes, in sectors: the memory of a GPU gives 32 bytes or none,
so that twelve channels in bf16 of each row of a wide matrix cost 32 bytes a row.

What a kernel meets several times counts once, and no tensor as more than itself.
"""
import math
from collections import defaultdict
from typing import NamedTuple

import sympy
from torch._inductor.dependencies import MemoryDep
from torch._inductor.virtualized import V

SECTOR = 32  # bytes


class Part(NamedTuple):
    """Runs of bytes in a tensor: one from start to end, and those as far away as the sums of some steps."""
    start: int
    end: int
    steps: tuple[tuple[int, int], ...] = ()  # (bytes, times)


def part_of(start: int, strides: list[tuple[int, int]], item: int) -> Part:
    """Return where start + i stride + ... lie, for each i below n of the (stride, n), all in entries of
    `item` bytes. What leaves less than a sector between two runs makes one run."""
    first, run = start * item, item
    steps = []
    for stride, n in sorted((stride * item, n) for stride, n in strides if n > 1):
        if not steps and stride < run + SECTOR:
            run += stride * (n - 1)
        else:
            steps.append((stride, n))
    return Part(first, first + run, tuple(steps))


def bytes_of(parts: list[Part]) -> int:
    """Return the bytes of all sectors of these parts of one tensor. Those of equal steps are joined where
    they overlap; of others the sum is taken, which may be too much."""
    alike = defaultdict(list)
    for part in parts:
        alike[part.steps].append(part)
    total = 0
    for steps, found in alike.items():
        shifted = any(step % SECTOR for step, _ in steps)  # then a run may meet one sector more
        sectors, reached = 0, -math.inf
        for start, end, _ in sorted(found):
            first, last = max(start // SECTOR, reached), -(-end // SECTOR) + shifted
            sectors += max(last - first, 0)
            reached = max(last, reached)
        total += sectors * SECTOR * math.prod(n for _, n in steps)
    return total


# ------------------------------------------------------------------------------------------------------------
# What inductor knows


def number(expression) -> int:
    return int(V.graph.sizevars.optimization_hint(expression, fallback=0))


def part_of_loop(dep, item: int, turns: int) -> Part | None:
    """Return the part that a loop of a fused kernel meets; None where places in memory are no sums of
    strides. Rows that are looked up count as different ones: as many as all turns of the loop ask for. What a
    mask leaves out, as in a torch.cat, counts too."""
    if not isinstance(dep, MemoryDep):
        return None
    names, sizes = dep.var_names, [number(n) for n in dep.size]
    index = sympy.expand(dep.index, identity=True)
    strides = [index.coeff(name) for name in names]
    rest = index - sum(stride * name for stride, name in zip(strides, names))
    if not all(stride.is_Integer and stride >= 0 for stride in strides) or rest.free_symbols & set(names):
        return None
    moving = [(int(stride), n) for stride, n in zip(strides, sizes) if stride]
    start, looked_up = rest.as_coeff_Add()
    part = part_of(int(start), moving, item)
    if looked_up == 0:
        return part
    row, _ = looked_up.as_coeff_Mul()
    times = -(-turns // math.prod(n for _, n in moving))
    return part._replace(steps=(*part.steps, (int(row) * item, times)))


def part_of_view(view) -> Part:
    """Return the part that a kernel of a library is given."""
    layout = view.get_layout()
    strides = [(number(stride), number(n)) for stride, n in zip(layout.stride, layout.size)]
    return part_of(number(layout.offset), strides, layout.dtype.itemsize)


def views_of(node) -> dict[str, list]:
    """Return what a library's kernel is given, by the names of the tensors that it lies in."""
    found = defaultdict(list)
    for given in node.node.inputs:
        for view in given if isinstance(given, (list, tuple)) else [given]:
            found[view.get_name()].append(view)
    return found


def bytes_touched(node) -> int:
    """Return the bytes that the kernel of a scheduler's node reads and writes: what inductor counts, but of
    tensors of which it takes a part, that part."""
    counted = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    views = views_of(node) if node.is_extern() else {}
    loops = defaultdict(list)
    for dep in node.read_writes.reads | node.read_writes.writes:
        loops[dep.name].append(dep)
    turns = 0
    if counted and not node.is_extern():
        turns = max(number(math.prod(map(math.prod, part.get_ranges()))) for part in node.get_nodes())
    total = 0
    for name, whole in counted.items():
        buffer = V.graph.name_to_buffer.get(name) or V.graph.graph_inputs[name]
        if name in views:
            parts = [part_of_view(view) for view in views[name]]
        elif node.is_extern():
            parts = [None]  # what it makes
        else:
            parts = [part_of_loop(dep, buffer.get_dtype().itemsize, turns) for dep in loops[name]]
        if None not in parts:
            whole = number(math.prod(buffer.get_size())) * buffer.get_dtype().itemsize
            whole = min(whole, bytes_of(parts))
        total += whole
    return total
