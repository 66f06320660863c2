"""The corpus: every kind of source, the split by name, and a sentence for whatever is no corpus."""

import json
import sys
from types import SimpleNamespace

import pytest

from minidsv3 import corpus
from minidsv3.corpus import read_corpus


def write_folder(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the text of {name}")
    return root


def names_of(documents):
    return {document.name for document in documents}


def test_standard_library():
    train, held_out = read_corpus()
    names = names_of(train + held_out)
    assert {"ast.py", "asyncio/tasks.py", "pydoc_data/assert"} <= names
    assert not any({"test", "tests", "idlelib", "site-packages", "encodings"} & set(name.split("/")) for name in names)
    share = len(held_out) / len(train + held_out)
    assert 0.03 < share < 0.08
    assert not names_of(train) & names_of(held_out)
    assert not {document.text for document in train} & {document.text for document in held_out}


def test_split_is_by_name_not_by_position(tmp_path):
    before = read_corpus(write_folder(tmp_path, [f"{number}.txt" for number in range(200)]))
    after = read_corpus(write_folder(tmp_path, [f"0{number}.txt" for number in range(200)]))
    assert len(before.held_out) in range(3, 20)
    assert names_of(before.held_out) <= names_of(after.held_out)
    assert names_of(before.train) <= names_of(after.train)


def test_something_is_always_held_out(tmp_path):
    train, held_out = read_corpus(write_folder(tmp_path, ["a.txt", "b.txt"]))
    assert len(train) == len(held_out) == 1


def test_folder_passes_over_hidden_and_binary_files_and_repetition(tmp_path):
    write_folder(tmp_path, ["a.txt", "deep/b.py", ".git/c.txt"])
    (tmp_path / "copy.txt").write_text("the text of a.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes("\xe9t\xe9".encode("latin-1"))
    (tmp_path / "more.jsonl").write_text('{"text": "from jsonl"}\n')
    train, held_out = read_corpus(tmp_path)
    assert names_of(train + held_out) == {"a.txt", "deep/b.py", "more.jsonl:1"}


def test_a_single_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {number} of a long text\n" for number in range(5000)) + "and no newline"
    (tmp_path / "book.txt").write_text(text)
    train, held_out = read_corpus(tmp_path / "book.txt")
    pieces = sorted(train + held_out, key=lambda document: int(document.name.split(":")[1]))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 5 and all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_jsonl(tmp_path):
    texts = [f"text {number} with \n and é" for number in range(30)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in texts) + "\n\n")
    train, held_out = read_corpus(tmp_path / "c.jsonl")
    assert sorted(document.text for document in train + held_out) == sorted(texts)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two", "three"], "id": [1, 2, 3]}), tmp_path / "c.parquet")
    train, held_out = read_corpus(tmp_path / "c.parquet")
    assert {document.text for document in train + held_out} == {"one", "two", "three"}


def test_hub_is_streamed_and_bounded(monkeypatch):
    asked, given = [], []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        for number in range(1000):
            given.append(number)
            yield {"text": f"{number:010d}"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(corpus, "HUB_BYTES", 500)
    train, held_out = read_corpus("hub:owner/name:english")
    assert asked == [(("owner/name", "english"), {"split": "train", "streaming": True})]
    assert len(train + held_out) == 50 and len(given) == 51
    read_corpus("hub:owner/name")
    assert asked[1][0] == ("owner/name", None)


@pytest.mark.parametrize("name, content, sentence", [
    ("missing.txt", None, "there is no corpus at"),
    ("binary.bin", b"\x7fELF\0\1", "is not UTF-8 text"),
    ("latin.txt", b"\xe9t\xe9", "is not UTF-8 text"),
    ("empty.txt", b"", "holds 0 different documents"),
    ("one.txt", b"a single document", "holds 1 different documents"),
    ("c.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "c.jsonl:2 has no string under 'text'"),
    ("c.jsonl", b'{"text": 7}\n', "c.jsonl:1 has no string under 'text'"),
    ("c.jsonl", b'["text"]\n', "c.jsonl:1 has no string under 'text'"),
    ("c.jsonl", b'{"text": "a"}\nno json\n', "c.jsonl:2 is not JSON"),
    ("c.jsonl", b'{"text": "\xff\xfe"}\n', "c.jsonl:1 is not JSON"),
    ("c.jsonl", b'{"text": "\\ud800"}\n', "c.jsonl:1 is no text: surrogates"),
])
def test_what_is_no_corpus(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_corpus(tmp_path / name)


def test_empty_folder(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\0")
    with pytest.raises(ValueError, match="holds 0 different documents"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("source, module", [("c.parquet", "pyarrow"), ("hub:owner/name", "datasets")])
def test_missing_optional_package(tmp_path, monkeypatch, source, module):
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for name in (module, f"{module}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"needs the package {module}; pip install {module}"):
        read_corpus(source if source.startswith("hub:") else tmp_path / source)
