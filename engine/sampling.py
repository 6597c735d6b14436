"""Text from a model: tokens drawn one after the other, and the text that they stand for."""
import codecs
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
        if temperature > 0:
            if 0 < top_k < len(scores):
                scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
            scores = (scores - scores.max()) / temperature  # the largest is 0 however small the temperature
            token = int(torch.multinomial(torch.softmax(scores, 0), 1, generator=generator))
        else:
            token = int(scores.argmax())
        if token == end:
            return
        tokens.append(token)
        yield token


def sample_text(log_probs: Callable[[list[int]], Tensor], encoding, prompt: str, count: int,
                **draws) -> Iterator[str]:
    """Yield the text of up to `count` tokens after a prompt, as it is drawn.

    encoding: a vocabulary of data/encoding.py. draws: temperature, top_k and seed of generate().
    """
    tokens = [encoding.bos, *encoding.encode(prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over tokens
    for token in generate(log_probs, tokens, count, encoding.bos, **draws):
        yield decoder.decode(encoding.decode([token]))
    yield decoder.decode(b"", final=True)
