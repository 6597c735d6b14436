"""Run a candidate and a baseline in turn on this machine, pair by pair, and say by how much they differ.

A is the candidate, B the baseline. Both runs of a pair get the same new seed: {seed} in a command becomes the
seed, and to a command without it --seed=SEED is appended. Which one goes first is drawn by lot, A as often as
B. A command is split into words as by a shell, but there is no shell. It must end with exit code 0 and print,
on a line of its own, the path of the log that it wrote, relative to where ab runs or to a file named in the
command (../other/run.sh writes to ../other/logs).

The folder --out holds all there is: the plan with commands, seeds and order; the logs; what every attempt
printed; the verdict. After an interruption the same command goes on with the runs that are missing. There is
no verdict before the planned number of pairs, and there are no pairs after it: both would turn chance into
findings."""
import contextlib
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data.errors import UsageError
from data.files import written_whole
from records import logs
from records.experiment import PLAN, ROLES, Experiment, Pair, read_experiment
from records.formatting import seconds
from records.logs import LogFile
from tools.children import StopSignals, kill_group

HELP = "run candidate and baseline in turn on this machine, then the paired verdict"
EXAMPLE = "python -m records ab --a './run.sh --muon_lr=0.02' --b ./run.sh --runs 8 --out logs/ab_muon_lr"
PATIENCE = 60  # seconds that a run has to end by itself before it is killed
TAIL = 5  # last lines of a failed run's output to show


def add_arguments(parser):
    parser.add_argument("--a", required=True, metavar="CMD", help="command that runs the candidate")
    parser.add_argument("--b", required=True, metavar="CMD", help="command that runs the baseline")
    parser.add_argument("--runs", required=True, type=int, metavar="N",
                        help="pairs of runs, 2 or more; see plan")
    parser.add_argument("--out", type=Path, default=Path("logs/ab"), metavar="FOLDER",
                        help="folder of plan, logs and output (logs/ab)")
    parser.add_argument("--limit", type=float, default=240, metavar="MINUTES",
                        help="end a run that takes longer (240)")


def run(args) -> int:
    if args.runs < 2 or args.runs > 999:
        raise UsageError(f"--runs: expected 2 to 999 pairs, found {args.runs}; ask plan how many this needs")
    if not args.limit > 0:
        raise UsageError(f"--limit: expected minutes above 0, found {args.limit}; give the longest that a "
                         "run may take")
    for command in (args.a, args.b):
        words(command, 0)

    with StopSignals() as stop, locked(args.out) as lock:
        experiment = begin(args.out, args.a, args.b, args.runs)
        try:
            for number, pair in enumerate(experiment.pairs, 1):
                for arm in pair.order:
                    if find_log(args.out, arm, number) is None:
                        command = getattr(experiment, arm)
                        perform(args.out, arm, number, command, pair.seed, 60 * args.limit, lock, stop)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on with the runs that are missing") from None
    conclude(args.out, experiment)
    return 0


# The plan

def make_experiment(a: str, b: str, runs: int) -> Experiment:
    lot = random.SystemRandom()
    orders = ["ab", "ba"] * (runs // 2) + [lot.choice(["ab", "ba"])] * (runs % 2)
    lot.shuffle(orders)
    seeds = lot.sample(range(1, 2 ** 31), runs)
    return Experiment(a, b, tuple(map(Pair, seeds, orders)))


def begin(out: Path, a: str, b: str, runs: int) -> Experiment:
    """The experiment in this folder, which must be the one asked for; a new one if it is empty."""
    path = out / PLAN
    if not path.exists():
        if any(not file.name.startswith(".") for file in out.iterdir()):
            raise UsageError(f"{out}: expected an empty folder or one that ab began, found other files; "
                             "choose another --out")
        with written_whole(path, "w") as file:
            json.dump(asdict(make_experiment(a, b, runs)), file, indent=1)
    experiment = read_experiment(out)
    if experiment is None:
        raise UsageError(f"{path}: expected the plan of an A/B experiment, found something else; choose "
                         "another --out")

    found = (experiment.a, experiment.b, len(experiment.pairs))
    for name, old, new in zip(("--a", "--b", "--runs"), found, (a, b, runs)):
        if old != new:
            raise UsageError(f"{name}: expected {old!r}, with which {out} was begun, found {new!r}; choose "
                             "another --out to begin another experiment")
    for name in (*ROLES, "output"):
        (out / name).mkdir(exist_ok=True)
    return experiment


@contextlib.contextmanager
def locked(out: Path):
    """Make the folder and hold its lock. Runs inherit it, so that none works on whose ab was killed without
    being noticed."""
    import fcntl  # not on Windows
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise UsageError(f"--out: expected a folder to write to, found {e.strerror} at {out}; choose "
                         "another one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: expected no run at work, found another ab, or a run that outlived its "
                             f"ab; wait for it or end it (fuser {out}/.lock names it)") from None
        except OSError as e:
            print(f"note: {out} cannot be locked ({e.strerror}): see to it that no other ab uses it",
                  file=sys.stderr)
        yield lock


# One run

def words(command: str, seed: int) -> list[str]:
    """The command with its seed, in words."""
    try:
        parts = shlex.split(command)
    except ValueError as e:
        raise UsageError(f"expected a command, found {command!r}: {e}; correct its quotes") from None
    if not parts:
        raise UsageError("expected a command, found none; say what to run, as --a=./run.sh")
    replaced = [part.replace("{seed}", str(seed)) for part in parts]
    return replaced if replaced != parts else [*parts, f"--seed={seed}"]


def perform(out: Path, arm: str, number: int, command: str, seed: int, limit: float, lock,
            stop: StopSignals):
    """Run one command and put its log in place. UsageError if it fails; only its output is then left."""
    argv = words(command, seed)
    before = len(list((out / "output").glob(f"{number:03d}_{arm}_*")))
    output = out / "output" / f"{number:03d}_{arm}_{before + 1}.txt"
    print(f"pair {number}, {arm}, seed {seed}: its output goes to {output}", flush=True)
    started = time.time()
    try:
        code = execute(argv, output, limit, lock, stop)
        path = written_log(argv, output, started)
        failure = f"exit code {code}" if code else what_is_wrong(out, arm, number, seed, path)
    except subprocess.TimeoutExpired:
        failure = f"it still at work after {limit / 60:g} minutes (--limit)"
    except OSError as e:
        raise UsageError(f"--{arm}: expected a command to start, found {argv[0]!r}: {e.strerror}; correct "
                         "it") from None
    if failure:
        tail = output.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()[-TAIL:]
        raise UsageError("\n".join((
            f"pair {number}, {arm}: expected exit code 0 and the log of a complete run, found {failure}; "
            f"correct what is wrong and start the same ab again. {output} ends with:",
            *("  " + line for line in tail))))

    with written_whole(out / arm / f"{number:03d}_{path.name}") as file:
        file.write(path.read_bytes())
    done, = logs.read(path).runs
    print(f"pair {number}, {arm}: loss {done.final_val_loss}, {seconds(done.final_time_ms)} s", flush=True)


def what_is_wrong(out: Path, arm: str, number: int, seed: int, path: Path | None) -> str:
    """Say why the log that a command wrote is not that of the run in its pair; "" where it is."""
    if path is None:
        return "no line with the path of a log that it wrote"
    found = logs.read(path).runs
    if len(found) != 1:
        return f"{len(found)} runs in {path}"
    if not found[0].complete:
        return f"no validation at the last step in {path}"
    if found[0].seed not in (seed, None):
        return f"seed {found[0].seed} in {path} instead of {seed}"
    # With another seed all losses cannot be equal by chance.
    losses = [point.val_loss for point in found[0].val_points]
    for earlier in range(1, number):
        other = find_log(out, arm, earlier)
        if other and len(losses) > 2 and losses == [point.val_loss for point in other.runs[0].val_points]:
            return (f"the very losses of pair {earlier}, as if the command did not use its seed ({{seed}} in "
                    "it says where it goes)")
    return ""


def execute(argv: list[str], output: Path, limit: float, lock, stop: StopSignals) -> int:
    """Return the exit code of a command, whose output goes to a file. limit: in seconds. Nothing that it
    started is left at work."""
    process = None
    try:
        with open(output, "wb") as file, stop.held_back():
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True, pass_fds=[lock.fileno()])
        return process.wait(limit)
    finally:
        if process is not None:
            end(process)


def end(process: subprocess.Popen):
    """End the group of a process, by force where it does not obey in time or ab is told to stop again."""
    try:
        if process.poll() is None:
            kill_group(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        kill_group(process.pid)
        process.wait()


def written_log(argv: list[str], output: Path, started: float) -> Path | None:
    """The log whose path the command printed: the first line that names a file written since the start."""
    folders = [Path.cwd(), *(Path(word).resolve().parent for word in argv if Path(word).is_file())]
    with open(output, encoding="utf-8", errors="replace") as file:
        for line in file:
            for folder in folders if 0 < len(line.strip()) < 4096 else ():
                path = folder / line.strip()
                try:
                    # some file systems keep even seconds
                    if path.is_file() and path.stat().st_mtime > started - 2:
                        return path
                except (OSError, ValueError):
                    pass
    return None


def find_log(out: Path, arm: str, number: int) -> LogFile | None:
    """The log of an arm, "a" or "b", in a pair: it counts from the moment it lies in place."""
    path = next((out / arm).glob(f"{number:03d}_*"), None)
    if path is None:
        return None
    log = logs.read(path)
    if len(log.runs) != 1 or not log.runs[0].complete:
        raise UsageError(f"{path}: expected the log of a complete run, which ab put there, found "
                         f"{len(log.runs)} runs or an incomplete one; remove the file and start the same ab "
                         "again")
    return log


# The verdict

def conclude(out: Path, experiment: Experiment):
    """Write the verdict on all pairs, and print it."""
    from records import rules  # scipy has threads, which must not be there while ab starts runs
    arms = {arm.upper(): [find_log(out, arm, number) for number in range(1, len(experiment.pairs) + 1)]
            for arm in "ab"}
    a, b = map(rules.runs_of, arms.values())
    times = [rules.seconds_of(run.end for run in arm) for arm in (a, b)]
    losses = [[run.final_val_loss for run in arm] for arm in (a, b)]
    lines = [*sentences(times, losses), *rules.doubts(arms)]
    again = len(list((out / "output").iterdir())) - len(a) - len(b)
    if again > 0:
        lines.append(f"Attempts that failed or were interrupted and were made again: {again} (see output/).")

    rows = [f"| {i} | {pair.seed} | {pair.order[0].upper()} | {loss_a} | {loss_b} | {ms_a:.3f} | {ms_b:.3f} |"
            for i, (pair, loss_a, loss_b, ms_a, ms_b) in enumerate(zip(experiment.pairs, *losses, *times), 1)]
    with written_whole(out / "verdict.md", "w") as file:
        file.write("\n".join([
            f"# {len(a)} pairs of runs", "",
            f"    A: {experiment.a}",
            f"    B: {experiment.b}", "",
            *(f"- {line}" for line in lines), "",
            "| pair | seed | first | loss A | loss B | seconds A | seconds B |",
            "|-|-|-|-|-|-|-|",
            *rows, ""]))
    print("\n".join((*lines, f"Written to {out}/verdict.md.")))


def sentences(times: list[list[float]], losses: list[list[float]]):
    """Yield what the paired tests say of A minus B; times are in seconds."""
    from records import statistics
    for name, values, digits, below, above in (("Seconds", times, ".2f", "A is faster", "A is slower"),
                                               ("Loss", losses, ".5f", "A ends lower", "A ends higher")):
        if values[0] == values[1]:
            yield f"{name}: the same in every pair."
            continue
        found = statistics.paired(*values)
        if found.why:
            yield f"{name}: cannot be judged: {found.why}."
            continue
        n = len(values[0])
        p = min(found.p, 1 - found.p)
        _, sd = statistics.mean_sd([x - y for x, y in zip(*values)])
        word = below if found.p < 0.5 else above
        yield (f"{name}: {word if p < statistics.ALPHA else 'no difference shown'}. A minus B is "
               f"{found:{'+' + digits}}, one-sided p = {p:.2g}, needed < {statistics.ALPHA}. {n} pairs with "
               f"this spread show a difference of {statistics.detectable(n, sd):{digits}} in 8 cases of 10.")
    yield f"Speed-up: {statistics.ratio(statistics.paired, *times[::-1]):.4f}."
