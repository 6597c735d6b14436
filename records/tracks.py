"""The rules of each track as data. The tools ask a Track; none of them knows a track by name."""
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Settings of the compiler that can buy a few seconds of run time with half an hour of compilation, which the
# clock does not see: regular expressions, to be searched in code without its comments.
COMPILE_FLAGS = (
    r"_inductor\.config\.(?!coordinate_descent_tuning\b)\w+",
    r"_inductor\s+import\s+config\b",
    r"\bmax[-_]autotune\b",
    r"\btorch\.compile\([^)]{0,300}\b(?:mode|options)\s*=",
)
COORDINATE_DESCENT = r"\bcoordinate_descent_tuning\b"


@dataclass(frozen=True)
class Track:
    name: str
    folder: str  # below records/
    target: float  # mean validation loss to reach, nats per token
    rule: str  # loss test, by its name in records.statistics
    rule_options: dict[str, float]  # its arguments beside losses and target
    alpha: float  # probability allowed to a claim that is wrong
    waived_for: tuple[str, ...]  # kinds of change that need no loss test
    ranked_by: str  # "time" (training seconds) or "steps"
    # step whose loss counts: "last" of each run, or "stated" by the claim, the same in all runs
    claim_step: str
    val_tokens: int  # tokens of the validation set that are evaluated
    # SHA-256 of these tokens, as our logs print it; None where no log of ours has shown it yet
    val_sha256: str | None
    banned_flags: tuple[str, ...]  # regular expressions, for code without comments
    loss_sd: float  # usual standard deviation of the loss between runs, to plan with
    program: str = "train_gpt.py"  # what trains by its rules here
    fixed: dict = field(default_factory=dict)  # settings that it leaves nobody free to change


T_TEST = dict(rule="t_test", rule_options={"alpha": 0.01}, alpha=0.01, waived_for=("systems",),
              ranked_by="time", claim_step="last")
FINEWEB = dict(val_tokens=10_485_760, val_sha256=None)

TRACKS = {track.name: track for track in (
    Track(name="small", folder="track_1_short", target=3.28, loss_sd=0.0013,
          banned_flags=(*COMPILE_FLAGS, COORDINATE_DESCENT), **FINEWEB, **T_TEST),
    Track(name="medium", folder="track_2_medium", target=2.92, loss_sd=0.0013,  # assumed
          banned_flags=COMPILE_FLAGS, **FINEWEB, **T_TEST),
    Track(name="optimization", folder="track_3_optimization", target=3.28, loss_sd=0.0013,
          rule="z_rule", rule_options={"sigma": 0.0013, "needed": 0.004}, alpha=0.001, waived_for=(),
          ranked_by="steps", claim_step="stated", banned_flags=(),
          program="examples/train_simple.py",
          fixed=dict(batch_tokens=524_288, seq_len=1024, vocab_size=50_304, num_layers=12, model_dim=768,
                     head_dim=128), **FINEWEB),
    Track(name="shakespeare", folder="track_0_laptop", target=1.6, loss_sd=0.003, val_tokens=262_144,
          val_sha256="4fbd617fd618716a7bb380482c458de91115192082115620b69c4d2b0364cc3a",
          banned_flags=(*COMPILE_FLAGS, COORDINATE_DESCENT), **T_TEST),
)}


def only(logs: Iterable) -> Track | None:
    """The track that all these logs (records.logs.LogFile) are of, by their settings or by a folder in their
    path; None where they do not say."""
    found = {track.name: track for log in logs for track in TRACKS.values()
             if track.folder in Path(log.path).resolve().parts
             or any(run.config.get("track") == track.name for run in log.runs)}
    return found.popitem()[1] if len(found) == 1 else None
