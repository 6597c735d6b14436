"""The loader against a slow loop over the documents, at every world size, with its state, and out of data."""

import functools

import numpy as np
import pytest
import torch
from tests.helpers import runs
from tests.helpers.runs import BOS, documents, make_shards

from data.files import data_root
from data.loader import Loader, OutOfData, Validation, entries_needed, find_shards, share_entries
from data.shards import ShardError, document_starts, open_shard, write_shard

config = functools.partial(runs.config, "--pack_tokens=0")  # every slice by itself
STAGED = "--batch_tokens=256,512,768 --max_doc_len=24,64 --extension_steps=4 --adam_every=2"
VARIANTS = {  # the shards have 12,000 tokens each: all cross into the second one, some into a second epoch
    "whole documents": "--max_doc_len=64",
    "cut documents": "--max_epochs=2",
    "split documents": "--split_docs=40 --train_steps=60 --max_epochs=3",
    "split and cut documents": "--split_docs=40 --max_doc_len=16,40,24 --max_epochs=3",
}


def staged(more: str = ""):
    return config(*STAGED.split(), "--train_steps=40", *more.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("loader"), tokens=12_000)


@pytest.fixture(autouse=True)
def data_path(folder, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(folder))


def slow_steps(cfg, slices: int = 8):
    """Yield (buffers of T + 1 tokens, document starts in each) of each step, a document at a time."""
    paths = [data_root() / cfg.train_files.replace("*", number) for number in ("000000", "000001")]
    shards = [open_shard(path) for path in paths]
    step = 0
    for epoch in range(cfg.max_epochs):
        for number, tokens in enumerate(shards):
            starts = [i for i, token in enumerate(tokens) if token == cfg.bos_id]
            docs = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)])]
            if cfg.split_docs:
                longest = cfg.split_docs
                docs = [doc[i : i + longest] for doc in docs for i in range(0, len(doc), longest)]
                docs = [docs[i] for i in np.random.default_rng((epoch, number)).permutation(len(docs))]
            while True:
                if step == cfg.train_steps:
                    return
                T = cfg.at("batch_tokens", step) // slices
                buffers, positions, left = [], [], list(docs)
                while len(buffers) < slices and left:
                    buffer, begins = [], []
                    while len(buffer) < T + 1 and left:
                        begins.append(len(buffer))
                        buffer += left.pop(0)[: cfg.at("max_doc_len", step)].tolist()
                    if len(buffer) >= T + 1:
                        buffers.append(buffer[: T + 1])
                        positions.append([b for b in begins if b < T])
                if len(buffers) < slices:
                    break  # the rest of this shard is too short
                yield buffers, positions
                docs, step = left, step + 1


def take(loader, steps: int) -> list:
    return [loader.next() for _ in range(steps)]


def same(a, b) -> bool:
    """Bitwise equality of two batches."""
    tensors = [(x.inputs, x.targets, x.docs.ids, x.docs.starts) for x in (a, b)]
    return all(map(torch.equal, *tensors)) and a.docs.max_len == b.docs.max_len


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_are_those_of_a_slow_loop(variant):
    cfg = staged(VARIANTS[variant])
    loader, positions = Loader(cfg, 0, 1, False), []
    for step, (buffers, begins) in enumerate(slow_steps(cfg)):
        batches = loader.next()
        positions.append((loader.position["epoch"], loader.position["shard"]))
        assert len(batches) == 8
        for batch, buffer, begin in zip(batches, buffers, begins):
            assert batch.inputs.tolist() == buffer[:-1] and batch.targets.tolist() == buffer[1:]
            T = len(buffer) - 1
            assert batch.docs.starts.dtype == torch.int32 and len(batch.docs.starts) > len(begin)
            assert batch.docs.starts.tolist() == begin + [T] * (len(batch.docs.starts) - len(begin))
            assert batch.docs.ids.tolist() == [sum(t >= b for b in begin) - 1 for t in range(T)]
            lengths = np.diff([*begin, T])
            assert lengths.max() <= batch.docs.max_len <= cfg.at("max_doc_len", step)
            if not cfg.split_docs:  # every document from its start
                assert all(batch.inputs[b] == BOS for b in begin)
    assert step + 1 == cfg.train_steps and (0, 1) in positions  # into the second shard
    assert cfg.max_epochs == 1 or positions[-1][0] > 0  # and epoch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", [2, 8])
def test_the_ranks_together_have_the_batches_of_one(variant, world):
    cfg = staged(VARIANTS[variant])
    alone = take(Loader(cfg, 0, 1, False), cfg.train_steps)
    ranks = [take(Loader(cfg, rank, world, False), cfg.train_steps) for rank in range(world)]
    for step in range(cfg.train_steps):
        together = [batch for rank in ranks for batch in rank[step]]
        assert len(together) == 8 and all(map(same, together, alone[step]))


def test_more_ranks_than_slices_share_the_batch_in_shorter_sequences():
    cfg = staged("--train_steps=20")
    ranks = [take(Loader(cfg, rank, 16, False), cfg.train_steps) for rank in range(16)]
    for step, (buffers, _) in zip(range(cfg.train_steps), slow_steps(cfg, slices=16)):
        assert [[batch.inputs.tolist() for batch in rank[step]] for rank in ranks] == [
            [buffer[:-1]] for buffer in buffers]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_position_continues_exactly(variant):
    """It does so everywhere: in the middle of a shard, where a shard ends, and where an epoch ends."""
    cfg = staged(VARIANTS[variant])
    loader, states, batches = Loader(cfg, 0, 2, False), [], []
    for _ in range(cfg.train_steps):
        states.append(loader.state_dict())
        batches.append(loader.next())
    borders = [b for a, b in zip(states, states[1:]) if (a["epoch"], a["shard"]) != (b["epoch"], b["shard"])]
    assert borders and (cfg.max_epochs == 1 or any(state["epoch"] for state in borders))
    resumed = Loader(cfg, 0, 2, False)
    for step, state in enumerate(states):
        assert all(type(value) is int for value in state.values())  # torch.load(weights_only=True) takes them
        resumed.load_state_dict(state)
        for expected in batches[step : step + 2]:
            assert all(map(same, resumed.next(), expected))
        if step + 2 < cfg.train_steps:
            assert resumed.state_dict() == states[step + 2]


def test_very_many_short_documents_need_no_larger_kernel(tmp_path, monkeypatch):
    """The entries are those of the first steps; where a slice has more documents, neighbours share one."""
    tokens = np.concatenate([documents(30_000, 0), np.tile([BOS, 97], 6_000)]).astype(np.uint16)
    write_shard(tmp_path / "data/shakespeare/shakespeare_train_000000.bin", tokens)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    cfg = config("--train_steps=36", "--max_doc_len=64", "--max_epochs=1")
    loader, shared = Loader(cfg, 0, 1, False), 0
    entries = entries_needed(64, 64)
    for step in range(36):
        for batch in loader.next():
            begins = (batch.inputs == BOS).nonzero()[:, 0].tolist()
            starts = batch.docs.starts[batch.docs.starts < 64].tolist()
            assert len(batch.docs.starts) == entries and set(starts) <= {0, *begins}
            assert batch.docs.ids.tolist() == [sum(s <= t for s in starts) - 1 for t in range(64)]
            assert np.diff([*starts, 64]).max() <= batch.docs.max_len
            assert starts == begins or len(begins) >= entries  # none shares where there is room
            shared += starts != begins
    assert shared > 8

    tokens = np.tile([BOS, 97], 12_000).astype(np.uint16)  # the entries grow with the first steps' documents
    write_shard(tmp_path / "data/shakespeare/shakespeare_train_000000.bin", tokens)
    loader = Loader(config("--train_steps=10"), 0, 1, False)
    assert entries == 16 and loader.entries(0) == loader.entries(9) == 64  # 33 documents in a slice
    assert all(len(set(batch.docs.ids.tolist())) == 32 for batch in loader.next())
    *_, later = take(Loader(config("--train_steps=10", "--batch_tokens=256,768"), 0, 1, False), 10)
    assert all(len(set(batch.docs.ids.tolist())) == 48 for batch in later)  # by the stage's own first steps


@pytest.mark.parametrize("T, max_len", [(64, 64), (64, 7), (100, 1), (1000, 30)])
def test_documents_that_share_entries_always_fit_and_stay_short(T, max_len):
    rng = np.random.default_rng(0)
    for shortest, longest in ((1, 1), (1, max_len), (max_len, max_len)):
        starts = [0]
        while starts[-1] < T:
            starts.append(starts[-1] + int(rng.integers(shortest, longest + 1)))
        starts = np.array(starts[:-1])
        left = share_entries(starts, T, max_len)
        lengths = np.diff([*left, T])
        assert left[0] == 0 and set(left) <= set(starts) and lengths.max() <= max_len
        assert len(left) < entries_needed(T, max_len)
        assert all(lengths[:-1] + np.diff([*starts, T])[np.searchsorted(starts, left[1:])] > max_len)


def test_a_schedule_that_needs_too_many_tokens_is_refused_at_the_start():
    Loader(config("--train_steps=20", "--max_epochs=1"), 0, 1, False)  # 10,240 of 24,000 tokens, much is cut
    message = r"--train_steps: expected about [\d,]+ tokens .* 30 steps, found 24,000 in 2 shards times 1 epo"
    with pytest.raises(ShardError, match=message):
        Loader(config("--train_steps=30", "--max_epochs=1"), 0, 1, False)
    Loader(config("--train_steps=30", "--max_epochs=4"), 0, 1, False)


def test_shards_smaller_than_a_step_or_a_position_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ShardError, match="expected more than 2 training shards.*found 2; get"):
        Loader(config(), 0, 1, False).load_state_dict(dict(step=3, epoch=0, shard=2, doc=0))
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path, tokens=400)))
    with pytest.raises(ShardError, match="step 0: expected more training tokens, found the end of 2 shards"):
        Loader(config(), 0, 1, False)


def test_running_out_of_data_on_the_way_says_so(tmp_path, monkeypatch):
    """The estimate sees documents that are used whole; of later ones most is cut off."""
    make_shards(tmp_path, shards=1, tokens=30_000)
    long_ones = documents(12_000, 5, shortest=300, longest=301)
    write_shard(tmp_path / "data/shakespeare/shakespeare_train_000001.bin", long_ones)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    cfg = config("--train_steps=38", "--max_epochs=1")
    loader, steps = Loader(cfg, 0, 1, False), 0
    message = r"step \d+: expected more training tokens, found the end of 2 shards after 1 epochs; get more"
    with pytest.raises(OutOfData, match=message):
        while True:
            loader.next()
            steps += 1
    assert 20 < steps < 38


def numbers(*changes) -> np.ndarray:
    """A shard of documents in which some tokens are others."""
    tokens = documents(12_000, 5)
    for position, token in changes:
        tokens[position] = token
    return tokens


BAD_SHARDS = {  # name -> the second shard, what is said
    "a bad token": (
        numbers((11_000, 300)),
        "_000001.bin: expected token ids below the vocabulary size 257, found 300 at position 11,000"),
    "no documents": (np.full(12_000, 97), "expected documents that start with token 256, found none; make"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_bad_shard_arrives_as_an_error_of_its_file(tmp_path, monkeypatch, name):
    """The loader prepares steps in a thread of its own."""
    tokens, message = BAD_SHARDS[name]
    make_shards(tmp_path, shards=1)
    write_shard(tmp_path / "data/shakespeare/shakespeare_train_000001.bin", tokens)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    with pytest.raises(ShardError, match=message):
        take(Loader(config("--train_steps=20", "--max_epochs=1"), 0, 1, False), 20)


def test_missing_shards_are_told_who_makes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    advice = {
        "data/fineweb10B/fineweb_train_*.bin": "run python -m data.cached_fineweb10B or set DATA_PATH",
        "data/shakespeare/shakespeare_val_*.bin": "run python -m data.shakespeare or set DATA_PATH",
        "data/mine/mine_val_*.bin": "correct the pattern, or make shards of your own text with python",
    }
    for pattern, expected in advice.items():
        with pytest.raises(ShardError, match=f"found none; {expected}") as caught:
            find_shards(pattern)
        assert str(tmp_path / pattern) in str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_is_the_first_tokens_in_order_shared_out_over_the_ranks(folder, world):
    cfg = config()
    tokens = open_shard(folder / "data/shakespeare/shakespeare_val_000000.bin")[:1025].astype(int)
    sets = [Validation(cfg, rank, world, False) for rank in range(world)]
    assert len({one.sha256 for one in sets}) == 1
    for i in range(4):
        batch, piece = sets[i % world].batches[i // world], tokens[256 * i : 256 * i + 257]
        assert batch.inputs.tolist() == piece[:-1].tolist() and batch.targets.tolist() == piece[1:].tolist()
        # Context is cut where a sequence starts.
        begins = sorted({0, *document_starts(piece[:-1], BOS).tolist()})
        assert batch.docs.ids.tolist() == [sum(t >= b for b in begins) - 1 for t in range(256)]
        assert batch.docs.max_len == max(np.diff([*begins, 256]))  # no longer: attention would do empty work
    assert sum(len(one.batches) for one in sets) == 4
    assert {len(list(one.rounds())) for one in sets} == {-(-4 // world)}  # as often on every rank


def test_validation_goes_on_in_the_next_shard_and_needs_enough_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    whole = Validation(config(), 0, 1, False).sha256
    path = tmp_path / "data/shakespeare/shakespeare_val_000000.bin"
    tokens = np.array(open_shard(path))
    write_shard(path, tokens[:700])
    with pytest.raises(ShardError, match="--val_tokens: expected 1,025 tokens in .*, found 700; get the"):
        Validation(config(), 0, 1, False)
    write_shard(path.with_name("shakespeare_val_000001.bin"), tokens[700:])
    assert Validation(config(), 0, 1, False).sha256 == whole


def test_the_fingerprint_tells_sets_of_shards_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(make_shards(tmp_path)))
    before = Loader(config(), 0, 1, False).fingerprint
    assert Loader(config(), 0, 2, False).fingerprint == before
    tokens = documents(12_000, 0)
    tokens[5] = 98 if tokens[5] == 97 else 97
    write_shard(tmp_path / "data/shakespeare/shakespeare_train_000000.bin", tokens)
    assert Loader(config(), 0, 1, False).fingerprint != before


PACKED = {0: [64] * 4, 127: [64] * 4, 128: [128] * 2, 255: [128] * 2, 256: [256], 10_000: [256]}


def starts_of(batch) -> list[int]:
    """Return where its documents begin, each once."""
    starts = batch.docs.starts
    return sorted(set(starts[starts < len(batch.inputs)].tolist()))


@pytest.mark.parametrize("pack_tokens", PACKED)
def test_slices_of_a_rank_are_joined_up_to_a_number_of_tokens(pack_tokens):
    joined = Loader(config(f"--pack_tokens={pack_tokens}"), 1, 2, False).next()
    apart = Loader(config(), 1, 2, False).next()
    assert [len(batch.inputs) for batch in joined] == PACKED[pack_tokens] and len(apart) == 4
    for name in ("inputs", "targets"):
        found, expected = (torch.cat([getattr(batch, name) for batch in one]) for one in (joined, apart))
        assert torch.equal(found, expected)

    together = PACKED[pack_tokens][0] // 64
    for i, batch in enumerate(joined):
        parts = apart[together * i : together * (i + 1)]
        starts = [64 * k + start for k, part in enumerate(parts) for start in starts_of(part)]
        changes = batch.docs.ids.diff().nonzero()[:, 0] + 1
        assert starts_of(batch) == starts == [0, *changes.tolist()]
        assert batch.docs.slices == together and batch.docs.starts.diff().min() >= 0
