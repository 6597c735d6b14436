"""The keys that attention sees in documents are those of the masks, and documents are packed as the loader
packs them."""
import numpy as np
import pytest

from bench import packing
from engine.attention import masked_mask, paired_docs
from tests.helpers.tiny import BARE, SMALL, build, config, docs_of, make_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("window", [1, 4, 20, 500])
def test_visible_keys_are_those_of_the_mask(window):
    lengths = [1, 3, 40, 21, 2]
    docs = docs_of(lengths)
    assert packing.visible(np.array(lengths), window) == masked_mask(docs, window).sum()
    assert packing.visible(2 * np.array(lengths), window) == masked_mask(paired_docs(docs), window).sum()


@pytest.mark.parametrize("base", [SMALL, BARE], ids=["all", "bare"])
@pytest.mark.parametrize("stage", [0, 2])
def test_keys_of_a_model_are_those_of_its_layers_masks(base, stage):
    """A pair of heads has half of them, and a mask of twice the width and length."""
    cfg, lengths = config(base), [11, 3, 18]
    model = build(cfg)
    docs = docs_of(lengths)
    keys = 0
    for i in model.attn_layers:
        windows = cfg.window_long if i in cfg.long_layers else cfg.window_short
        window = windows[min(stage, len(windows) - 1)]
        paired = i in cfg.paired_layers
        keys += int(masked_mask(paired_docs(docs) if paired else docs, window).sum()) // (1 + paired)
    assert packing.keys_seen(cfg, [np.array(lengths)], stage) == keys
    longer = config(base, mix_window=2, gate_networks=(0,)) if base is SMALL else cfg
    more = packing.keys_seen(longer, [np.array(lengths)], stage) - keys
    assert more == (2 * sum(lengths) - len(lengths) if base is SMALL else 0)  # itself and one before


def test_packing_is_the_loaders(tmp_path):
    run = make_run(tmp_path)
    lengths = run.loader.open(0)[2]
    cfg, T = run.cfg, run.cfg.batch_tokens[0] // run.cfg.slices
    batches = run.loader.next()
    expected = [np.diff(b.docs.starts[b.docs.starts < T].numpy(), append=T) for b in batches]
    found = packing.packed(lengths, cfg.max_doc_len[0], T + 1, cfg.slices)
    for mine, theirs in zip(found, expected, strict=True):  # the token after the last is a target only
        mine[-1] -= 1
        assert mine[mine > 0].tolist() == theirs.tolist()
