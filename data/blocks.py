"""Batches of the optimization track: blocks of one length that begin and end anywhere."""
import hashlib

import numpy as np
import torch

from data import shards
from data.errors import UsageError
from data.loader import find_shards


class Blocks:
    """This rank's part of every batch: consecutive blocks of T tokens, no matter where documents begin.

    pattern: of shards, read in order. batch_tokens: of all ranks. cfg has seq_len and vocab_size, rt rank,
    world and device. Raises UsageError.
    """

    def __init__(self, pattern: str, batch_tokens: int, cfg, rt):
        self.paths = find_shards(pattern)
        self.batch_tokens = batch_tokens
        self.cfg = cfg
        self.rt = rt
        # The public loader goes to the next shard where a batch would end at the last but one token.
        self.num_batches = [max(0, (shards.num_tokens(path) - 2) // batch_tokens) for path in self.paths]
        blocks = batch_tokens // cfg.seq_len
        if blocks % rt.world:
            raise UsageError(f"world size: expected a divisor of {blocks}, the blocks of a batch, found "
                             f"{rt.world}; change --nproc_per_node")

    def expect(self, batches: int, name: str) -> None:
        """Raise UsageError unless the shards hold so many batches."""
        found = sum(self.num_batches)
        if found < batches:
            raise UsageError(f"--{name}: expected {batches:,} batches of {self.batch_tokens:,} tokens, found "
                             f"{found:,} in {len(self.paths)} shards; lower it, or get more shards (of "
                             "FineWeb by python data/cached_fineweb10B.py 20)")

    def sha256(self) -> str:
        """Return the digest of the tokens that the first batch is made of."""
        return hashlib.sha256(shards.open_shard(self.paths[0])[:self.batch_tokens + 1].tobytes()).hexdigest()

    def __iter__(self):
        """Yield (inputs, targets), each (B / world, T) int64 on the device; targets are one token ahead."""
        share = self.batch_tokens // self.rt.world
        for path, count in zip(self.paths, self.num_batches):
            tokens = shards.open_shard(path)
            for k in range(count):
                first = k * self.batch_tokens + self.rt.rank * share
                mine = np.array(tokens[first:first + share + 1])
                shards.check_ids(mine, self.cfg.vocab_size, path)
                mine = torch.from_numpy(mine.astype(np.int64)).to(self.rt.device)
                yield mine[:-1].view(-1, self.cfg.seq_len), mine[1:].view(-1, self.cfg.seq_len)
