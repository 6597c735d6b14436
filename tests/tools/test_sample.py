"""Text from a checkpoint: the model of the run, reproducible draws, and refusals."""


import pytest
import torch
from tests.helpers.commands import python
from tests.helpers.runs import BOS, make_shards, run
from tests.helpers.tiny import docs_of

from data import encoding
from data.errors import UsageError, run_program
from data.loader import Batch
from engine.sampling import generate, next_log_probs
from tools import sample


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has learned the order of the alphabet, with a checkpoint on the way and one at the end."""
    lengths = "--train_steps=60 --extension_steps=6 --max_epochs=9 --window_final=48".split()
    saves = "--save_every=30 --save_final=1 --val_every=30 --ngram_rows=50".split()
    result = run(make_shards(tmp_path_factory.mktemp("sample")), *lengths, *saves)
    assert (result.code, result.err) == (0, "")
    return result


def text(capsys, path, *args: str) -> str:
    assert run_program(sample.main, [str(path), *args]) == 0
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
def test_log_probabilities_are_those_of_the_validation_after_that_step(finished, which, final):
    """The mean of the log probabilities that sampling sees, over a document, is the loss that evaluation
    computes there: with the window and the tying of that step."""
    model, step = sample.load_model(str(finished.checkpoints[which]), torch.device("cpu"))
    cfg = model.cfg
    tokens = [BOS, *(97 + (3 * i * i + i) % 26 for i in range(60))]  # longer than the window
    log_probs = next_log_probs(model, step)
    loss = -sum(log_probs(tokens[:n])[tokens[n]].item() for n in range(1, len(tokens)))

    docs = docs_of([60])
    tied = cfg.tied(step - 1)
    inputs, targets = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    rows = model.ngrams.read(Batch(inputs, targets, docs))
    found = []
    for one, long, ngrams in (
            (tied, final, rows), (not tied, final, rows), (tied, not final, rows), (tied, final, 0 * rows)):
        context = model.context(docs, step - 1, long, ngrams)._replace(table=model.table(one))
        with torch.no_grad():
            found.append(model.evaluate(inputs, targets, context).item())
    right, *wrong = found
    assert abs(loss - right) < 3e-5  # measured: 2e-6, a sum of 60 losses in another order
    # Measured: 2.5e-4 for another window, 0.3 for another tying; the last one is without n-grams.
    assert all(abs(loss - other) > 1e-4 for other in wrong)


def test_where_the_document_ends_the_text_ends():
    def log_probs(tokens):  # "abc" goes on with d, and then nothing but a new document can follow
        return torch.eye(257)[100 if len(tokens) == 4 else BOS].log()

    assert list(generate(log_probs, [BOS, 97, 98, 99], 20, BOS)) == [100]


def test_the_smallest_temperatures_take_the_likeliest_token():
    likely = torch.tensor([-3.0, -0.1, -3.0])
    for temperature in (0.0, 1e-9, 1e-320):
        assert list(generate(lambda tokens: likely, [0], 3, 2, temperature, top_k=2)) == [1, 1, 1]


def test_characters_of_several_bytes_survive_or_become_question_marks(finished, capsys):
    assert text(capsys, finished.checkpoints[-1], "--prompt", "é€", "--tokens", "0") == "é€\n"
    command = "-m", "tools.sample", finished.checkpoints[-1], "--prompt", "é€a", "--tokens", "0"
    done = python(*command, PYTHONIOENCODING="ascii")  # a screen without such characters
    assert (done.returncode, done.stdout, done.stderr) == (0, "??a\n", "")


def test_the_vocabulary_follows_from_the_token_that_starts_a_document(monkeypatch):
    monkeypatch.setattr(encoding, "gpt2_encoding", lambda network: "the encoding")
    assert encoding.encoding_for(sample.Config().bos_id) == "the encoding"
    assert isinstance(encoding.encoding_for(256), encoding.ByteEncoding)
    with pytest.raises(UsageError, match="found 60; their vocabulary is not known"):
        encoding.encoding_for(60)


REFUSED = {  # arguments -> what the one sentence says
    ("nowhere.pt",): "no such file",
    (__file__,): "another kind of file",
    ("PATH", "--temperature", "nan"): "--temperature: expected zero or more, found nan; change it",
    ("PATH", "--prompt", "a\udcff"): "--prompt: expected UTF-8 text, found byte 0xff; correct it",
    ("PATH", "--tokens", "-1"): "--tokens: expected zero or more, found -1; change it",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_sentence(finished, capsys, args):
    given = [str(finished.checkpoints[-1]) if arg == "PATH" else arg for arg in args]
    assert run_program(sample.main, given, "sample.py") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("sample.py: ") and REFUSED[args] in captured.err


@pytest.mark.parametrize("change", ({"model_dim": 2**32}, {"num_layers": 1000}, {"bigram_rows": 2**50},
                                    {"model_dim": 64}, {"ngram_rows": 2**50}), ids=str)
def test_a_checkpoint_that_claims_another_size_is_refused(finished, capsys, tmp_path, change):
    state = torch.load(finished.checkpoints[-1], weights_only=True)
    state["config"].update(change)
    torch.save(state, tmp_path / "claims.pt")
    assert run_program(sample.main, [str(tmp_path / "claims.pt")], "sample.py") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "expected the weights of its own settings" in captured.err
