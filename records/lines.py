"""What a log says beyond its validations: from what it ran, and whether its step lines agree with each other.

A step line holds a step, a time and their quotient, and the lines stand in an order, so a figure that was
typed in, or moved here from another log, rarely fits its neighbours: of the 2.2 million training lines of the
public logs, not one falls out."""
import re
from dataclasses import dataclass

import numpy as np

from records.logs import SEPARATOR, LogFile

# bytes; the lines of a longer log are not judged (the longest of the public archive has 1.1 million)
SIZE_LIMIT = 1 << 24
PAIR = rb"[a-z_]{1,40}:\S{1,40}"
STEP = re.compile(
    rb"^step:(\d{1,12})/\d{1,12} ((?:" + PAIR + rb" ){0,12}?)train_time:(\d{1,15}(?:\.\d{1,9})?)(m?s) "
    rb"step_avg:(\d{1,12}\.\d{1,9}|nan)ms(?: " + PAIR + rb"){0,12}\s*$", re.M)
RESUMED = re.compile(rb"^resumed: ", re.M)
COMMIT = re.compile(rb"^commit: ([0-9a-f]{40}(?: with changes)?)$", re.M)
TRAINING_DATA = re.compile(rb"^training data: .{1,200}, fingerprint ([0-9a-f]{8,64})$", re.M)
VALIDATION_DATA = re.compile(rb"^validation data: first \d{1,15} tokens, sha256 ([0-9a-f]{64})$", re.M)
# steps that a GPU may still have to do when a training line is printed (at most 3.06 in the public archive)
QUEUE = 5


@dataclass(frozen=True)
class Details:
    resumed: bool = False
    commit: str = ""
    training_data: str | None = None  # fingerprint of the shards
    validation_data: str | None = None  # SHA-256 of the tokens that are validated
    num_training: int = 0  # training lines
    # (step, ms) of training lines; of every eighth step where there are very many
    clock: frozenset = frozenset()
    contradictions: tuple[str, ...] = ()  # what does not fit among the step lines, by run


def details_of(log: LogFile) -> Details:
    """The details of a log; its file is read again."""
    if log.size > SIZE_LIMIT:
        return Details(contradictions=(f"expected at most {SIZE_LIMIT:,} bytes, found {log.size:,}: its "
                                       "lines are not judged",))
    text = log.path.read_bytes().replace(b"\r\n", b"\n")
    separator = f"\n{SEPARATOR}\n".encode()
    head, _, body = text.rpartition(separator)
    header = head.rpartition(separator)[2] if any(run.config for run in log.runs) else b""
    lines = np.array([(int(step), b"val_loss:" in keys, float(time) * (1000 if unit == b"s" else 1),
                       float(average))
                      for step, keys, time, unit, average in STEP.findall(body)]).reshape(-1, 4)
    on_cpu = any(run.num_gpus == 0 for run in log.runs)  # a CPU has no queue
    starts = np.flatnonzero(np.diff(lines[:, 0]) < 0) + 1
    found = [text for run in np.split(lines, starts)
             for text in contradictions(run, 0.1 if on_cpu else QUEUE)]
    training = lines[lines[:, 1] == 0][:, [0, 2]]
    every = 8 if len(training) > 400 else 1
    return Details(
        resumed=bool(RESUMED.search(header)),
        commit=found_in(header, COMMIT) or "",
        training_data=found_in(header, TRAINING_DATA),
        validation_data=found_in(header, VALIDATION_DATA),
        num_training=len(training),
        clock=frozenset(map(tuple, training[training[:, 0] % every == 0].tolist())),
        contradictions=tuple(found),
    )


def found_in(header: bytes, pattern: re.Pattern) -> str | None:
    match = pattern.search(header)
    return match[1].decode() if match else None


def contradictions(lines: np.ndarray, queue: float):
    """What does not fit among the step lines of one run: rows of step, whether it is a validation, ms,
    average ms. queue: steps that may lie between the clock of a training line and that of the validation
    after it."""
    step, is_validation, ms, average = lines.T
    training, validation = lines[is_validation == 0], lines[is_validation == 1]
    # Early trainers started the clock anew after 10 untimed steps.
    for i in np.flatnonzero((np.diff(ms) < 0) & (step[1:] != 11)):
        yield (f"the time falls from {ms[i]:g} ms at step {step[i]:.0f} to {ms[i + 1]:g} ms at step "
               f"{step[i + 1]:.0f}")
    for kind, rows in (("training", training), ("validation", validation)):
        yield from wrong_averages(kind, *rows.T[[0, 2, 3]])
    if len(training):
        steps = training[:, 0]
        for i in np.flatnonzero(np.diff(steps, prepend=0) != 1):
            expected = steps[i - 1] + 1 if i else 1
            yield f"expected a training line at step {expected:.0f}, found the next at step {steps[i]:.0f}"
        time_at = dict(training[:, [0, 2]].tolist())
        for step, _, ms, average in validation:
            if step and step not in time_at:
                yield f"expected a training line at step {step:.0f}, found a validation only"
            elif step > 20 and ms - time_at[step] > queue * ms / step:
                yield (f"the validation at step {step:.0f} is {ms - time_at[step]:g} ms after the training "
                       "line of that step")


def wrong_averages(kind: str, step, ms, average):
    """Averages that are not time / steps under the one convention of the public logs that suits the
    run best."""
    conventions = (
        (ms, np.maximum(step, 1)),  # from the start
        (ms, np.maximum(step - 10, 1)),  # without 10 untimed steps
        (np.diff(ms, prepend=0), np.maximum(np.diff(step, prepend=0), 1)),  # since the line before
    )
    # Times are printed to 1 ms, rounded or cut off, averages to 0.01 ms.
    wrong = [np.abs(average - time / steps) > 0.0051 + 1 / steps for time,
             steps in conventions]  # False where it is nan
    best = min(range(3), key=lambda k: wrong[k].sum())
    time, steps = conventions[best]
    for i in np.flatnonzero(wrong[best]):
        yield (f"the {kind} line of step {step[i]:.0f} says {average[i]:.2f} ms a step, but its time, "
               f"{ms[i]:g} ms, makes it {time[i] / steps[i]:.2f}")
