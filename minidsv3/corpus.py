"""Where the text comes from: a corpus is two lists of documents, one to train on and one that is held out.

Without an argument it is text that lies on every machine: the sources of Python's standard library and the language
reference in `pydoc_data`. A file, a folder, JSONL, parquet or a dataset of the hub can take its place.

The report (section 4.1) asks for little redundancy and complete documents: identical texts are kept once, and what is
held out is decided for whole documents, by a hash of their name. A split by position would hold out whatever happens to
stand last, and would move with every file that is added.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.05
HUB_BYTES = 256 << 20            # a hub dataset is streamed up to here: it may be larger than any machine
FILE_PIECE = 16 << 10            # a single text file is cut into documents of about this many characters
NOT_PROSE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
             "encodings",        # tables of code points
             "pydoc_data"}       # read as text below, not as the Python literal that holds it


class Document(NamedTuple):
    name: str
    text: str


class Corpus(NamedTuple):
    train: list[Document]
    held_out: list[Document]     # in the order of the name's hash, so that any prefix is a fair sample


def read_corpus(source: str | Path | None = None) -> Corpus:
    """Reads a corpus and holds out about 5 % of its documents.

    `source` is None (Python's standard library), a text file, a `.jsonl` file (one object a line, the text under
    `text`), a `.parquet` file (column `text`), a folder of these (searched to the bottom; hidden and binary files are
    passed over), or `hub:owner/name` with an optional `:configuration` (split `train`, column `text`, the first
    256 MiB). A single text file becomes documents of about 16 KiB, cut at line ends.

    Raises ValueError when there is nothing at `source`, when it holds no text, a record without text or fewer than two
    different documents, and when an optional package is missing.
    """
    documents = _different(_documents(source), source)
    held_out = [document for document in documents if _share(document) < HELD_OUT_SHARE] or documents[:1]
    names = {document.name for document in held_out}
    return Corpus([document for document in documents if document.name not in names], held_out)


def _share(document: Document) -> float:
    """A number in [0, 1) that depends on nothing but the document's name."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64


def _different(documents: Iterator[Document], source: str | Path | None) -> list[Document]:
    """Every text once, blank ones left out, in the order of the name's hash."""
    kept: dict[bytes, Document] = {}
    for document in documents:
        try:
            content = document.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{document.name} is no text: {error.reason} at character {error.start}") from error
        if content.strip():
            kept.setdefault(hashlib.sha256(content).digest(), document)
    if len(kept) < 2:
        raise ValueError(f"the corpus {source or 'of the standard library'} holds {len(kept)} different documents with "
                         "text; at least 2 are needed, one to train on and one to hold out")
    return sorted(kept.values(), key=_share)


# ---- sources --------------------------------------------------------------------------------------------------------

def _documents(source: str | Path | None) -> Iterator[Document]:
    if source is None:
        return _standard_library()
    if str(source).startswith("hub:"):
        return _hub(str(source))
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    raise ValueError(f"there is no corpus at {path}; give a text file, a folder, .jsonl, .parquet or hub:owner/name")


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not NOT_PROSE.intersection(parts) and not path.name.startswith("_sysconfigdata"):
            text = _text(path)
            if text is not None:
                yield Document("/".join(parts), text)
    for topic, text in import_module("pydoc_data.topics").topics.items():
        yield Document(f"pydoc_data/{topic}", text)


def _folder(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if path.suffix in (".jsonl", ".parquet"):
            yield from _file(path)
        elif (text := _text(path)) is not None:
            yield Document("/".join(parts), text)


def _file(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif (text := _text(path)) is None:
        raise ValueError(f"{path} is not UTF-8 text; give a text file, .jsonl or .parquet")
    else:
        for number, piece in enumerate(_pieces(text)):
            yield Document(f"{path.name}:{number}", piece)


def _text(path: Path) -> str | None:
    """The file's text, or None if it is binary."""
    content = path.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= FILE_PIECE:
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _jsonl(path: Path) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:      # neither JSON nor, which json.loads checks first, UTF-8
                raise ValueError(f"{path.name}:{number} is not JSON ({error}); each line must be one object") from error
            yield _record(record, f"{path.name}:{number}")


def _record(record: object, name: str) -> Document:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{name} has no string under 'text'; every record needs one")
    return Document(name, text)


def _parquet(path: Path) -> Iterator[Document]:
    parquet = _optional("pyarrow.parquet", f"reading {path}")
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield _record(record, f"{path.name}:{number}")


def _hub(source: str) -> Iterator[Document]:
    datasets = _optional("datasets", f"streaming {source}")
    name, _, configuration = source.removeprefix("hub:").partition(":")
    size = 0
    for number, record in enumerate(datasets.load_dataset(name, configuration or None, split="train", streaming=True)):
        document = _record(record, f"{source}:{number}")
        size += len(document.text.encode(errors="replace"))
        if size > HUB_BYTES:
            return
        yield document


def _optional(module: str, purpose: str):
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{purpose} needs the package {package}; pip install {package}") from error
