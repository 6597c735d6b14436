"""Look at the settings, choose track and ranks, prepare the data, run train_gpt.py under torchrun.

    python -m tools.launch [--track=NAME] [--field=value ...]      # ./run.sh --help explains

This is what ./run.sh starts once there is a Python with the requirements. Why not plain torchrun: it ends
with exit code 1 and a traceback of its own whatever train_gpt.py said. Here the trainer's one message stays
the last one on the screen, and its exit code (2 usage, 1 run failure) is ours.
"""
import logging
import os
import signal
import subprocess
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import torch
# On macOS it warns that the output of ranks cannot go to files, where ours does not go.
logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").setLevel(logging.ERROR)
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from data import shakespeare
from data.cached_fineweb10B import shard_names
from data.errors import UsageError, run_program
from data.files import data_root
from data.loader import shards_needed
from data.machine import usable_cores
from data.shards import MAKERS
from engine.endings import LOST_CONTACT
from engine.ranks import check_driver
from tools import plan
from train_gpt import Config, configure, parse_config, show_settings

RANK_PROGRAM = ["-m", "tools.rank"]
WORLD_SIZES = (1, 2, 4, 8)


def choose_ranks(num_gpus: int, cores: int, wanted: str) -> int:
    """Return the number of ranks: `wanted` (the text of NPROC), else one per GPU, else up to two. Raises
    UsageError for a number that cannot share the batch or the GPUs."""
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        raise UsageError(f"NPROC: expected a number of ranks, found {wanted!r}; set NPROC=1, 2, 4 or 8.")
    ranks = int(wanted) if wanted else num_gpus or min(2, cores)
    if num_gpus and ranks > num_gpus:
        fitting = max(n for n in WORLD_SIZES if n <= num_gpus)
        raise UsageError(f"NPROC: expected at most one rank per GPU, found {ranks} ranks for {num_gpus} "
                         f"GPUs; set NPROC={fitting}.")
    if 8 % ranks:
        fitting = max(n for n in WORLD_SIZES if n < ranks)
        unit = "" if wanted else " GPUs"
        raise UsageError("expected 1, 2, 4 or 8 ranks, so that they share the batch evenly, found "
                         f"{ranks}{unit}; set NPROC={fitting}.")
    return ranks


def prepare_data(cfg: Config) -> int:
    """Run the script that prepares the track's data, quick when they are there. Returns its exit code."""
    maker = MAKERS.get(os.path.dirname(cfg.train_files))
    if maker is None:
        return 0
    arguments = [str(shards_needed(cfg))] if cfg.track != "shakespeare" else []
    try:
        return subprocess.run([sys.executable, "-m", maker, *arguments]).returncode
    except KeyboardInterrupt:  # the script has it too, and has said so
        return 128 + signal.SIGINT


def show_without_data(cfg: Config) -> bool:
    """Say where files of the track's data are missing, with the settings and the plan, which need none;
    and return whether it is so."""
    folder = data_root() / os.path.dirname(cfg.train_files)
    names = shakespeare.SHA256 if cfg.track == "shakespeare" else shard_names(shards_needed(cfg))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        print("\n".join(show_settings(cfg)))
        plan.show(cfg, *plan.planned_machine())
        print(f"data: {len(missing)} of {len(names)} files are missing in {folder}; a run would download "
              "them first, and --dry_run says more once they are there")
    return bool(missing)


def exit_code(failures: dict) -> int:
    """Return one exit code for failed ranks, given torchrun's {rank: failure}. Says it if a signal ended a
    rank, for nobody else can. A rank that lost contact with another one exits with LOST_CONTACT, silently."""
    # A rank that fails makes others fail at once, and torchrun ends the rest: by SIGTERM, later by SIGKILL.
    first_second = min(failure.timestamp for failure in failures.values())
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    advice = "start again, or go on from a checkpoint if the run saved one: --resume=PATH"
    for rank, failure in failures.items():
        number = -failure.exitcode
        of_itself = number != signal.SIGTERM and failure.timestamp <= first_second + 1
        if number > 0 and (not codes or of_itself):
            hint = " (often the system's answer to a lack of memory)" if number == signal.SIGKILL else ""
            print(f"expected every rank to finish, found rank {rank} ended by "
                  f"{signal.Signals(number).name}{hint}; {advice}", file=sys.stderr)
            break
    else:
        if codes and set(codes) == {LOST_CONTACT}:
            print(f"expected all ranks to go on, found that they lost contact; {advice}", file=sys.stderr)
    # Where one rank says 2 and others only notice that it left, it is 2. Torchrun ends ranks with over 128.
    return max((code for code in codes if code < LOST_CONTACT), default=1)


def torchrun(ranks: int, args: list[str]) -> int:
    """Run the ranks under torchrun, in this process, and return the exit code of the run."""
    stops = [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        stops.append(signal.SIGHUP)

    def interrupt(number, frame):
        """End the run: torchrun sends all ranks the signal and waits for them to save and end."""
        for stop in stops:  # a second one would make torchrun leave the ranks behind
            signal.signal(stop, signal.SIG_IGN)
        raise SignalException("interrupted", signal.Signals(number))

    for stop in stops:
        signal.signal(stop, interrupt)
    os.environ["LAUNCHED_BY"] = str(os.getpid())  # it is for us to say which rank was ended from outside
    logging.disable(logging.CRITICAL)  # torchrun's account of a failure; the ranks tell their own
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")  # seconds; older torch has no option for it
    options = ["--standalone", f"--nproc-per-node={ranks}", "--signals-to-handle=SIGTERM,SIGQUIT",
               "--local-addr=127.0.0.1"]  # or ranks look each other up by a host name that need not resolve
    try:
        run.run(run.parse_args([*options, *RANK_PROGRAM, *args]))
        return 0
    except ChildFailedError as error:
        return exit_code(error.failures)
    except SignalException as error:
        return 128 + error.sigval


def main(args: list[str]) -> int:
    # Settings and checkpoint are looked at once, here: of several ranks that meet an error, torchrun may end
    # the one that speaks for all before it has spoken.
    options, cfg, _ = configure(args)
    check_driver()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = usable_cores()
    ranks = choose_ranks(num_gpus, cores, os.environ.get("NPROC", ""))

    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    print(f"{num_gpus or 'no'} GPU, {cores} CPU core{'s' * (cores > 1)}: track {cfg.track}, ranks: {ranks}, "
          f"threads of each: {threads}", file=sys.stderr)
    _, given = parse_config(args)
    if not options.resume and "seed" not in given:
        print(f"note: without --seed every run has seed {cfg.seed}, and several are one run made again; give "
              "each its own, such as --seed=1", file=sys.stderr)
    own_data = options.resume or "train_files" in given  # they lie somewhere already
    if options.dry_run and not own_data and show_without_data(cfg):
        return 0
    code = 0 if own_data else prepare_data(cfg)
    return code or torchrun(ranks, args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends a data script, too
    sys.exit(run_program(main, sys.argv[1:]))
