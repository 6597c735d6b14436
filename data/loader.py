"""Batches of packed documents: the same global batch at every world size, prepared in the background.

Shapes: T tokens of one packed sequence.
"""
import glob
import hashlib
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import shards
from data.errors import RunError
from data.files import data_root


class Docs(NamedTuple):
    """Documents of one packed sequence.

    starts: (capacity,) int32, first token of each document, padded with T, as varlen attention wants it; ids:
    (T,) number of each token's document; max_len: longest document possible; slices: equal parts of the
    sequence over whose starts nothing looks, be it attention or the token before.
    """
    starts: Tensor
    ids: Tensor
    max_len: int
    slices: int = 1


class OutOfData(RunError):
    """A run used up its training shards, although the estimate at the start said that they suffice."""


class Batch(NamedTuple):
    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, the next tokens
    docs: Docs


def entries_needed(T: int, max_len: int, most: int = 0) -> int:
    """Return the entries for documents of a sequence: `most` of them fit, and share_entries() always does.
    Compiled kernels are fixed to this number, and attention takes longer the larger it is."""
    entries = max(16, T // 256, 2 * T // max_len + 2)
    while entries <= most:
        entries *= 2
    return entries


def share_entries(starts: np.ndarray, T: int, max_len: int) -> np.ndarray:
    """Return the starts that are left when neighbours with at most max_len tokens together are one document.
    Any two neighbours that are left have more, so there are at most 2 T / max_len + 1 of them."""
    left = [0]
    for start, end in zip(starts, [*starts[1:], T]):
        if end - left[-1] > max_len:
            left.append(start)
    return np.array(left)


def make_batch(buffer: np.ndarray, starts: np.ndarray, max_len: int, pin: bool, entries: int = 0) -> Batch:
    """Return a batch of T + 1 tokens. starts: where documents begin, below T, the first one 0.

    entries: for documents; 0: as many as there are. If there are more documents than entries, short
    neighbours share one: they see each other, and no kernel is compiled anew.
    """
    T = len(buffer) - 1
    entries = entries or entries_needed(T, max_len, len(starts))
    if len(starts) >= entries:
        starts = share_entries(starts, T, max_len)
    padded = np.full(entries, T, dtype=np.int32)
    padded[: len(starts)] = starts
    begins = np.zeros(T, dtype=np.int32)
    begins[starts[1:]] = 1
    ids = np.cumsum(begins, dtype=np.int32)

    tensors = [torch.from_numpy(array) for array in (buffer.astype(np.int64), padded, ids)]
    if pin:
        tensors = [tensor.pin_memory() for tensor in tensors]
    tokens, padded, ids = tensors
    return Batch(tokens[:-1], tokens[1:], Docs(padded, ids, min(max_len, T)))


def join(batches: list[Batch]) -> Batch:
    """Return one batch of several of the same length T: their slices one after the other, apart as before."""
    if len(batches) == 1:
        return batches[0]
    inputs, targets, docs = zip(*batches)
    T, entries = len(inputs[0]), len(docs[0].starts)
    starts = [one.starts + T * i for i, one in enumerate(docs)]
    ids = [one.ids + entries * i for i, one in enumerate(docs)]  # a slice has fewer than entries
    joined = Docs(torch.cat(starts), torch.cat(ids), docs[0].max_len, len(batches))
    return Batch(torch.cat(inputs), torch.cat(targets), joined)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device, copied without waiting."""
    inputs, targets, docs = batch
    moved = [tensor.to(device, non_blocking=True) for tensor in (inputs, targets, docs.starts, docs.ids)]
    inputs, targets, starts, ids = moved
    return Batch(inputs, targets, docs._replace(starts=starts, ids=ids))


def find_shards(pattern: str) -> list[Path]:
    """Return the shards, with valid headers, that match a pattern below DATA_PATH. Raises ShardError."""
    where = data_root() / pattern
    literal = Path(glob.escape(str(data_root())))  # the folder's name may hold [ or *
    paths = [Path(path) for path in sorted(glob.glob(str(literal / pattern)))]
    if not paths:
        maker = shards.MAKERS.get(str(Path(pattern).parent))
        advice = f"run python -m {maker} or set DATA_PATH" if maker else (
            "correct the pattern, or make shards of your own text with python data/fineweb.py")
        raise shards.ShardError(f"expected shards {where}, found none; {advice}")
    for path in paths:
        shards.num_tokens(path)
    return paths


def fingerprint(paths: list[Path]) -> str:
    """Return a digest of names, sizes and first megabytes, which tells sets of shards apart."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def cut_documents(starts: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and lengths of documents cut into pieces of at most `longest` tokens."""
    pieces = -(-lengths // longest)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)  # number of the first piece of the same document
    offsets = (np.arange(pieces.sum()) - first) * longest
    left = np.repeat(lengths, pieces) - offsets
    return np.repeat(starts, pieces) + offsets, np.minimum(left, longest)


class Loader:
    """Packed training batches. Every rank walks over the same documents and copies out its own slices.

    A slice takes whole documents, each cut to the stage's max_doc_len, until T + 1 tokens are full; the last
    one is cut to fit, and what was cut off is not used. A shard's tail that cannot fill a step is left out.
    With cfg.split_docs a shard's documents are first cut into pieces, which then count as documents and come
    in a new order every epoch. The next step is prepared in the background, and so is the next shard.
    """

    def __init__(self, cfg, rank: int, world: int, pin: bool):
        self.cfg, self.rank, self.world, self.pin = cfg, rank, world, pin
        self.slices = max(cfg.slices, world)
        self.paths = find_shards(cfg.train_files)
        self.fingerprint = fingerprint(self.paths)
        self.opened = {}  # shard number -> future of (tokens, document starts, document lengths)
        self.order = (None, None)  # (epoch, shard) and the order of its documents
        first = rank * self.slices // world
        behind = (rank + 1) * self.slices // world
        self.slices_of_rank = range(first, behind)
        self.shard_opener = ThreadPoolExecutor(1)
        self.preparer = ThreadPoolExecutor(1)
        # By stage: the tokens that one of its first steps uses up, and the most documents of a sequence.
        self.tried = [self.try_steps(first, min(20, count)) for first, count in cfg.steps_by_stage]
        self.check_supply()
        self.opened.clear()  # the clock pays for opening the first shard
        self.load_state_dict(dict(step=0, epoch=0, shard=0, doc=0))

    def state_dict(self) -> dict[str, int]:
        """Return the position of the step that next() returns next."""
        return dict(self.position)

    def load_state_dict(self, state: dict[str, int]):
        if state["shard"] >= len(self.paths):
            raise shards.ShardError(
                f"--resume: expected more than {state['shard']} training shards, as where the checkpoint was "
                f"written, found {len(self.paths)}; get the others again")
        self.position = dict(state)
        self.upcoming = None

    def next(self) -> list[Batch]:
        """Return the micro-batches of this rank for the next step. The first call opens the shard and waits
        for its batch, so that a clock which starts before it pays for both, as in the public records."""
        upcoming = self.upcoming or self.preparer.submit(self.prepare, self.position)
        batches, self.position = upcoming.result()
        more = self.position["step"] < self.cfg.train_steps
        self.upcoming = self.preparer.submit(self.prepare, self.position) if more else None
        return batches

    def joined(self, step: int) -> int:
        """Return how many of this rank's slices lie in one micro-batch: all as long as they fit in
        pack_tokens, else the most that share them out evenly."""
        own = len(self.slices_of_rank)
        T = self.cfg.at("batch_tokens", step) // self.slices
        even = [n for n in range(1, own + 1) if own % n == 0]
        return max((n for n in even if n * T <= self.cfg.pack_tokens), default=1)

    def open(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, document starts and lengths of a shard; open the next one in the background."""
        wanted = {number, number + 1}
        for n in sorted(wanted - set(self.opened)):
            if n < len(self.paths):
                self.opened[n] = self.shard_opener.submit(self.read, self.paths[n])
        for n in set(self.opened) - wanted:
            del self.opened[n]
        return self.opened[number].result()

    def read(self, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = shards.open_shard(path)
        shards.check_ids(tokens, self.cfg.vocab_size, path)
        starts = shards.document_starts(tokens, self.cfg.bos_id)
        if len(starts) == 0:
            raise shards.ShardError(f"{path}: expected documents that start with token {self.cfg.bos_id}, "
                                    "found none; make the shard again with this vocabulary")
        lengths = np.diff(starts, append=len(tokens))
        if self.cfg.split_docs:
            starts, lengths = cut_documents(starts, lengths, self.cfg.split_docs)
        return tokens, starts, lengths

    def documents(self, epoch: int, shard: int, first: int, count: int) -> np.ndarray:
        """Return up to `count` document numbers of a shard, in this epoch's order, from `first` on."""
        total = len(self.open(shard)[2])
        last = min(first + count, total)
        docs = np.arange(first, last)
        if not self.cfg.split_docs:
            return docs
        if self.order[0] != (epoch, shard):
            rng = np.random.default_rng((epoch, shard))
            self.order = (epoch, shard), rng.permutation(total)
        return self.order[1][docs]

    def walk(self, position: dict[str, int]) -> tuple[dict[str, int], np.ndarray, list[int]]:
        """Return where a step begins, the documents from there on, and how many each slice ends with."""
        step, epoch, shard, doc = (position[key] for key in ("step", "epoch", "shard", "doc"))
        max_len = self.cfg.at("max_doc_len", step)
        T = self.cfg.at("batch_tokens", step) // self.slices
        while True:
            most = self.slices * (T + 1)  # every document has a token or more
            docs = self.documents(epoch, shard, doc, most)
            ends = np.cumsum(np.minimum(self.open(shard)[2][docs], max_len))
            used = [0]
            while len(used) <= self.slices and used[-1] <= len(docs):
                before = ends[used[-1] - 1] if used[-1] else 0
                used.append(int(np.searchsorted(ends, before + T + 1)) + 1)
            if used[-1] <= len(docs):
                here = dict(step=step, epoch=epoch, shard=shard, doc=doc)
                return here, docs, used

            shard, doc = shard + 1, 0
            if shard == len(self.paths):
                shard, epoch = 0, epoch + 1
            if epoch == self.cfg.max_epochs:
                raise OutOfData(f"step {step}: expected more training tokens, found the end of "
                                f"{len(self.paths)} shards after {epoch} epochs; get more shards, raise "
                                "--max_epochs or lower --train_steps")

    def prepare(self, position: dict[str, int]) -> tuple[list[Batch], dict[str, int]]:
        """Return this rank's micro-batches of the step at a position, and the position after it."""
        here, docs, used = self.walk(position)
        step = here["step"]
        tokens, starts, lengths = self.open(here["shard"])
        max_len = self.cfg.at("max_doc_len", step)
        T = self.cfg.at("batch_tokens", step) // self.slices
        entries = self.entries(step)

        batches = []
        for s in self.slices_of_rank:
            mine = docs[used[s]:used[s + 1]]
            kept = np.minimum(lengths[mine], max_len)
            begins = np.cumsum(kept) - kept
            begins = begins[begins < T]
            parts = [tokens[start:start + n] for start, n in zip(starts[mine], kept)]
            buffer = np.concatenate(parts)
            batch = make_batch(buffer[:T + 1], begins, max_len, self.pin, entries)
            batches.append(batch)

        n = self.joined(step)
        batches = [join(batches[i:i + n]) for i in range(0, len(batches), n)]
        after = {**here, "step": step + 1, "doc": here["doc"] + used[-1]}
        return batches, after

    def check_supply(self):
        """Refuse a schedule that the shards cannot feed, judged by the first steps of each stage."""
        cfg = self.cfg
        needed = sum(raw * count for (raw, _), (_, count) in zip(self.tried, cfg.steps_by_stage))
        found = sum(map(shards.num_tokens, self.paths)) * cfg.max_epochs
        if needed > found:
            raise shards.ShardError(
                f"--train_steps: expected about {needed:,.0f} tokens in the training shards for "
                f"{cfg.train_steps} steps, found {found:,} in {len(self.paths)} shards times "
                f"{cfg.max_epochs} epochs; get more shards, raise --max_epochs or lower --train_steps")

    def try_steps(self, first: int, count: int) -> tuple[float, int]:
        """Pack `count` steps from the first shard's beginning. Return the tokens that a step uses up and the
        most documents of a sequence."""
        position = dict(epoch=0, shard=0, doc=0)
        raw = most = 0
        for step in range(first, first + count):
            try:
                here, docs, used = self.walk({**position, "step": step})
            except OutOfData as error:  # not even these few
                raise shards.ShardError(str(error)) from None
            lengths = self.open(here["shard"])[2]
            taken = docs[:used[-1]]
            raw += int(lengths[taken].sum())
            most = max(most, *np.diff(used).tolist())
            position = {**here, "doc": here["doc"] + used[-1]}
        return raw / max(count, 1), most

    def entries(self, step: int) -> int:
        """Return the entries for documents of every sequence of this step's stage."""
        T = self.cfg.at("batch_tokens", step) // self.slices
        most = self.tried[self.cfg.stage(step)][1]
        return entries_needed(T, self.cfg.at("max_doc_len", step), most)


# FineWeb's documents are about log-normal in length, with these tokens.
MEDIAN_LENGTH, MEAN_LENGTH = 403, 690
LENGTH_SIGMA = math.sqrt(2 * math.log(MEAN_LENGTH / MEDIAN_LENGTH))


def shards_needed(cfg) -> int:
    """Return the number of shards of 100 M FineWeb tokens that a schedule uses up. A tenth is added for shard
    tails and for the uncertainty of the lengths of documents."""

    below = statistics.NormalDist().cdf

    def kept(length: int) -> float:
        """Return the part of all tokens that is left of documents cut to a length."""
        z = math.log(length / MEDIAN_LENGTH) / LENGTH_SIGMA
        return below(z - LENGTH_SIGMA) + length / MEAN_LENGTH * (1 - below(z))

    raw = 0.0
    for step, count in cfg.steps_by_stage:
        raw += count * cfg.at("batch_tokens", step) / kept(cfg.at("max_doc_len", step))
    return math.ceil(1.1 * raw / 100e6)


class Validation:
    """The first val_tokens of the validation shards, in order, as sequences of val_slice tokens. Rank r has
    every world-th one. Documents are told apart, but a sequence may start inside of one."""

    def __init__(self, cfg, rank: int, world: int, pin: bool):
        need = cfg.val_tokens + 1
        parts = []
        for path in find_shards(cfg.val_files):
            part = shards.open_shard(path)[: need - sum(map(len, parts))]
            shards.check_ids(part, cfg.vocab_size, path)
            parts.append(part)
        tokens = np.concatenate(parts)
        if len(tokens) < need:
            raise shards.ShardError(f"--val_tokens: expected {need:,} tokens in {cfg.val_files}, found "
                                    f"{len(tokens):,}; get the whole validation set or lower --val_tokens")
        self.sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        self.counts = np.bincount(tokens[1:])  # of each token to predict

        self.batches = []
        for i in range(rank, cfg.val_tokens // cfg.val_slice, world):
            buffer = tokens[i * cfg.val_slice:(i + 1) * cfg.val_slice + 1]
            starts = shards.document_starts(buffer[:-1], cfg.bos_id)
            if len(starts) == 0 or starts[0] != 0:
                starts = np.append(0, starts)
            longest = int(np.diff(starts, append=cfg.val_slice).max())  # attention's work grows with it
            self.batches.append(make_batch(buffer, starts, longest, pin))
        self.num_rounds = -(-cfg.val_tokens // cfg.val_slice // world)

    def num_bytes(self, encoding) -> int:
        """Return the bytes of text that the tokens to predict stand for. encoding: see data/encoding.py."""
        occurring = np.flatnonzero(self.counts)
        return sum(int(self.counts[token]) * len(encoding.decode([token])) for token in occurring)

    def rounds(self):
        """Yield this rank's batches, then None where others still have one: equally often on every rank."""
        for i in range(self.num_rounds):
            yield self.batches[i] if i < len(self.batches) else None
