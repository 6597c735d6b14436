"""What a kernel touches of its tensors, counted by hand: parts in sectors of 32 bytes, the whole once."""
from unittest import mock

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.scheduler import Scheduler

from bench.cross.touched import bytes_of, bytes_touched, part_of

T, D = 64, 768  # x is (T, D) in fp32: rows of 3,072 bytes


class Counted(Exception):
    """Ends a compilation before a compiler is called."""


def touched(function, *inputs) -> list[int]:
    """Return the bytes of each kernel that inductor makes of a function."""
    found = []

    def count(scheduler):
        found.extend(map(bytes_touched, scheduler.nodes))
        raise Counted

    torch._dynamo.reset()
    with mock.patch.object(Scheduler, "codegen", count), torch.no_grad():
        with pytest.raises(Exception, match="Counted"):
            torch.compile(function, dynamic=False)(*inputs)
    return found


def test_a_fused_kernel_reads_sectors_of_the_channels_that_it_takes_and_of_all_it_reads_the_whole_once():
    x, y = torch.randn(2, T, D)
    part = T * 2 * 32  # 12 channels: 48 bytes, two sectors a row
    whole = T * D * 4
    assert touched(lambda x: x[:, :12] * 2, x) == [part + 12 * T * 4]
    assert touched(lambda x: x[:, 6:12] + x[:, :6], x) == [part + 6 * T * 4]  # sectors 0 and 1, together
    assert touched(lambda x, y: (x + y[:, :1]).sum(1), x, y) == [whole + 32 * T + 4 * T]
    assert touched(lambda x: x[1:] + x[:-1], x) == [whole + (T - 1) * D * 4]  # neighbours: the same rows
    assert touched(lambda x: (x * 2).sum(1) + x[:, 767], x) == [whole + 4 * T]


def test_of_a_table_only_the_rows_that_are_looked_up_count_but_never_more_than_the_table():
    ids = torch.zeros(T, dtype=torch.int64)
    rows = T * D * 4
    table = torch.randn(1000, D)
    assert touched(lambda i, t: t[i] * 2, ids, table) == [8 * T + 2 * rows]
    assert touched(lambda i, t: t[i] * 2, ids, table[:10]) == [8 * T + 10 * D * 4 + rows]
    assert touched(lambda i, t: t[i, 0] * 2, ids, table) == [8 * T + 32 * T + 4 * T]  # a sector of each row


def test_one_of_several_stacked_tensors_counts_as_itself():
    stacked = torch.randn(5, T, D)
    assert touched(lambda x: (x[2] * x[2]).sum(1), stacked) == [T * D * 4 + 4 * T]


def test_what_is_put_beside_each_other_counts_with_what_its_masks_leave_out():
    """The loop of torch.cat goes over 12 channels in both: 48 bytes from 0, and from 24 bytes before."""
    x, stacked = torch.randn(T, D), torch.randn(5, T, D)
    with inductor_config.patch(force_pointwise_cat=True):  # as on a GPU
        found = touched(lambda x, y: torch.cat([x[:, :6], y[2, :, :6]], 1), x, stacked)
    assert found == [2 * 32 * T + 2 * 32 * T + 12 * T * 4]


def test_a_product_reads_sectors_of_the_channels_that_it_is_given():
    x, w = torch.randn(T, D), torch.randn(6, 12)
    assert touched(lambda x, w: x[:, :12] @ w.t(), x, w) == [2 * 32 * T + 6 * 12 * 4 + 6 * T * 4]


def test_runs_are_whole_sectors_and_one_more_where_rows_are_not_aligned():
    assert bytes_of([part_of(0, [(768, 10), (1, 12)], 2)]) == 10 * 32
    assert bytes_of([part_of(12, [(768, 10), (1, 12)], 2)]) == 10 * 64  # bytes 24 to 48 of each row
    assert bytes_of([part_of(0, [(771, 10), (1, 12)], 2)]) == 10 * 64
    assert bytes_of([part_of(0, [(2, 1000)], 2)]) == 4000  # every second entry: all sectors
