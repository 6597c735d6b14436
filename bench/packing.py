"""Documents of FineWeb's lengths, packed as the loader packs them, and the keys that attention sees."""
import numpy as np

from data.loader import LENGTH_SIGMA, MEDIAN_LENGTH
from train_gpt import Config


def document_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw lengths as in FineWeb."""
    return np.maximum(rng.lognormal(np.log(MEDIAN_LENGTH), LENGTH_SIGMA, count), 2).astype(int)


def packed(lengths: np.ndarray, max_len: int, T: int, count: int) -> list[np.ndarray]:
    """Pack documents into `count` sequences of T tokens as data/loader.py does, each last one cut."""
    ends = np.cumsum(np.minimum(lengths, max_len))
    result = []
    first = 0
    for _ in range(count):
        before = 0
        if first:
            before = ends[first - 1]
        last = int(np.searchsorted(ends, before + T))
        inside = np.minimum(ends[first : last + 1], before + T)
        result.append(np.diff(inside, prepend=before))
        first = last + 1
    return result


def synthetic(cfg: Config, step: int, sequences: int) -> list[np.ndarray]:
    """Return document lengths of each packed sequence of a step."""
    tokens = cfg.at("batch_tokens", step)
    lengths = document_lengths(np.random.default_rng(0), tokens // 20)
    if cfg.split_docs:
        lengths = np.full_like(lengths, cfg.split_docs)
    return packed(lengths, cfg.at("max_doc_len", step), tokens // sequences, sequences)


def visible(lengths: np.ndarray, window: int) -> int:
    """Count pairs of a query and a key that it sees, over documents of these lengths."""
    full = np.minimum(lengths, window + 1)
    rising = full * (full + 1) // 2  # the first queries of a document see all before them
    level = (lengths - full) * (window + 1)
    return int((rising + level).sum())


def keys_seen(cfg: Config, docs: list[np.ndarray], stage: int) -> int:
    """Count keys over all layers, paired heads as half as many at twice the places."""
    keys = 0
    for i in set(range(cfg.num_layers)) - set(cfg.no_attn_layers):
        name = "window_long" if i in cfg.long_layers else "window_short"
        window = cfg.by_stage(name, stage)
        double = 2 if i in cfg.paired_layers else 1
        keys += sum(visible(double * d, window) for d in docs) // double
    if cfg.mix_window:  # the mixing of heads is one more attention
        keys += sum(visible(d, cfg.mix_window - 1) for d in docs)
    return keys
