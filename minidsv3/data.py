"""From documents to batches: byte-level BPE, fill-in-the-middle, and packing end to end.

Report section 4.1. Documents are packed into full sequences with no padding and no mask between samples; one in ten is
reordered so that the model learns to fill a hole (prefix, suffix, middle: PSM). The tokenizer is trained here, small,
with the report's idea that punctuation and the line break after it may become one token. The report also splits some of
those combined tokens at random, at a rate that it does not state; that is not done here.

Tokens are made when they are needed and nothing is cached on disk: where a run stands is two integers.
"""

import math
import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minidsv3.corpus import Corpus, Document, read_corpus

__all__ = ["Batch", "Corpus", "Document", "MixedBatches", "PackedBatches", "bits_per_byte", "encode",
           "fill_in_the_middle", "held_out_batches", "read_corpus", "train_tokenizer", "unigram_entropy"]

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"
SPECIAL_TOKENS = [BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END]      # ids 0 to 4; bos and eos stand where the hub has them
SAMPLE_BYTES = 8 << 20                                         # enough text to count pairs and tokens by

# What BPE may merge: up to three digits, a word with the blank before it, punctuation with the line break after it,
# line breaks with the blanks before them, blanks.
PIECES = r"\p{N}{1,3}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# ---- tokens ---------------------------------------------------------------------------------------------------------

def train_tokenizer(documents: list[Document], vocab_size: int, sample_bytes: int = SAMPLE_BYTES) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, trained on the first `sample_bytes` bytes of the documents.

    Every byte is in the vocabulary, so that decoding an encoding gives back any text. Ids 0 to 4 are `SPECIAL_TOKENS`.
    A small corpus may yield fewer than `vocab_size` tokens. Raises ValueError if bytes and special tokens do not fit.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; it must hold all bytes and special tokens, which are {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(_sample(documents, sample_bytes), trainer)
    return tokenizer


def _sample(documents: list[Document], size: int) -> Iterator[str]:
    """The documents' texts up to about `size` bytes; the last one may be cut."""
    for document in documents:
        if size <= 0:
            return
        yield document.text[:size]
        size -= len(document.text.encode())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's ids. A special token spelled out in the text is text: only code here may write ids 0 to 4."""
    tokenizer.encode_special_tokens = True      # set at each call, for the tokenizer's file does not keep it
    return tokenizer.encode(text, add_special_tokens=False).ids


def fill_in_the_middle(tokenizer: Tokenizer, text: str, start: int, end: int) -> list[int]:
    """Ids of `fim_begin prefix fim_hole suffix fim_end middle eos`, the hole being `text[start:end]` (section 4.1).

    Cuts lie between characters, not tokens, because nobody who asks to fill a hole knows where tokens end
    (Bavarian et al. 2022, arXiv 2207.14255).
    """
    begin, hole, finish, eos = (_id(tokenizer, token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS))
    prefix, middle, suffix = (encode(tokenizer, part) for part in (text[:start], text[start:end], text[end:]))
    return [begin, *prefix, hole, *suffix, finish, *middle, eos]


def _id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no token {token}; use one from train_tokenizer")
    return index


# ---- batches --------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    tokens: Tensor       # [B, T+1] int64: inputs tokens[:, :-1], targets tokens[:, 1:]
    documents: Tensor    # [B, T+1] int64: equal numbers belong to one document, which ends with eos


def _rows(tokens: list[int], documents: list[int], length: int) -> Batch:
    """Cuts a stream into rows of length+1; a row's last token is also the next row's first."""
    return Batch(*(torch.tensor(stream).unfold(0, length + 1, length).contiguous() for stream in (tokens, documents)))


class PackedBatches:
    """Endless training batches: every epoch all documents in a new order, end to end, in rows of `length`+1 tokens.

    Neighbouring rows share one token, the target of one and the first input of the next, so that each token of the
    stream is a target exactly once and `next(B)` moves on by B * `length` tokens, whatever B the last call had. A
    document starts right after the eos of the one before, without bos. Order, choice and cuts of fill-in-the-middle
    follow from (seed, epoch, document) alone, which makes resuming exact: `state_dict()` is JSON and goes with the same
    documents, tokenizer, seed and rate; `length` may differ, as it does when a context is extended.

    Raises ValueError for no documents, a length below 1, a rate outside [0, 1] and a state of another stream.
    """

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, length: int, seed: int, fim_rate: float = 0.1):
        if not documents:
            raise ValueError("there are no documents to pack; give at least one")
        if length < 1:
            raise ValueError(f"length is {length}; a sequence needs at least 1 token to predict")
        if not 0 <= fim_rate <= 1:
            raise ValueError(f"fim_rate is {fim_rate}; it is the share of documents to reorder, between 0 and 1")
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self.seed, self.fim_rate = seed, fim_rate
        self._eos = _id(tokenizer, EOS)
        self._epoch = -1
        self._open(0, offset=0)

    def next(self, sequences: int) -> Batch:
        """The next batch of `sequences` rows. Raises ValueError if that is less than 1."""
        if sequences < 1:
            raise ValueError(f"sequences is {sequences}; a batch needs at least 1")
        wanted = sequences * self.length + 1
        tokens: list[int] = []
        documents: list[int] = []
        while len(tokens) < wanted:
            if self._offset == len(self._tokens):
                self._open(self._number + 1, offset=0)
            piece = self._tokens[self._offset:self._offset + wanted - len(tokens)]
            tokens += piece
            documents += [self._number] * len(piece)
            self._offset += len(piece)
        self._offset -= 1        # the last target is the next row's first input
        return _rows(tokens, documents, self.length)

    def _open(self, number: int, offset: int) -> None:
        """Turns to the `number`-th document since the first epoch began."""
        epoch, position = divmod(number, len(self.documents))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.documents)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        self._number, self._offset = number, offset
        self._tokens = self._encode(self._order[position])

    def _encode(self, index: int) -> list[int]:
        chance = random.Random(f"{self.seed}/{self._epoch}/{index}")
        text = self.documents[index].text
        if chance.random() < self.fim_rate:
            return fill_in_the_middle(self.tokenizer, text, *sorted(chance.choices(range(len(text) + 1), k=2)))
        return [*encode(self.tokenizer, text), self._eos]

    @property
    def epoch(self) -> int:
        """How many times every document has been read."""
        return self._epoch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: the document's number since the first epoch began, the token in it, whose stream."""
        return {"document": self._number, "offset": self._offset, "stream": self._stream()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where `state` was taken. Raises ValueError if that was another stream or no state of one."""
        if set(state) != {"document", "offset", "stream"}:
            raise ValueError(f"{state} is no position in a data stream; it has the keys document, offset and stream")
        if state["stream"] != self._stream():
            raise ValueError("the saved data position belongs to other documents, or to another tokenizer, seed or "
                             "fim_rate; resume with those that the run began with")
        self._open(state["document"], state["offset"])
        if not 0 <= self._offset <= len(self._tokens):
            raise ValueError(f"the saved data position is token {self._offset} of a document that has "
                             f"{len(self._tokens)}; it is damaged")

    def _stream(self) -> int:
        """A checksum of everything that decides the order of tokens."""
        checksum = zlib.crc32(f"{self.seed}/{self.fim_rate}/{self.tokenizer.to_str()}".encode())
        for document in self.documents:
            checksum = zlib.crc32(document.text.encode(), checksum)
        return checksum


class MixedBatches:
    """Training batches whose rows come from different documents.

    Row r of the run is the next row of lane r mod `lanes`. Each lane is a `PackedBatches` over its own share of the
    documents. Rows of one stream stand side by side in one file, so a small batch of them is nearly one sample: nano
    ended at 4.95 nats with it (0.8 M tokens), at 4.20 with lanes (0.9 M). The state is one position a lane; everything
    else, and what is refused, is as in `PackedBatches`.
    """

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, length: int, seed: int, fim_rate: float = 0.1,
                 lanes: int = 64):
        if not documents:
            raise ValueError("there are no documents to pack; give at least one")
        count = min(lanes, len(documents))
        self._lanes = [PackedBatches(documents[lane::count], tokenizer, length, seed, fim_rate)
                       for lane in range(count)]
        self._row = 0

    def next(self, sequences: int) -> Batch:
        """The next batch of `sequences` rows; document numbers are unique in the batch. Raises ValueError below 1."""
        if sequences < 1:
            raise ValueError(f"sequences is {sequences}; a batch needs at least 1")
        lanes = [row % len(self._lanes) for row in range(self._row, self._row + sequences)]
        rows = [self._lanes[lane].next(1) for lane in lanes]
        self._row += sequences
        return Batch(torch.cat([row.tokens for row in rows]),
                     torch.cat([row.documents * len(self._lanes) + lane for lane, row in zip(lanes, rows)]))

    def state_dict(self) -> dict:
        """The rows taken so far and where each lane stands; JSON."""
        return {"row": self._row, "lanes": [lane.state_dict() for lane in self._lanes]}

    def load_state_dict(self, state: dict) -> None:
        """Goes to where `state` was taken. Raises ValueError if that was another stream or no state of one."""
        if set(state) != {"row", "lanes"} or len(state["lanes"]) != len(self._lanes):
            raise ValueError(f"a data position with keys {sorted(state)} is none of {len(self._lanes)} lanes; "
                             "resume with the documents that the run began with")
        self._row = state["row"]
        for lane, position in zip(self._lanes, state["lanes"]):
            lane.load_state_dict(position)


# ---- measuring on what is held out ----------------------------------------------------------------------------------

def held_out_batches(documents: list[Document], tokenizer: Tokenizer, length: int, sequences: int) -> list[Batch]:
    """The documents once, in their order, packed as in `PackedBatches` but without fill-in-the-middle.

    Batches have `sequences` rows of `length`+1 tokens, the last one perhaps fewer; tokens that fill no row are dropped.
    Raises ValueError if the documents do not fill a single row.
    """
    eos = _id(tokenizer, EOS)
    tokens: list[int] = []
    numbers: list[int] = []
    for number, document in enumerate(documents):
        ids = [*encode(tokenizer, document.text), eos]
        tokens += ids
        numbers += [number] * len(ids)
    if len(tokens) <= length:
        raise ValueError(f"the held-out documents have {len(tokens)} tokens; a sequence of length {length} needs "
                         f"{length + 1}")
    whole = _rows(tokens, numbers, length)
    return [Batch(*rows) for rows in zip(whole.tokens.split(sequences), whole.documents.split(sequences), strict=True)]


def _targets(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.tokens[:, 1:].flatten() for batch in batches])


def bits_per_byte(loss: float, batches: list[Batch], tokenizer: Tokenizer) -> float:
    """Turns the mean loss (nats a target of `batches`) into bits a byte of text, which no choice of tokenizer flatters.

    A special token covers no byte; what it costs to predict it counts all the same.
    """
    spelled = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    size = torch.tensor([0 if token in SPECIAL_TOKENS else len(token) for token in spelled])   # one character a byte
    targets = _targets(batches)
    return loss * len(targets) / (math.log(2) * int(size[targets].sum()))


def unigram_entropy(documents: list[Document], batches: list[Batch], tokenizer: Tokenizer,
                    sample_bytes: int = SAMPLE_BYTES) -> float:
    """The loss to beat, in nats a token: what `batches` cost a model that knows only how frequent each token is.

    Frequencies are counted on (training) `documents`, up to `sample_bytes` bytes, plus one for every token of the
    vocabulary, so that a token never seen has a finite price.
    """
    counts = torch.ones(tokenizer.get_vocab_size(), dtype=torch.float64)
    eos = _id(tokenizer, EOS)
    for text in _sample(documents, sample_bytes):
        counts += torch.bincount(torch.tensor([*encode(tokenizer, text), eos]), minlength=len(counts))
    return -(counts / counts.sum()).log()[_targets(batches)].mean().item()
