"""Text from a checkpoint: the model of the run, reproducible draws, and refusals."""

import pytest
import torch
from tests.helpers.runs import BOS, make_shards, run

from tools import sample
from data.loader import Docs
from engine.attention import BACKENDS
from train_gpt import softmax_logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has learned the order of the alphabet, with a checkpoint on the way and one at the end."""
    result = run(
        make_shards(tmp_path_factory.mktemp("sample")),
        "--train_steps=60",
        "--extension_steps=6",
        "--max_epochs=9",
        "--save_every=30",
        "--save_final=1",
        "--window_final=48",
        "--val_every=30",
    )
    assert (result.code, result.err) == (0, "")
    return result


def text(capsys, path, *args: str) -> str:
    assert sample.main([str(path), *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_text_goes_on_as_the_run_has_learned(finished, capsys):
    out = text(capsys, finished.checkpoints[-1], "--prompt", "abcdef", "--tokens", "8", "--temperature", "0")
    assert out == "abcdefghijklmn\n"


def test_the_same_seed_draws_the_same_text(finished, capsys):
    def draw(*args):
        return text(capsys, finished.checkpoints[-1], "--tokens", "40", *args)

    assert draw("--seed", "1") == draw("--seed", "1") != draw("--seed", "2")
    assert draw("--top_k", "1") == draw("--temperature", "0") == draw("--temperature", "1e-9")


@pytest.mark.parametrize("which, final", [(0, False), (-1, True)])
def test_log_probabilities_are_those_of_the_validation_after_that_step(finished, which, final, monkeypatch):
    """The mean of the log probabilities that sampling sees, over a document, is the loss that evaluation computes
    there: with the window and the tying of that step."""
    model, step = sample.load(str(finished.checkpoints[which]), torch.device("cpu"))
    cfg, seen = model.cfg, []
    tokens = [BOS, *(97 + (3 * i * i + i) % 26 for i in range(60))]  # longer than the window
    monkeypatch.setattr(sample, "softmax_logits", lambda *args: seen.append(softmax_logits(*args)) or seen[-1])
    for n in range(1, len(tokens)):
        list(sample.generate(model, step, tokens[:n], 1, 0, 0, 0))
    loss = -sum(rows[-1, token].item() for rows, token in zip(seen, tokens[1:]))
    docs = Docs(torch.tensor([0, 60], dtype=torch.int32), torch.zeros(60, dtype=torch.int32), 60)
    contexts = [
        sample.make_context(model, BACKENDS["blocked"][0], {}, docs, cfg.stage(step - 1), tied, torch.zeros(()), long)
        for tied, long in (
            (cfg.tied(step - 1), final),
            (not cfg.tied(step - 1), final),
            (cfg.tied(step - 1), not final),
        )
    ]
    model.attend = BACKENDS["blocked"][1]
    with torch.no_grad():
        right, *wrong = [model(torch.tensor(tokens[:-1]), torch.tensor(tokens[1:]), ctx).item() for ctx in contexts]
    assert abs(loss - right) < 3e-5  # measured: 2e-6, a sum of 60 losses in another order
    assert all(abs(loss - other) > 1e-4 for other in wrong)  # measured: 2.5e-4 for the window, 0.3 for the tying


def test_where_the_document_ends_the_text_ends(finished, monkeypatch):
    model, step = sample.load(str(finished.checkpoints[-1]), torch.device("cpu"))

    def scripted(model, tokens, ctx):  # "abc" goes on with d, and then nothing but a new document can follow
        return torch.eye(model.cfg.padded_vocab)[[100 if len(tokens) == 4 else BOS]].log()

    monkeypatch.setattr(sample, "softmax_logits", scripted)
    assert list(sample.generate(model, step, [BOS, 97, 98, 99], 20, 1.0, 0, 0)) == [100]


def test_characters_of_several_bytes_survive(finished, capsys):
    assert text(capsys, finished.checkpoints[-1], "--prompt", "é€", "--tokens", "0") == "é€\n"


def test_gpt2_checkpoints_use_the_gpt2_vocabulary(monkeypatch):
    import data.fineweb

    monkeypatch.setattr(data.fineweb, "gpt2_encoding", lambda: "the encoding")
    assert sample.vocabulary(sample.Config()) == "the encoding"


@pytest.mark.parametrize(
    "args, parts",
    [
        (["nowhere.pt"], ("no such file", "give a state_step*.pt")),
        ([__file__], ("another kind of file", "give a state_step*.pt")),
        (["PATH", "--temperature", "nan"], ("--temperature: expected zero or more, found nan; change it",)),
        (["PATH", "--tokens", "-1"], ("--tokens: expected zero or more, found -1; change it",)),
    ],
)
def test_refusals_are_one_sentence(finished, capsys, args, parts):
    assert sample.main([str(finished.checkpoints[-1]) if arg == "PATH" else arg for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("sample.py: ") and all(part in captured.err for part in parts)
