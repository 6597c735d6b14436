"""bench.archive on a small archive of synthetic logs: what agrees is counted, what differs is shown."""
import csv

from tests.helpers.synthetic import make

from bench import archive

COLUMNS = ["run_id", "log_path", *archive.FIELDS]


def test_a_small_archive(tmp_path, capsys):
    rows, root = [], tmp_path / "records"
    (root / "track").mkdir(parents=True)
    for variant in ("A", "D2", "T2m", "X"):
        made = make(variant)
        made.write(root / "track" / f"{variant}.txt")
        for k, run in enumerate(made.runs, start=1):
            step, loss, ms = run["val_points"][-1]
            facts = [loss, ms, step, run["total_steps"], len(run["val_points"]), *map(run.get, ("torch", "gpu_name", "num_gpus",
                                                                                              "world_size"))]
            name = variant if len(made.runs) == 1 else f"{variant}#{k:02}"
            rows.append([name, f"records/track/{variant}.txt", *("" if fact is None else fact for fact in facts)])
    rows[0][2] = 9.9  # the loss of A
    rows.append(["T2m#04", "records/track/T2m.txt", *rows[-1][2:]])  # there are but three
    with open(tmp_path / "finals.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    assert archive.main([str(root), "--finals", str(tmp_path / "finals.csv")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 files, ") and ", 5 runs, " in out and "| T2m | 1 |" in out
    assert "| final_val_loss | 4 |" in out and "| torch_version | 5 |" in out and "agrees, of 6 rows" in out
    differences = out.split("for example |\n|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(differences) == 2 and differences[0].startswith("| final_val_loss | 9.9 | ")
    assert differences[1] == "| run | present | absent | 1 | `records/track/T2m.txt` |"
    assert out.endswith("| `records/track/X.txt` | this is no log of a training run |\n")


def test_errors(tmp_path, capsys):
    assert archive.main([str(tmp_path / "no")]) == 2 and "nothing there; check the path" in capsys.readouterr().err
    assert archive.main([str(tmp_path), "--finals", str(tmp_path / "no.csv")]) == 2 and "no.csv" in capsys.readouterr().err
