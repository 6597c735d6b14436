"""Print text from a checkpoint of train_gpt.py (one written by --save_final or --save_every), on a GPU or a CPU.

    python sample.py logs/UUID/state_step000400.pt --prompt "ROMEO. " --tokens 500

Every token is computed from all those that it may depend on directly: plain, and fast enough to read along.
"""
import argparse
import codecs
import sys

import torch

from data.fetch import FetchError
from data.loader import Docs
from engine.attention import BACKENDS
from data.errors import UsageError
from engine.checkpoint import read_checkpoint
from train_gpt import GPT, Config, make_context, softmax_logits


class Bytes:
    """The vocabulary of byte shards, with the methods of a tiktoken encoding that are needed here."""
    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token])


def vocabulary(cfg: Config):
    if cfg.bos_id == 256:
        return Bytes()
    from data.fineweb import gpt2_encoding
    return gpt2_encoding()


def load(path: str, device: torch.device) -> tuple[GPT, int]:
    """The model of a checkpoint, and its step."""
    state = read_checkpoint(path, Config)
    with torch.device(device):
        model = GPT(Config(**state["config"]), BACKENDS["masked"][1])
    try:
        model.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in state["model"].items()})
    except (AttributeError, RuntimeError) as e:
        raise UsageError(f"{path}: expected the weights of its own settings, found others ({' '.join(str(e).split())[:200]}); "
                         "use another checkpoint") from None
    return model.eval(), state["step"]


@torch.no_grad()
def generate(model: GPT, step: int, tokens: list[int], count: int, temperature: float, top_k: int, seed: int):
    """Yield up to count tokens that go on from tokens, which are one document; end where the model ends the document.
    temperature 0 takes the likeliest token; top_k 0 allows all."""
    cfg, device = model.cfg, model.head.device
    generator, ropes, tokens = torch.Generator().manual_seed(seed), {}, list(tokens)
    before, final = max(step - 1, 0), step == cfg.train_steps  # as the validation after the step
    for _ in range(count):
        x = torch.tensor(tokens[-2 * cfg.window_final :], device=device)
        starts, ids = torch.tensor([0, len(x)], device=device).int(), torch.zeros(len(x), device=device).int()
        docs = Docs(starts, ids, len(x))
        ctx = make_context(model, BACKENDS["masked"][0], ropes, docs, cfg.stage(before), cfg.tied(before), None, final)
        log_p = softmax_logits(model, x, ctx)[-1, : cfg.vocab_size].double().cpu()
        if temperature > 0:
            if 0 < top_k < len(log_p):
                log_p[log_p < log_p.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(torch.softmax(log_p / temperature, 0), 1, generator=generator))
        else:
            token = int(log_p.argmax())
        if token == cfg.bos_id:
            return
        tokens.append(token)
        yield token


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file written by --save_final or --save_every")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="start of a document (default: none)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="most tokens to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for name in ("tokens", "temperature", "top_k", "seed"):
            if not 0 <= getattr(args, name) < 2**63:  # also refuses nan
                raise UsageError(f"--{name}: expected zero or more, found {getattr(args, name)}; change it")
        model, step = load(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        words = vocabulary(model.cfg)
        tokens = [model.cfg.bos_id, *words.encode_ordinary(args.prompt)]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens
        print(args.prompt, end="", flush=True)
        for token in generate(model, step, tokens, args.tokens, args.temperature, args.top_k, args.seed):
            print(decoder.decode(words.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True))
    except (FetchError, UsageError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # its reader, such as head, has seen enough
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
