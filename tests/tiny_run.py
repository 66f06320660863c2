"""A training run of a second: a model of width 32 on a few small documents, whose batch grows on the way."""

import random
from dataclasses import replace
from pathlib import Path

from minidsv3.optim import Recipe
from minidsv3.train import TrainConfig
from tiny import tiny_config

WORDS = ["self", "return", "items", "values", "key", "for", "in", "not", "None", "x = 1\n", "def f(", "):\n"]
STEPS = 12                    # of `run_config`: four of 3 sequences, then more up to 6


def write_corpus(folder: Path, documents: int = 4) -> Path:
    """`documents` text files of about 150 words each."""
    folder.mkdir(parents=True)
    for number in range(documents):
        words = random.Random(number).choices(WORDS, range(len(WORDS), 0, -1), k=150)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def run_config(corpus: Path, **settings) -> TrainConfig:
    """Twelve steps with every schedule in motion; it saves at steps 4, 8 and 12, and takes two micro-batches a step."""
    recipe = replace(Recipe.preset("nano"), total_tokens=1_600, sequence_length=32, first_batch=3, last_batch=6,
                     ramp_until=900, warmup_until=200, peak_until=800, cosine_until=1_300, low_until=1_500)
    model = tiny_config(vocab_size=280, max_position_embeddings=32)
    return TrainConfig(**{**dict(model=model, recipe=recipe, source=str(corpus), micro_batch=2, save_every=4,
                                 held_out_tokens=500), **settings})
