"""Print text from a checkpoint of train_gpt.py (--save_final or --save_every), on a GPU or a CPU.

    python -m tools.sample logs/UUID/state_step000400.pt --prompt "ROMEO. " --tokens 500

Every token is computed from all those that it may depend on directly: plain, and fast enough to read along.
"""
import argparse
import dataclasses
import sys

from train_gpt import GPT, Config  # first: it sets what OpenMP must know before torch is imported

import torch

from data.encoding import encoding_for
from data.errors import CommandLine, UsageError, run_program
from engine.checkpoint import read_checkpoint
from engine.host_table import HostTable
from engine.kernels import Kernels
from engine.sampling import next_log_probs, sample_text


def load_model(path: str, device: torch.device) -> tuple[GPT, int]:
    """Return the model of a checkpoint, in fp32, and its step. Raises UsageError."""
    state = read_checkpoint(path, Config)
    try:
        with torch.device(device):  # there may be no memory for the size that a file claims
            model = GPT(Config(**state["config"]), dataclasses.replace(Kernels.plain(), device=device))
        weights = {name: w.float() if w.is_floating_point() else w for name, w in state["model"].items()}
        model.load_state_dict(weights)
        if model.cfg.ngram_rows:
            model.ngrams = HostTable(model.cfg, device, torch.float32)
            model.ngrams.load_full_state(state["ngrams"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: expected the weights of its own settings, found others ({found}); use "
                         "another checkpoint") from None
    return model.eval(), state["step"]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the arguments. Raises UsageError for a number out of range and for a prompt that is no text."""
    parser = CommandLine(__doc__, "python -m tools.sample")
    add = parser.add_argument
    add("checkpoint", help="file written by --save_final or --save_every")
    add("--prompt", default="", metavar="TEXT", help="start of a document (default: none)")
    add("--tokens", type=int, default=500, metavar="N", help="most tokens to add (default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all (default)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the draws (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("tokens", "temperature", "top_k", "seed"):
        value = getattr(args, name)
        if not 0 <= value < 2**63:  # also refuses nan
            raise UsageError(f"--{name}: expected zero or more, found {value}; change it")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        byte = ord(args.prompt[error.start]) & 0xFF
        raise UsageError(f"--prompt: expected UTF-8 text, found byte 0x{byte:02x}; correct it") from None
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    model, step = load_model(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    encoding = encoding_for(model.cfg.bos_id)
    print(args.prompt, end="", flush=True)
    draws = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    for text in sample_text(next_log_probs(model, step), encoding, args.prompt, args.tokens, **draws):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "sample.py"))
