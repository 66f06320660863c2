"""Tokens, fill-in-the-middle, packing and resuming, and what is measured on held-out text."""

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from minidsv3 import data
from minidsv3.data import (SPECIAL_TOKENS, Document, MixedBatches, PackedBatches, bits_per_byte, encode,
                           fill_in_the_middle, held_out_batches, train_tokenizer, unigram_entropy)

EOS, BEGIN, HOLE, END = 1, 2, 3, 4
SOURCE = "def f(x):\n    return x + 1234567\n\n\nclass A:\n    name = 'é'\n    def g(self):\n        return f(self)\n"


def documents(count=7):
    """Documents of very unequal lengths, one of them shorter than a sequence."""
    return [Document(f"{number}.py", f"# file {number}\n" + SOURCE * (number * number % 5)) for number in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(), vocab_size=300)


def split_at_eos(tokens):
    pieces = [[]]
    for token in tokens:
        pieces[-1].append(token)
        if token == EOS:
            pieces.append([])
    return pieces[:-1]


# ---- tokens ---------------------------------------------------------------------------------------------------------

def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.id_to_token(index) for index in range(5)] == SPECIAL_TOKENS
    assert tokenizer.get_vocab_size() == 300


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize("text", ["\r\n\t \u2028", "1234567890", " a  b\n\n c", "\U0001f600\u200d e\u0301", "a_b:\n"])
def test_decoding_gives_back_awkward_text(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_special_token_in_a_text_is_text(tokenizer):
    text = "".join(SPECIAL_TOKENS) + " x"
    reloaded = Tokenizer.from_str(tokenizer.to_str())
    for each in (tokenizer, reloaded):
        assert min(encode(each, text)) >= len(SPECIAL_TOKENS)
        assert each.decode(encode(each, text)) == text
    careless = Tokenizer.from_str(tokenizer.to_str())           # what the test would see without the precaution
    assert min(careless.encode(text).ids) == 0


def test_tokenizer_is_deterministic_and_survives_its_file(tokenizer):
    again = train_tokenizer(documents(), vocab_size=300)
    assert again.to_str() == tokenizer.to_str() == Tokenizer.from_str(tokenizer.to_str()).to_str()


def test_pieces_keep_words_digits_and_line_ends_apart(tokenizer):
    cut = [text for text, _ in tokenizer.pre_tokenizer.pre_tokenize_str("return x[12345]:\n\n    y = a_b")]
    assert cut == ["return", "Ġx", "[", "123", "45", "]:ĊĊ", "ĠĠĠ", "Ġy", "Ġ=", "Ġa", "_", "b"]


def test_sample_is_bounded():
    known = train_tokenizer([Document("a", "aaaa aaaa " * 50), Document("b", "zzzz" * 100)], 300, sample_bytes=400)
    assert "Ġaaaa" in known.get_vocab() and "zz" not in known.get_vocab()


def test_vocabulary_must_hold_every_byte():
    with pytest.raises(ValueError, match="vocab_size is 260; it must hold all bytes and special tokens, which are 261"):
        train_tokenizer(documents(), 260)


# ---- fill in the middle ---------------------------------------------------------------------------------------------

def read_back(tokenizer, ids):
    """The text of a document in PSM form, put in its order again."""
    hole, end = ids.index(HOLE), ids.index(END)
    assert ids[0] == BEGIN and ids[-1] == EOS and hole < end
    return tokenizer.decode(ids[1:hole]) + tokenizer.decode(ids[end + 1:-1]) + tokenizer.decode(ids[hole + 1:end])


def test_fill_in_the_middle_spells_prefix_suffix_middle(tokenizer):
    ids = fill_in_the_middle(tokenizer, "abcdef", 2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=False) == \
        "<|fim_begin|>ab<|fim_hole|>def<|fim_end|>c<|end_of_sentence|>"


@pytest.mark.parametrize("start, end", [(0, 0), (0, len(SOURCE)), (5, 60), (62, 63), (len(SOURCE), len(SOURCE))])
def test_fill_in_the_middle_loses_nothing(tokenizer, start, end):
    assert read_back(tokenizer, fill_in_the_middle(tokenizer, SOURCE, start, end)) == SOURCE


def test_rate_of_fill_in_the_middle(tokenizer):
    many = [Document(str(number), "a text") for number in range(2000)]
    stream = PackedBatches(many, tokenizer, length=50, seed=0)
    tokens = stream.next(200).tokens[:, :-1].flatten().tolist()
    pieces = split_at_eos(tokens)
    assert 0.08 < sum(piece[0] == BEGIN for piece in pieces) / len(pieces) < 0.12
    assert tokens.count(BEGIN) == tokens.count(HOLE) == tokens.count(END)


def test_cuts_differ_between_epochs_and_documents(tokenizer):
    texts = documents()
    stream = PackedBatches(texts, tokenizer, length=20, seed=0, fim_rate=1.0)
    seen = split_at_eos(stream.next(400).tokens[:, :-1].flatten().tolist())
    assert stream.epoch >= 2
    assert sorted(read_back(tokenizer, ids) for ids in seen[:7]) == sorted(text.text for text in texts)
    longest = [ids for ids in seen if len(ids) > 100]
    assert len({tuple(ids) for ids in longest}) == len(longest)


def test_a_tokenizer_without_the_tokens_is_refused():
    with pytest.raises(ValueError, match="has no token <|end_of_sentence|>"):
        PackedBatches(documents(), Tokenizer(models.BPE()), length=8, seed=0)


# ---- packing --------------------------------------------------------------------------------------------------------

def test_an_epoch_holds_every_document_once_end_to_end(tokenizer):
    texts = documents()
    stream = PackedBatches(texts, tokenizer, length=16, seed=3, fim_rate=0.0)
    rows = stream.next(120)
    assert rows.tokens.shape == rows.documents.shape == (120, 17)
    assert rows.tokens.dtype == rows.documents.dtype == torch.int64
    tokens = rows.tokens[:, :-1].flatten().tolist()
    pieces = [tokenizer.decode(piece) for piece in split_at_eos(tokens)]
    orders = [pieces[:7], pieces[7:14], [text.text for text in texts]]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_neighbouring_rows_share_one_token_within_and_between_calls(tokenizer):
    stream = PackedBatches(documents(), tokenizer, length=16, seed=0)
    first, second = stream.next(3), stream.next(2)
    for name in ("tokens", "documents"):
        rows = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(rows[:-1, -1], rows[1:, 0])


def test_document_numbers_change_exactly_after_eos(tokenizer):
    rows = PackedBatches(documents(), tokenizer, length=16, seed=0).next(200)
    change = rows.documents.diff(dim=1)
    assert torch.equal(change, (rows.tokens[:, :-1] == EOS).long())
    assert rows.documents[-1, -1] > 3 * len(documents())        # numbers go on through the epochs


def test_the_seed_decides(tokenizer):
    def first(seed):
        return PackedBatches(documents(), tokenizer, length=16, seed=seed).next(20).tokens
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def resume_differs(tokenizer, cases=30):
    """Whether some run that stops at a random step, perhaps in a later epoch, differs from the one that did not."""
    chance = random.Random(0)
    for case in range(cases):
        sizes = [chance.randint(1, 9) for _ in range(chance.randint(2, 40))]
        cut = chance.randint(0, len(sizes) - 1)
        whole = PackedBatches(documents(), tokenizer, length=11, seed=case, fim_rate=0.5)
        expected = [whole.next(size) for size in sizes][cut:]
        stopped = PackedBatches(documents(), tokenizer, length=11, seed=case, fim_rate=0.5)
        for size in sizes[:cut]:
            stopped.next(size)
        resumed = PackedBatches(documents(), tokenizer, length=11, seed=case, fim_rate=0.5)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        got = [resumed.next(size) for size in sizes[cut:]]
        if not all(torch.equal(a, b) for pair in zip(got, expected, strict=True) for a, b in zip(*pair, strict=True)):
            return True
    return False


def test_stopped_and_resumed_equals_uninterrupted(tokenizer):
    assert not resume_differs(tokenizer)


@pytest.mark.parametrize("key", ["document", "offset"])
def test_that_test_sees_a_position_that_is_one_off(tokenizer, monkeypatch, key):
    state_dict = PackedBatches.state_dict
    def one_off(stream):
        state = state_dict(stream)
        return {**state, key: max(state[key] - 1, 0)}
    monkeypatch.setattr(PackedBatches, "state_dict", one_off)
    try:
        assert resume_differs(tokenizer)
    except ValueError as error:
        assert "is damaged" in str(error)       # the wrong document is shorter than the offset


def test_how_the_stream_is_cut_into_batches_changes_nothing(tokenizer):
    one = PackedBatches(documents(), tokenizer, length=12, seed=0).next(30)
    stream = PackedBatches(documents(), tokenizer, length=12, seed=0)
    many = torch.cat([stream.next(size).tokens for size in (1, 9, 20)])
    assert torch.equal(one.tokens, many)


def test_a_longer_context_goes_on_where_the_shorter_one_stopped(tokenizer):
    short = PackedBatches(documents(), tokenizer, length=8, seed=0)
    last = short.next(5).tokens[-1, -1]
    longer = PackedBatches(documents(), tokenizer, length=64, seed=0)
    longer.load_state_dict(short.state_dict())
    assert longer.next(1).tokens[0, 0] == last


@pytest.mark.parametrize("changes, sentence", [
    ({"seed": 1}, "belongs to other documents, or to another tokenizer, seed or fim_rate"),
    ({"fim_rate": 0.2}, "belongs to other documents"),
    ({"documents": documents(6)}, "belongs to other documents"),
    ({"tokenizer": train_tokenizer(documents(), 290)}, "belongs to other documents"),
])
def test_the_state_of_another_stream_is_refused(tokenizer, changes, sentence):
    options = {"documents": documents(), "tokenizer": tokenizer, "length": 8, "seed": 0}
    other = PackedBatches(**{**options, **changes})
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(PackedBatches(**options).state_dict())


def test_what_is_no_state_is_refused(tokenizer):
    stream = PackedBatches(documents(), tokenizer, length=8, seed=0)
    with pytest.raises(ValueError, match="it has the keys document, offset and stream"):
        stream.load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="is token 100000 of a document that has"):
        stream.load_state_dict({**stream.state_dict(), "offset": 100000})


@pytest.mark.parametrize("changes, sentence", [
    ({"documents": []}, "there are no documents to pack"),
    ({"length": 0}, "length is 0; a sequence needs at least 1 token"),
    ({"fim_rate": 1.5}, "fim_rate is 1.5; it is the share of documents"),
])
def test_wrong_arguments_are_refused(tokenizer, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PackedBatches(**{"documents": documents(), "tokenizer": tokenizer, "length": 8, "seed": 0, **changes})


def test_a_batch_of_nothing_is_refused(tokenizer):
    with pytest.raises(ValueError, match="sequences is 0"):
        PackedBatches(documents(), tokenizer, length=8, seed=0).next(0)


# ---- held-out text --------------------------------------------------------------------------------------------------

def test_held_out_batches_are_the_documents_in_order(tokenizer):
    texts = documents()
    batches = held_out_batches(texts, tokenizer, length=16, sequences=4)
    expected = [token for text in texts for token in [*encode(tokenizer, text.text), EOS]]
    inputs = torch.cat([batch.tokens[:, :-1].flatten() for batch in batches]).tolist()
    targets = torch.cat([batch.tokens[:, 1:].flatten() for batch in batches]).tolist()
    assert inputs == expected[:len(inputs)] and targets == expected[1:len(targets) + 1]
    assert len(expected) - len(targets) <= 16
    assert [len(batch.tokens) for batch in batches[:-1]] == [4] * (len(batches) - 1)


def test_held_out_text_must_fill_a_row(tokenizer):
    with pytest.raises(ValueError, match="a sequence of length 1000 needs 1001"):
        held_out_batches(documents(2), tokenizer, length=1000, sequences=1)


def test_bits_per_byte_counts_the_bytes_of_the_targets(tokenizer):
    text = "7" + "é€ text\n" * 4
    ids = encode(tokenizer, text)
    assert ids[0] == tokenizer.token_to_id("7")
    batches = held_out_batches([Document("a", text)], tokenizer, length=len(ids), sequences=1)
    count, size = len(ids), len(text.encode()) - 1          # "7" is no target; eos is one, but covers nothing
    assert bits_per_byte(1.0, batches, tokenizer) == pytest.approx(count / math.log(2) / size, rel=1e-12)


def test_uniform_bytes_cost_eight_bits():
    bytewise = train_tokenizer([Document("a", "ab")], 261)
    batches = held_out_batches([Document("a", "any text at all, é")], bytewise, length=10, sequences=1)
    assert bits_per_byte(math.log(256), batches, bytewise) == pytest.approx(8)


def test_unigram_entropy_by_hand():
    bytewise = train_tokenizer([Document("a", "ab")], 261)
    batches = held_out_batches([Document("b", "zab")], bytewise, length=3, sequences=1)     # targets: a, b, eos
    got = unigram_entropy([Document("a", "aab"), Document("b", "a")], batches, bytewise)
    # counted: a 3, b 1, eos 2, and one more for each of 261 tokens
    expected = -(math.log(4 / 267) + math.log(2 / 267) + math.log(3 / 267)) / 3
    assert got == pytest.approx(expected, rel=1e-12)


# ---- mixing documents in a batch ------------------------------------------------------------------------------------

def mixed(tokenizer, lanes=3, **changes):
    documents = [Document(f"{name}.py", f"{name} = 1\n" * 40) for name in ("alpha", "beta", "gamma", "delta", "eta")]
    return MixedBatches(**dict(documents=documents, tokenizer=tokenizer, length=16, seed=5, lanes=lanes) | changes)


def test_mixed_rows_are_the_lanes_rows_in_turn(tokenizer):
    batches = mixed(tokenizer)
    lanes = mixed(tokenizer)._lanes
    batch = batches.next(7)
    want = torch.cat([lanes[row % 3].next(1).tokens for row in range(7)])
    assert torch.equal(batch.tokens, want)


def test_neighbouring_mixed_rows_come_from_different_documents(tokenizer):
    batch = mixed(tokenizer).next(12)
    for above, below in zip(batch.documents[:-1], batch.documents[1:]):
        assert not set(above.tolist()) & set(below.tolist())


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_mixed_batches_stopped_and_resumed_equal_uninterrupted(tokenizer, cut):
    whole, first, second = mixed(tokenizer), mixed(tokenizer), mixed(tokenizer)
    sizes = [3, 1, 5, 2, 8, 4, 1, 6, 7, 3, 2, 9]
    want = [whole.next(size) for size in sizes]
    for size in sizes[:cut]:
        first.next(size)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for size, batch in zip(sizes[cut:], want[cut:]):
        assert all(torch.equal(got, expected) for got, expected in zip(second.next(size), batch))


def test_a_mixed_state_of_other_lanes_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lanes"):
        mixed(tokenizer, lanes=2).load_state_dict(mixed(tokenizer).state_dict())
