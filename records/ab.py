"""Run a candidate and a baseline in turn on this machine, pair by pair, and say by how much they differ.

A is the candidate, B the baseline. Both runs of a pair get the same new seed: {seed} in a command becomes the seed, and to a
command without it --seed=SEED is appended. Which one goes first is drawn by lot, A as often as B. A command is split into
words as by a shell, but there is no shell. It must end with exit code 0 and print, on a line of its own, the path of the log
that it wrote, relative to where ab runs or to a file named in the command (../other/run.sh writes to ../other/logs).

The folder --out holds all there is: the plan with commands, seeds and order; the logs; what every attempt printed; the
verdict. After an interruption the same command goes on with the runs that are missing. There is no verdict before the
planned number of pairs, and no more pairs can be added after it: both would turn chance into findings."""
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from records import logs
from records.errors import RecordError
from records.stats import FACTS, listed, plain, printable

HELP = "run candidate and baseline in turn on this machine, then the paired verdict"
EXAMPLE = "python -m records ab --a './run.sh --muon_lr=0.02' --b ./run.sh --runs 8 --out logs/ab_muon_lr"
PATIENCE = 60  # seconds that a run has to end by itself before it is killed
TAIL = 5  # last lines of a failed run's output to show


def write(path: Path, text: str):
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def make_plan(a: str, b: str, runs: int) -> dict:
    lot = random.SystemRandom()
    orders = ["ab", "ba"] * (runs // 2) + [lot.choice(["ab", "ba"])] * (runs % 2)
    lot.shuffle(orders)
    seeds = lot.sample(range(1, 2 ** 31), runs)
    return dict(a=a, b=b, pairs=[dict(seed=seed, order=order) for seed, order in zip(seeds, orders)])


def load_plan(out: Path, a: str, b: str, runs: int) -> dict:
    """The plan in this folder, which must be of the same experiment; a new one if there is none."""
    path = out / "plan.json"
    if not path.exists():
        if any(file.name not in (".lock", "plan.json.partial") for file in out.iterdir()):
            raise RecordError(f"{out}: expected an empty folder or one that ab began, found other files; choose another --out")
        write(path, json.dumps(make_plan(a, b, runs), indent=1))
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        before = (plan["a"], plan["b"], len(plan["pairs"]))
        [(int(pair["seed"]), pair["order"].index("a"), pair["order"].index("b")) for pair in plan["pairs"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise RecordError(f"{path}: expected the plan of an A/B experiment, found something else; choose another --out") from None
    for name, old, new in zip(("--a", "--b", "--runs"), before, (a, b, runs)):
        if old != new:
            raise RecordError(f"{name}: expected {old!r}, with which {out} was begun, found {new!r}; choose another --out to "
                              "begin another experiment")
    return plan


def words(command: str, seed: int) -> list[str]:
    try:
        parts = shlex.split(command)
    except ValueError as e:
        raise RecordError(f"expected a command, found {command!r}: {e}; correct its quotes") from None
    if not parts:
        raise RecordError("expected a command, found none; say what to run, as --a=./run.sh")
    replaced = [part.replace("{seed}", str(seed)) for part in parts]
    return replaced if replaced != parts else [*parts, f"--seed={seed}"]


def execute(argv: list[str], output: Path, limit: float, lock) -> int:
    """Exit code of the command, whose output goes to a file; limit in seconds. It inherits the lock, so that no other ab
    starts while a run is still at work whose ab was killed."""
    with open(output, "wb") as file:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   pass_fds=[lock.fileno()])
    try:
        return process.wait(limit)
    finally:
        if process.poll() is None:  # too slow, or ab itself is told to stop
            end(process)


def end(process: subprocess.Popen):
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def written_log(argv: list[str], output: Path, started: float) -> Path | None:
    """The log whose path the command printed: the first line that names a file written since the start."""
    folders = [Path.cwd(), *(Path(word).resolve().parent for word in argv if Path(word).is_file())]
    with open(output, encoding="utf-8", errors="replace") as file:
        for line in file:
            for folder in folders if 0 < len(line.strip()) < 4096 else ():
                path = folder / line.strip()
                try:
                    if path.is_file() and path.stat().st_mtime > started - 2:  # some file systems keep even seconds
                        return path
                except (OSError, ValueError):
                    pass
    return None


def find_run(out: Path, arm: str, number: int) -> logs.Run | None:
    """The finished run of an arm, "a" or "b", in a pair: it counts from the moment its log lies in place."""
    paths = [path for path in (out / arm).glob(f"{number:03d}_*") if path.suffix != ".partial"]
    if not paths:
        return None
    runs = logs.read(paths[0]).runs
    if len(runs) != 1 or not runs[0].complete:
        raise RecordError(f"{paths[0]}: expected the log of a complete run, which ab put there, found {len(runs)} runs or an "
                          "incomplete one; remove the file and start the same ab again")
    return runs[0]


def perform(out: Path, arm: str, number: int, command: str, seed: int, limit: float, lock):
    """Run one command and put its log in place. RecordError if it fails, with nothing left but its output."""
    argv, attempt = words(command, seed), len(list((out / "output").glob(f"{number:03d}_{arm}_*"))) + 1
    output, started = out / "output" / f"{number:03d}_{arm}_{attempt}.txt", time.time()
    print(f"pair {number}, {arm}, seed {seed}: its output goes to {output}", flush=True)

    def failure(found: str) -> RecordError:
        tail = output.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()[-TAIL:] if output.exists() else []
        tail = ["  " + printable(line) for line in tail]
        return RecordError("\n".join((f"pair {number}, {arm}: expected exit code 0 and the log of a complete run, found {found}; "
                                      f"correct what is wrong and start the same ab again. {output} ends with:", *tail)))

    try:
        code = execute(argv, output, limit, lock)
    except subprocess.TimeoutExpired:
        raise failure(f"it still at work after {limit / 60:g} minutes (--limit)") from None
    except OSError as e:
        raise RecordError(f"--{arm}: expected a command to start, found {argv[0]!r}: {e.strerror}; correct it") from None
    if code:
        raise failure(f"exit code {code}")
    path = written_log(argv, output, started)
    if path is None:
        raise failure("no line with the path of a log that it wrote")
    found = logs.read(path).runs
    if len(found) != 1 or not found[0].complete:
        raise failure(f"{len(found)} runs in {path}" if len(found) != 1 else f"no validation at the last step in {path}")
    if found[0].seed not in (seed, None):
        raise failure(f"seed {found[0].seed} in {path} instead of {seed}")
    place = out / arm / f"{number:03d}_{path.name}"
    partial = place.with_name(place.name + ".partial")
    shutil.copyfile(path, partial)
    os.replace(partial, place)
    print(f"pair {number}, {arm}: loss {found[0].final_val_loss}, {(found[0].final_time_ms or 0) / 1000:.2f} s", flush=True)


def judge(a: list[logs.Run], b: list[logs.Run]) -> dict:
    """The paired tests of A minus B; speed_up: mean of B's time over A's, by the logarithms."""
    from records import statistics
    losses = statistics.paired([run.final_val_loss for run in a], [run.final_val_loss for run in b])
    times = [[math.nan if run.final_time_ms is None else run.final_time_ms / 1000 for run in arm] for arm in (a, b)]
    logs_of_ratios = [math.log(y / x) if x > 0 and y > 0 else math.nan for x, y in zip(*times)]
    interval = statistics.mean_interval(logs_of_ratios)
    speed_up = statistics.Interval(*(None if value is None else math.exp(value) for value in
                                     (interval.estimate, interval.low, interval.high)), interval.confidence, interval.why)
    return dict(seconds=statistics.paired(*times), speed_up=speed_up, loss=losses)


def sentences(verdict: dict):
    for name, digits, below, above in (("seconds", ".2f", "A is faster", "A is slower"),
                                       ("loss", ".5f", "A ends lower", "A ends higher")):
        test = verdict[name]
        if test.sd == 0 == test.difference.estimate:
            yield f"{name.capitalize()}: the same in every pair."
            continue
        if test.why:
            yield f"{name.capitalize()}: cannot be judged: {test.why}."
            continue
        p = min(test.p_below, test.p_above)
        word = "no difference shown" if p >= test.alpha else below if test.p_below < test.alpha else above
        yield (f"{name.capitalize()}: {word}. A minus B is {test.difference:{'+' + digits}}, one-sided p = {p:.2g}, needed < "
               f"{test.alpha}. {test.n} pairs with this spread show a difference of {test.floor:{digits}} in 8 cases of 10.")
    yield f"Speed-up: {verdict['speed_up']:.4f}."


def notes(out: Path, a: list[logs.Run], b: list[logs.Run]):
    for field, name in FACTS.items():
        values = [{str(getattr(run, field)) for run in arm} for arm in (a, b)]
        if len(values[0] | values[1]) > 1:
            yield f"Runs differ in {name}: A {listed(sorted(values[0]))}; B {listed(sorted(values[1]))}."
    if any(run.seed is None for run in (*a, *b)):
        yield "Some logs name no seed, so that nobody can tell whether it was used."
    attempts = len(list((out / "output").iterdir()))
    if attempts > len(a) + len(b):
        yield f"Attempts that failed or were interrupted and were made again: {attempts - len(a) - len(b)} (see output/)."


def markdown(plan: dict, a: list[logs.Run], b: list[logs.Run], lines: list[str]) -> str:
    rows = "".join(f"| {i} | {pair['seed']} | {pair['order'][0].upper()} | {x.final_val_loss} | {y.final_val_loss} "
                   f"| {(x.final_time_ms or 0) / 1000:.3f} | {(y.final_time_ms or 0) / 1000:.3f} |\n"
                   for i, (pair, x, y) in enumerate(zip(plan["pairs"], a, b), 1))
    return (f"# {len(a)} pairs of runs\n\n    A: {plan['a']}\n    B: {plan['b']}\n\n" + "".join(f"- {line}\n" for line in lines)
            + "\n| pair | seed | first | loss A | loss B | seconds A | seconds B |\n|-|-|-|-|-|-|-|\n" + rows)


def add_arguments(parser):
    parser.add_argument("--a", required=True, metavar="CMD", help="command that runs the candidate")
    parser.add_argument("--b", required=True, metavar="CMD", help="command that runs the baseline")
    parser.add_argument("--runs", required=True, type=int, metavar="N", help="pairs of runs, 2 or more; see plan")
    parser.add_argument("--out", type=Path, default=Path("logs/ab"), metavar="FOLDER", help="where all of it goes (logs/ab)")
    parser.add_argument("--limit", type=float, default=240, metavar="MINUTES", help="end a run that takes longer (240)")


def run(args) -> int:
    import fcntl  # not on Windows
    if args.runs < 2 or args.runs > 999:
        raise RecordError(f"--runs: expected 2 to 999 pairs, found {args.runs}; ask plan how many this needs")
    if not args.limit > 0:
        raise RecordError(f"--limit: expected minutes above 0, found {args.limit}; give the longest that a run may take")
    for command in (args.a, args.b):
        words(command, 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the run at work, as Ctrl-C does
    out = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise RecordError(f"--out: expected a folder to write to, found {e.strerror} at {out}; choose another one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(f"{out}: expected no run at work, found another ab, or a run that outlived its ab; wait for it or "
                              f"end it (fuser {out}/.lock names it)") from None
        plan = load_plan(out, args.a, args.b, args.runs)
        for name in ("a", "b", "output"):
            (out / name).mkdir(exist_ok=True)
        try:
            for number, pair in enumerate(plan["pairs"], 1):
                for arm in pair["order"]:
                    if find_run(out, arm, number) is None:
                        perform(out, arm, number, plan[arm], pair["seed"], 60 * args.limit, lock)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
            raise
    a, b = ([find_run(out, arm, number) for number in range(1, args.runs + 1)] for arm in "ab")
    verdict = judge(a, b)
    lines = [*sentences(verdict), *notes(out, a, b)]
    write(out / "verdict.json", json.dumps(plain(dict(plan=plan, **verdict, notes=lines)), indent=1))
    write(out / "verdict.md", markdown(plan, a, b, lines))
    print("\n".join((*lines, f"Written to {out}/verdict.md and .json.")))
    return 0
