"""The results of bench.muon as Markdown."""
import statistics

from bench.muon.questions import QUESTIONS
from bench.page import grid


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.{digits}g}"


def median_and_range(seconds: list[float] | None) -> str:
    """Return median, least and most in milliseconds."""
    if not seconds:
        return "-"
    ms = [1000 * s for s in seconds]
    return f"{statistics.median(ms):,.1f} ({min(ms):,.1f}-{max(ms):,.1f})"


def reasons(rows: list[dict], *keys: str) -> str:
    """Return a line for each row that has no result, with these keys in front."""
    failed = [row for row in rows if row.get("why")]
    return "\n".join(f"- {', '.join(str(row[key]) for key in keys)}: {row['why']}" for row in failed)


def distinct(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def by_subject(rows: list[dict]) -> dict[str, dict]:
    """Return the first row of each subject."""
    return {row["subject"]: row for row in reversed(rows)}


def summary(result: dict) -> str:
    """Return a row per subject: times of the first set of shapes, and the gist of the other parts."""
    rows = {part: result.get(part, []) for part in ("times", "costs", "accuracy", "questions")}
    timed, costs, digits = (by_subject(rows[part]) for part in ("times", "costs", "accuracy"))
    theirs = timed.get("torch.optim.Muon", {}).get("seconds")
    lines = []
    for name in distinct([row for part in rows.values() for row in part], "subject"):
        seconds = timed.get(name, {}).get("seconds")
        cost = costs.get(name, {})
        gflop = cost["flops"] / 1e9 if "flops" in cost else None
        ratio = statistics.median(theirs) / statistics.median(seconds) if theirs and seconds else None
        verdicts = [row["outcome"] for row in rows["questions"] if row["subject"] == name]
        posed = len(verdicts) - verdicts.count("-")
        lines.append([
            name, median_and_range(seconds), len(seconds or ()), number(ratio), number(gflop, 4),
            number(cost.get("kept")), number(cost.get("peak")), number(digits.get(name, {}).get("error"), 2),
            f"{verdicts.count('pass')} of {posed}" if verdicts else "-"])
    first = rows["times"][0]["shapes"] if rows["times"] else "nothing yet"
    header = ["implementation", "ms/step, median (min-max)", "n", "speed against torch.optim.Muon", "GFLOP",
              "bytes kept", "bytes more during a step", "distance to the exact result",
              "questions passed of those posed"]
    text = f"Step times are of {first}; work and memory of one block; bytes are per element of the weights."
    return f"{text}\n\n{grid(header, lines)}"


def times_table(rows: list[dict]) -> str:
    columns = distinct(rows, "shapes")
    cells = {}
    for row in rows:
        refused = "refused" if row.get("why", "").startswith("Refused") else "fails"
        cells[row["subject"], row["shapes"]] = median_and_range(row["seconds"]) if row["seconds"] else refused
    lines = []
    for name in distinct(rows, "subject"):
        lines.append([name, *(cells.get((name, shapes), "-") for shapes in columns)])
    header = ["ms/step, median (min-max)", *columns]
    return f"{grid(header, lines)}\n\n{reasons(rows, 'subject', 'shapes')}"


def worlds_table(rows: list[dict]) -> str:
    header = ["implementation", "ranks", "GFLOP of the busiest", "balance", "MB sent per rank", "model",
              "deviation", "bytes kept", "bytes more during a step"]
    lines = []
    for row in rows:
        cells = ["fails", *"------"]
        if "why" not in row:
            sent, model = row["sent"] / 1e6, row.get("model", 0) / 1e6
            cells = [f"{row['flops'] / 1e9:,.1f}", f"{row['balance']:.3f}", f"{sent:,.1f}"]
            cells += [f"{model:,.1f}", f"{sent / model - 1:+.2%}"] if model else ["-", "-"]
            cells += [number(row["kept"]), number(row["peak"])]
        lines.append([row["subject"], row["world"], *cells])
    return f"{grid(header, lines)}\n\n{reasons(rows, 'subject', 'world')}"


def accuracy_table(rows: list[dict]) -> str:
    found = [row for row in rows if "why" not in row]
    sizes = [f"gradient times 2^{exponent}" for exponent in (found[0]["by_size"] if found else ())]
    header = ["implementation", "coefficients", "distance to U V^T", "singular values",
              "distance to the exact result", *sizes]
    lines = []
    for row in found:
        band = f"{row['low']:.3f}-{row['high']:.3f}"
        changes = [number(x, 2) for x in row["by_size"].values()]
        errors = [number(row["polar"]), band, number(row["error"], 2)]
        lines.append([row["subject"], row["coefficients"], *errors, *changes])
    return f"{grid(header, lines)}\n\n{reasons(rows, 'subject')}"


def questions_table(rows: list[dict]) -> str:
    subjects = distinct(rows, "subject")
    cells = {(row["number"], row["subject"]): row["outcome"].replace("fail", "**fail**") for row in rows}
    lines = []
    for key in distinct(rows, "number"):
        lines.append([key, QUESTIONS[key][0], *(cells[key, subject] for subject in subjects)])
    failed = [row for row in rows if row["outcome"] != "-"]
    return f"{grid(['', 'question', *subjects], lines)}\n\n{reasons(failed, 'number', 'subject')}"


SECTIONS = {  # part -> (heading, explanation, table)
    "times": ("Step time", "", times_table),
    "hidden": (
        "Step time where the processor has no bf16 units",
        "The same machine with them hidden from torch. Ours notices, and takes fp32; its row of bf16 says "
        "what that saves.",
        times_table),
    "worlds": (
        "Ranks",
        "Real gloo processes; matrices with shorter sides, figures for full size, all 12 blocks. Balance: "
        "work of one process / ranks / work of the busiest. Model: a ring that all elements pass once.",
        worlds_table),
    "accuracy": (
        "Accuracy",
        "One step on a 192 x 576 matrix with singular values from 1 to 0.01, against fp64; relative, in the "
        "Frobenius norm. Last columns: how much the result changes with the size of the gradient.",
        accuracy_table),
    "questions": (
        "Behaviour",
        "refused: the parameters are turned away when the optimizer is built. -: cannot be asked.",
        questions_table),
}


def tables(result: dict) -> str:
    """Return all results as Markdown."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}".strip() for name, version in result["versions"].items())
    text = [
        f"{machine['device']}; torch {machine['torch']}, Python {machine['python']}; {machine['date']}; "
        f"{machine['threads']} threads for step times, one per process elsewhere; n = {machine['reps']} "
        f"unless given. {versions}."]
    text += [f"Missing: {name} ({why})." for name, why in result["missing"].items()]
    text += [summary(result)]
    for part, (title, explanation, render) in SECTIONS.items():
        if result.get(part):
            text += [f"### {title}", explanation, render(result[part]).strip()]
    return "\n\n".join(filter(None, text)) + "\n"
