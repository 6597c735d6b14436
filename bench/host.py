"""How fast this machine is at what training consists of: matrix products, memory, a block of a network, sums over ranks, disk.

    python bench/host.py [--seconds=60] [--out=logs/host.json]
    torchrun --standalone --nproc_per_node=8 bench/host.py

`python -m records calibrate` starts it and compares machines. The time is cut into ten rounds and each round measures each
part, so that a machine that gets hot or busy shows in its ten values. A value is the work per second of the slowest rank, for
whom the others wait in training. Needs torch only.
"""
import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

PROBE = 1  # raise it with every change of what is measured: values of different probes do not compare
ROUNDS = 10
DISK_BYTES = 1 << 26


def block(x, w_in, w_out):
    """Forward and backward of the MLP of a transformer's layer."""
    w_in.grad = w_out.grad = None
    (F.rms_norm(x, x.shape[-1:]) @ w_in).relu().square().matmul(w_out).sum().backward()


def read_uncached(path: Path):
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 22):
            pass


def make_parts(device: torch.device, world: int, compute: torch.dtype, folder: Path) -> dict:
    """Name -> (unit, work of one call, call). Sizes of a real step where there is a GPU, of the laptop track elsewhere."""
    cuda = device.type == "cuda"
    n, copied, reduced, tokens, width = (8192, 1 << 30, 1 << 26, 32_768, 768) if cuda else (1024, 1 << 27, 1 << 22, 2048, 192)
    parts = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device, dtype=dtype)
        parts[f"matmul_{str(dtype)[6:]}"] = "TFLOP/s", 2 * n ** 3 / 1e12, partial(torch.mm, a, a, out=torch.empty_like(a))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    parts["memory"] = "GB/s", 2 * copied / 1e9, partial(torch.empty_like(source).copy_, source)
    x, w_in, w_out = (torch.randn(shape, device=device, dtype=compute) for shape in
                      ((tokens, width), (width, 4 * width), (4 * width, width)))
    parts["block"] = "Mtokens/s", tokens / 1e6, partial(block, x, w_in.requires_grad_(), w_out.requires_grad_())
    if world > 1:
        parts["all_reduce"] = "GB/s", reduced / 1e9, partial(dist.all_reduce, torch.zeros(reduced // 4, device=device))
    if hasattr(os, "posix_fadvise"):
        file = folder / "host_probe"
        file.write_bytes(os.urandom(DISK_BYTES))
        with open(file, "rb+") as written:
            os.fsync(written.fileno())  # only what is on the disk can leave the page cache
        parts["disk"] = "GB/s", DISK_BYTES / 1e9, partial(read_uncached, file)
    return parts


def slowest(value: float, world: int, device: torch.device) -> float:
    """The least of the values of all ranks."""
    if world == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return least.item()


def rate(call, calls: int, device: torch.device) -> float:
    """Calls per second."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls / (time.perf_counter() - start)


def parse_sensors(text: str) -> dict[str, float]:
    """Rows of nvidia-smi, one per GPU, reduced to the worst GPU; what a GPU does not tell ("[N/A]") is left out."""
    columns = zip(*(row.split(",") for row in text.splitlines() if row.count(",") == 3))
    worst = {}
    for name, choose, column in zip(("clock_mhz", "max_clock_mhz", "celsius", "watts"), (min, min, max, max), columns):
        try:
            worst[name] = choose(map(float, column))
        except ValueError:
            pass
    return worst


def sensors(device: torch.device):
    """Starts to ask for clocks; the result waits for the answer. A GPU must be asked while it works."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,temperature.gpu,power.draw", "--format=csv,noheader,nounits"]
        try:
            process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return dict
        return lambda: parse_sensors(process.communicate()[0])
    try:
        clocks = [float(line.partition(":")[2]) for line in open("/proc/cpuinfo") if line.startswith("cpu MHz")]
    except OSError:
        clocks = []
    return lambda: {"clock_mhz": sum(clocks) / len(clocks)} if clocks else {}


def first_line(path: str, start: str = "") -> str:
    """The first line of a file of /proc that starts so, or ""."""
    try:
        return next((line.strip() for line in open(path) if line.startswith(start)), "")
    except OSError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="time of the measurements (60)")
    parser.add_argument("--out", type=Path, default=Path("logs/host.json"), help="file to write (logs/host.json)")
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    world, rank, local = (int(os.environ.get(name, default)) for name, default in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device, compute = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, compute = torch.device("cuda", local), torch.bfloat16
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        parts = make_parts(device, world, compute, Path(folder))
        share, calls, values, asked = options.seconds / ROUNDS / len(parts), {}, {name: [] for name in parts}, []
        for name, (_, _, call) in parts.items():
            rate(call, 1, device)  # compiles, allocates, connects
            calls[name] = math.ceil(share * slowest(rate(call, 1, device), world, device))
        for _ in range(ROUNDS):
            for name, (_, work, call) in parts.items():
                answer = sensors(device) if rank == 0 and name == f"matmul_{str(compute)[6:]}" else None
                values[name].append(slowest(work * rate(call, calls[name], device), world, device))
                if answer:
                    asked.append(answer())
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
            first_line("/proc/cpuinfo", "model name").partition(":")[2].strip() or platform.processor() or platform.machine())
        result = dict(probe=PROBE, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                      boot=first_line("/proc/sys/kernel/random/boot_id"), device=name, ranks=world,
                      threads=torch.get_num_threads(), torch=torch.__version__, compute=str(compute)[6:], cores=os.cpu_count(),
                      load=round(load, 2),  # other work before the start, in busy cores
                      parts={name: dict(unit=parts[name][0], values=[float(f"{value:.4g}") for value in values[name]])
                             for name in parts},
                      sensors={key: [round(sensor.get(key, 0)) for sensor in asked] for key in asked[0]})
        partial_file = options.out.with_suffix(".partial")
        partial_file.write_text(json.dumps(result) + "\n")
        os.replace(partial_file, options.out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
