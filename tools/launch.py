"""What ./run.sh starts once there is a Python with the requirements: choose track and ranks, prepare the data, run
train_gpt.py under torchrun, pass on its exit code.

    python -m tools.launch [--track=NAME] [--field=value ...]      # ./run.sh --help explains

Why not plain torchrun: it ends with exit code 1 and a traceback of its own whatever train_gpt.py said. Here the
trainer's one message stays the last one on the screen, and its exit code (2 usage, 1 run failure) is ours.
"""
import logging
import os
import signal
import subprocess
import sys

from tools.machine import usable_cores

LOST_CONTACT = 3  # as in engine/endings.py, which imports torch
DATA_SCRIPTS = {"shakespeare": "data/shakespeare.py", "small": "data/cached_fineweb10B.py"}  # track -> its data


def choose_ranks(num_gpus: int, cores: int, wanted: str) -> int:
    """Number of ranks: `wanted` (the text of NPROC) if it is not empty, else one per GPU, else up to two on the CPU."""
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        raise ValueError(f"NPROC: expected a number of ranks, found {wanted!r}; set NPROC=1, 2, 4 or 8.")
    ranks = int(wanted) if wanted else num_gpus or min(2, cores)
    if num_gpus and ranks > num_gpus:
        raise ValueError(f"NPROC: expected at most one rank per GPU, found {ranks} ranks for {num_gpus} GPUs; "
                         f"set NPROC={max(n for n in (1, 2, 4, 8) if n <= num_gpus)}.")
    if 8 % ranks:
        raise ValueError(f"expected 1, 2, 4 or 8 ranks, so that they share the batch evenly, found {ranks}"
                         f"{'' if wanted else ' GPUs'}; set NPROC={max(n for n in (1, 2, 4, 8) if n < ranks)}.")
    return ranks


def with_track(args: list[str], num_gpus: int) -> tuple[str, list[str]]:
    """The track these arguments name, or the one for this hardware, and the arguments with it. A checkpoint has its own
    track, which is "" here: it was trained on data that lie somewhere already."""
    pairs = [arg.partition("=") for arg in args]
    named = [value or following for (name, _, value), following in zip(pairs, [*args[1:], ""]) if name == "--track"]
    if named:
        return named[-1], args
    if any(name == "--resume" for name, _, _ in pairs):
        return "", args
    track = "small" if num_gpus else "shakespeare"
    return track, [f"--track={track}", *args]


def prepare_data(track: str, args: list[str]) -> int:
    """Run the script that prepares the track's data, which is quick when the data is there. Returns its exit code.
    Shards of the user's own need none, and a track we do not know is train_gpt.py's to refuse."""
    if track not in DATA_SCRIPTS or any(arg.startswith("--train_files=") for arg in args):
        return 0
    return subprocess.run([sys.executable, DATA_SCRIPTS[track]]).returncode


def exit_code(failures: dict) -> int:
    """One exit code for failed ranks, given torchrun's {rank: failure}; says it if a signal ended one, for nobody else can.
    A rank that lost contact with another one exits with LOST_CONTACT, silently."""
    # A rank that fails makes others fail at once, and torchrun ends the rest: by SIGTERM, 30 s later by SIGKILL.
    first_second = min(failure.timestamp for failure in failures.values())
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    for rank, failure in failures.items():
        signal_number = -failure.exitcode
        if signal_number > 0 and (not codes or signal_number != signal.SIGTERM and failure.timestamp <= first_second + 1):
            hint = " (often the system's answer to a lack of memory)" if signal_number == signal.SIGKILL else ""
            print(f"expected every rank to finish, found rank {rank} ended by {signal.Signals(signal_number).name}{hint}; "
                  "start again, or go on from a checkpoint if the run saved one: --resume=PATH", file=sys.stderr)
            break
    else:
        if codes and set(codes) == {LOST_CONTACT}:
            print("expected all ranks to go on, found that they lost contact; start again, or go on from a checkpoint if the "
                  "run saved one: --resume=PATH", file=sys.stderr)
    # Where one rank says 2 and others only notice that it left, it is 2. Ranks ended by torchrun have 128 and more.
    return max((code for code in codes if code < LOST_CONTACT), default=1)


def torchrun(ranks: int, args: list[str]) -> int:
    """Run `torchrun --standalone train_gpt.py ARGS` in this process and return the exit code of the run."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def interrupt(signum, frame):
        """torchrun sends the signal to all ranks and waits for them. A second Ctrl-C would make it leave them behind."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SignalException("interrupted", signal.Signals(signum))

    signal.signal(signal.SIGINT, interrupt)
    os.environ["LAUNCHED_BY"] = "launch.py"  # the ranks leave it to us to say which of them was ended from outside
    logging.disable(logging.CRITICAL)  # torchrun's account of a failure; the ranks tell their own
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={ranks}", "--shutdown-timeout=60",
                                "--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT", "train_gpt.py", *args]))
        return 0
    except ChildFailedError as error:
        return exit_code(error.failures)
    except SignalException as error:
        return 128 + error.sigval


def main(args: list[str]) -> int:
    if {"--doctor", "--plan"} & set(args):  # before anything is downloaded, and for all ranks at once
        return subprocess.run([sys.executable, "train_gpt.py", *args]).returncode
    import torch  # here, so that the functions above are there at once for their tests
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = usable_cores()
    try:
        ranks = choose_ranks(num_gpus, cores, os.environ.get("NPROC", ""))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    track, args = with_track(args, num_gpus)
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    name = track or "of the checkpoint"
    print(f"{num_gpus or 'no'} GPU, {cores} CPU cores: track {name}, ranks: {ranks}, threads of each: {threads}",
          file=sys.stderr)
    return prepare_data(track, args) or torchrun(ranks, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends a data script under way
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
