"""The ways to start a run, with the real torchrun: one machine, and two agents that meet as on two machines."""

import os
import subprocess
import sys

import pytest
from tests.helpers.runs import ROOT, TINY, free_port, make_shards, run, step_lines

ARGS = [*TINY, "--train_steps=6", "--extension_steps=1", "--val_every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("multinode"))


def torchrun(folder, *options: str) -> subprocess.Popen:
    env = {**os.environ, "DATA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "train_gpt.py",
        *ARGS,
        f"--log_dir={folder / 'logs'}",
    ]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(text: str) -> dict[int, str]:
    return {step: pairs["val_loss"] for step, _, pairs in step_lines(text) if "val_loss" in pairs}


def test_two_machines_train_as_one_with_as_many_ranks(folder):
    """Two agents of one rank each, which meet through c10d on loopback; one agent with two ranks; and one process."""
    meet = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--rdzv_id=test",
        "--local_addr=127.0.0.1",
    ]
    started = [torchrun(folder, *meet), torchrun(folder, *meet), torchrun(folder, "--standalone", "--nproc_per_node=2")]
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert [err for _, err in outputs] == ["", "", ""]
    nodes = sorted((out for out, _ in outputs[:2]), key=len)
    assert nodes[0] == "" and nodes[1].splitlines()[-1].startswith("log: ")  # rank 0 alone speaks
    alone = run(folder, *ARGS[len(TINY) :])
    expected = {step: f"{loss:.4f}" for step, loss in alone.val.items()}
    assert losses(nodes[1]) == losses(outputs[2][0]) == expected and len(expected) == 4
    header = open(nodes[1].splitlines()[0]).read().split("=" * 100)[1]
    assert "with world_size 2\n" in header


def test_three_ranks_are_refused_in_one_sentence(folder):
    process = torchrun(folder, "--standalone", "--nproc_per_node=3")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1 and out == ""  # torchrun's own code, with its account of the failed ranks
    said = [line for line in err.splitlines() if line.startswith("train_gpt.py: ")]
    assert said == [
        "train_gpt.py: world size: expected one of 1, 2, 4, 8, 16, 32 for 8 slices of 512 tokens per step, found 3; "
        "change --nproc_per_node"
    ]
