"""Text from a model: tokens drawn one after the other, and the text that they stand for."""
import codecs
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data.loader import Batch, Docs

PADDING = 256  # sequence lengths are multiples of it, so that a model keeps tables for few of them


def next_log_probs(model, step: int) -> Callable[[list[int]], Tensor]:
    """Return log_probs(tokens): (V,) of the token after a document that begins with `tokens`. model: a GPT of
    train_gpt.py; its windows and tying are those of the validation after `step`."""
    cfg, device = model.cfg, model.head.device
    final = step == cfg.train_steps

    @torch.no_grad()
    def log_probs(tokens: list[int]) -> Tensor:
        seen = tokens[-2 * cfg.window_final:]
        n = len(seen)
        padding = PADDING - n % PADDING
        T = n + padding
        x = torch.tensor(seen + [cfg.bos_id] * padding, device=device)
        ids = (torch.arange(T, device=device) >= n).int()  # the padding is a document of its own
        starts = torch.tensor([0, n, T], dtype=torch.int32, device=device)
        docs = Docs(starts, ids, T)
        ngrams = model.ngrams.read_alone(Batch(x, x, docs)) if model.ngrams is not None else None
        context = model.context(docs, max(step - 1, 0), final, ngrams)
        return model.log_probs(x, context)[n - 1, :cfg.vocab_size]

    return log_probs


def generate(log_probs: Callable[[list[int]], Tensor], prompt: list[int], count: int, end: int,
             temperature: float = 0.8, top_k: int = 0, seed: int = 0) -> Iterator[int]:
    """Yield up to `count` tokens that go on from `prompt`, which is one document from its first token on.

    log_probs(tokens): (V,) log probabilities of the token after a document that begins with these. Ends
    before the token `end`, with which the model ends the document. temperature: 0 takes the likeliest token.
    top_k: draw from so many of the likeliest, 0 from all. seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        scores = log_probs(tokens).double().cpu()
        if temperature == 0:
            token = int(scores.argmax())
        else:
            if 0 < top_k < len(scores):
                least = scores.topk(top_k).values[-1]
                scores[scores < least] = -torch.inf
            scores = (scores - scores.max()) / temperature  # the largest is 0 however small the temperature
            probabilities = torch.softmax(scores, 0)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end:
            return
        tokens.append(token)
        yield token


def sample_text(log_probs: Callable[[list[int]], Tensor], encoding, prompt: str, count: int,
                **draws) -> Iterator[str]:
    """Yield the text of up to `count` tokens after a prompt, as it is drawn. encoding: a vocabulary of
    data/encoding.py. draws: temperature, top_k and seed of generate()."""
    tokens = [encoding.bos, *encoding.encode(prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens
    for token in generate(log_probs, tokens, count, encoding.bos, **draws):
        yield decoder.decode(encoding.decode([token]))
    yield decoder.decode(b"", final=True)
