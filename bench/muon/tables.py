"""From the results of bench.muon to Markdown."""
import statistics

from bench.muon.questions import QUESTIONS


def table(header: list, rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.{digits}g}"


def spread(seconds: list[float]) -> str:
    """Return median, least and most in milliseconds."""
    ms = [1000 * s for s in seconds]
    return f"{statistics.median(ms):,.1f} ({min(ms):,.1f}-{max(ms):,.1f})" if ms else "-"


def reasons(rows: list[dict], *keys: str) -> str:
    return "\n".join(f"- {', '.join(str(row[key]) for key in keys)}: {row['why']}" for row in rows if row.get("why"))


def names(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def summary(result: dict) -> str:
    """Return a row per subject: times of the first set of shapes, and the gist of the other parts."""
    timed, cost, digits = ({row["subject"]: row for row in reversed(result.get(part, []))}
                           for part in ("times", "costs", "accuracy"))
    theirs = timed.get("torch.optim.Muon", {}).get("seconds")
    rows = []
    for name in dict.fromkeys([*reversed(timed), *reversed(cost), *names(result.get("questions", []), "subject")]):
        seconds = timed.get(name, {}).get("seconds", [])
        ratio = statistics.median(theirs) / statistics.median(seconds) if theirs and seconds else None
        verdicts = [row["outcome"] for row in result.get("questions", []) if row["subject"] == name]
        posed = len(verdicts) - verdicts.count("-")
        c = cost.get(name, {})
        rows.append([
            name, spread(seconds), len(seconds), "-" if ratio is None else f"{ratio:.2f}",
            f"{c['flops'] / 1e9:.1f}" if "flops" in c else "-", number(c.get("kept")), number(c.get("peak")),
            number(digits.get(name, {}).get("error"), 2), f"{verdicts.count('pass')} of {posed}" if verdicts else "-"])
    first = result["times"][0]["shapes"] if result.get("times") else "nothing yet"
    return f"Step times are of {first}; work and memory of one block; bytes are per element of the weights.\n\n" + table(
        ["implementation", "ms/step, median (min-max)", "n", "speed against torch.optim.Muon", "GFLOP", "bytes kept",
         "bytes more during a step", "distance to the exact result", "questions passed of those posed"], rows)


def times_table(rows: list[dict]) -> str:
    def cell(subject, shapes):
        for row in rows:
            if (row["subject"], row["shapes"]) == (subject, shapes):
                refused = "refused" if row.get("why", "").startswith("Refused") else "fails"
                return spread(row["seconds"]) if row["seconds"] else refused
        return "-"
    columns = names(rows, "shapes")
    lines = [[subject, *(cell(subject, shapes) for shapes in columns)] for subject in names(rows, "subject")]
    return table(["ms/step, median (min-max)", *columns], lines) + "\n\n" + reasons(rows, "subject", "shapes")


def worlds_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = ["fails", *"------"]
        if "why" not in row:
            model = row.get("model")
            cells = [f"{row['flops'] / 1e9:,.1f}", f"{row['balance']:.3f}", f"{row['sent'] / 1e6:,.1f}",
                     f"{model / 1e6:,.1f}" if model else "-", f"{row['sent'] / model - 1:+.2%}" if model else "-",
                     number(row["kept"]), number(row["peak"])]
        lines.append([row["subject"], row["world"], *cells])
    return table(["implementation", "ranks", "GFLOP of the busiest", "balance", "MB sent per rank", "model", "deviation",
                  "bytes kept", "bytes more during a step"], lines) + "\n\n" + reasons(rows, "subject", "world")


def accuracy_table(rows: list[dict]) -> str:
    found = [row for row in rows if "why" not in row]
    lines = [[row["subject"], row["coefficients"], number(row["polar"]), f"{row['low']:.3f}-{row['high']:.3f}",
              number(row["error"], 2), *(number(x, 2) for x in row["by_size"].values())] for row in found]
    sizes = [f"gradient times 2^{exponent}" for exponent in (found[0]["by_size"] if found else ())]
    return table(["implementation", "coefficients", "distance to U V^T", "singular values", "distance to the exact result",
                  *sizes], lines) + "\n\n" + reasons(rows, "subject")


def questions_table(rows: list[dict]) -> str:
    subjects = names(rows, "subject")
    cells = {(row["number"], row["subject"]): row["outcome"].replace("fail", "**fail**") for row in rows}
    lines = [[key, QUESTIONS[key][0], *(cells[key, subject] for subject in subjects)] for key in names(rows, "number")]
    failed = [row for row in rows if row["outcome"] != "-"]
    return table(["", "question", *subjects], lines) + "\n\n" + reasons(failed, "number", "subject")


SECTIONS = {  # part -> (heading, explanation, table)
    "times": ("Step time", "", times_table),
    "hidden": ("Step time where the processor has no bf16 units", "The same machine with them hidden from torch.", times_table),
    "worlds": ("Ranks", "Real gloo processes; matrices with shorter sides, figures for full size, all 12 blocks. Balance: "
               "work of one process / ranks / work of the busiest. Model: a ring through which every element passes once.",
               worlds_table),
    "accuracy": ("Accuracy", "One step on a 192 x 576 matrix with singular values from 1 to 0.01, against fp64; relative, in "
                 "the Frobenius norm. Last columns: how much the result changes with the size of the gradient.",
                 accuracy_table),
    "questions": ("Behaviour", "refused: the parameters are turned away when the optimizer is built. -: cannot be asked.",
                  questions_table),
}


def tables(result: dict) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}".strip() for name, version in result["versions"].items())
    text = [f"{machine['device']}; torch {machine['torch']}, Python {machine['python']}; {machine['date']}; "
            f"{machine['threads']} threads for step times, one per process elsewhere; n = {machine['reps']} unless given. "
            f"{versions}.", *(f"Missing: {name} ({why})." for name, why in result["missing"].items()), summary(result)]
    for part, (title, explanation, render) in SECTIONS.items():
        if result.get(part):
            text += [f"### {title}", *([explanation] if explanation else []), render(result[part]).strip()]
    return "\n\n".join(text) + "\n"
