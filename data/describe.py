"""Say what is in token shards: tokens, documents, document lengths, first text, SHA-256.

    python -m data.describe FILE...

Exit code 2 if any file is not a whole shard.
"""
import argparse
import sys

import numpy as np

from data.encoding import BYTE_BOS, GPT2_BOS, encoding_for
from data.errors import UsageError, run_program
from data.files import sha256_of
from data.shards import CHUNK, ShardError, document_starts, open_shard

FIRST_TOKENS = 256  # of a shard, of which the first characters are shown
FIRST_CHARACTERS = 200


def first_text(ids, bos: int) -> str:
    """Return the beginning of a shard as one readable line."""
    try:
        encoding = encoding_for(bos, network=False)
    except (ImportError, UsageError) as error:
        numbers = " ".join(str(i) for i in ids[:8].tolist())
        return f"(ids {numbers} ...; as text they need the GPT-2 vocabulary: {error})"
    text = encoding.decode(ids.tolist()).decode("utf-8", errors="replace")
    return repr(text[:FIRST_CHARACTERS])


def describe(path) -> str:
    """Return what a shard holds, in a few lines for people. Raises ShardError."""
    tokens = open_shard(path)
    largest = max(int(tokens[first:first + CHUNK].max()) for first in range(0, len(tokens), CHUNK))
    # The header does not name the vocabulary, but English GPT-2 text always has ids above 256, byte shards
    # never do.
    bos = BYTE_BOS if largest <= BYTE_BOS else GPT2_BOS
    vocabulary = "bytes" if bos == BYTE_BOS else "GPT-2"
    starts = document_starts(tokens, bos)

    documents = f"  documents   {len(starts):,}"
    if len(starts) == 0:
        documents += f" (id {bos} does not occur)"
    elif starts[0]:
        documents += f" (after {starts[0]:,} tokens of a document begun in the shard before)"
    lines = [
        str(path),
        f"  tokens      {len(tokens):,} ({vocabulary}: {bos} starts a document; largest id {largest})",
        documents,
    ]
    if len(starts):
        lengths = np.diff(np.append(starts, len(tokens)))
        low, median, high, top = np.quantile(lengths, [0.1, 0.5, 0.9, 0.99])
        lines.append(
            f"  lengths     mean {lengths.mean():,.0f}; smallest {lengths.min():,}, 10% {low:,.0f}, median "
            f"{median:,.0f}, 90% {high:,.0f}, 99% {top:,.0f}, largest {lengths.max():,} tokens")
    lines += [
        f"  first text  {first_text(tokens[:FIRST_TOKENS], bos)}",
        f"  sha256      {sha256_of(path)}",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="data.describe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="shards (.bin) made by the scripts in data/")
    code = 0
    for path in parser.parse_args(argv).files:
        try:
            print(describe(path), flush=True)
        except ShardError as error:
            print(error, file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
