"""What vendors say of their GPUs: the one table that memory plans and predictions stand on."""
from typing import NamedTuple


class Gpu(NamedTuple):
    """The data sheet of a GPU. Rates are of dense matrix products with fp32 sums."""
    gib: float  # memory as torch reports it, about
    tflops: float  # in bf16
    fp8_tflops: float  # the same as in bf16 where there is no FP8
    tb_s: float  # of its memory
    gb_s: float  # to other GPUs, one direction, over NVLink or PCIe


GPUS = {  # part of the name that torch reports
    "B200": Gpu(178.0, 2250.0, 4500.0, 8.0, 900),
    "H200": Gpu(139.8, 989.4, 1978.9, 4.8, 450),
    "GH200": Gpu(94.5, 989.4, 1978.9, 4.0, 450),
    "H100 NVL": Gpu(93.1, 835.0, 1670.0, 3.9, 300),
    "H100": Gpu(79.1, 989.4, 1978.9, 3.35, 450),
    "A100": Gpu(79.1, 312.0, 312.0, 2.04, 300),
    "L40S": Gpu(44.4, 362.0, 733.0, 0.864, 32),
    "RTX 6000 Ada": Gpu(47.4, 364.0, 728.5, 0.96, 32),
    "A6000": Gpu(47.4, 154.8, 154.8, 0.768, 56),
    "A40": Gpu(44.4, 149.7, 149.7, 0.696, 56),
    "5090": Gpu(31.4, 209.5, 419.0, 1.79, 64),
    "4090": Gpu(23.6, 165.2, 330.3, 1.01, 32),
    "3090": Gpu(23.6, 71.0, 71.0, 0.936, 32),
    "L4": Gpu(22.0, 121.0, 242.5, 0.3, 32),
    "A10": Gpu(22.0, 125.0, 125.0, 0.6, 32),
}


def find_gpu(name: str) -> Gpu | None:
    """Return the data sheet whose key is the longest part of this name, if there is one."""
    keys = [key for key in GPUS if key.lower() in name.lower()]
    return GPUS[max(keys, key=len)] if keys else None
