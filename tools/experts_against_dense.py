"""Does sparsity pay at nano's size? Pairs of runs: 4 of 16 experts against dense networks of equal active width.

    python tools/experts_against_dense.py            three pairs, about ten minutes on one core

Claim, written before the runs: experts reach a lower held-out loss in every pair. A pair has one seed, one order of
the data and the same number of tokens; a token goes through 4 + 1 experts of width 128, or one network of width 640.
Learning rates, balance loss and biases are those of the nano recipe; MTP is off on both sides. Documents are cut into
short pieces: a step sees 1,024 tokens, and with whole files these would be one place in one file.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from minidsv3 import ModelConfig, Transformer, cost
from minidsv3.data import Document, PackedBatches, held_out_batches, read_corpus, train_tokenizer, unigram_entropy
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.train import evaluate, train_step

OUT = Path(__file__).parents[1] / "results" / "experts_against_dense.json"
SEEDS, TOKENS, LENGTH, SEQUENCES = (0, 1, 2), 200_704, 128, 8
PIECE = 500                             # characters

EXPERTS = ModelConfig.preset("nano", intermediate_size=640, num_nextn_predict_layers=0)
MODELS = {"experts": EXPERTS, "dense": EXPERTS.replace(first_k_dense_replace=EXPERTS.num_hidden_layers)}
RECIPE = replace(Recipe.preset("nano", TOKENS), sequence_length=LENGTH, first_batch=SEQUENCES, last_batch=SEQUENCES,
                 first_mtp_weight=0.0, last_mtp_weight=0.0)


def run(config: ModelConfig, seed: int, pieces: list[Document], tokenizer, held_out) -> dict[str, float]:
    """One training run: held-out loss in nats a token, and seconds of processor time."""
    torch.manual_seed(seed)
    model = Transformer(config)
    optimizer = AdamW(parameter_groups(model, RECIPE.weight_decay), betas=RECIPE.betas)
    data = PackedBatches(pieces, tokenizer, LENGTH, seed)
    began = time.process_time()
    for seen in range(0, TOKENS, LENGTH * SEQUENCES):
        train_step(model, optimizer, RECIPE, data.next(SEQUENCES), seen)
    seconds = time.process_time() - began
    return {"loss": round(evaluate(model, held_out), 4), "seconds": round(seconds, 1)}


def main() -> None:
    torch.set_num_threads(1)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train, EXPERTS.vocab_size, sample_bytes=2 << 20)
    held_out = held_out_batches(corpus.held_out, tokenizer, LENGTH, SEQUENCES)[:32]
    pieces = [Document(document.name, document.text[i:i + PIECE]) for document in corpus.train
              for i in range(0, len(document.text), PIECE)]
    pairs = []
    for seed in SEEDS:
        pairs.append({"seed": seed} | {name: run(config, seed, pieces, tokenizer, held_out)
                                       for name, config in MODELS.items()})
        print(pairs[-1], flush=True)
    parameters = {name: {"stored": cost.parameters(config).learned, "used": cost.active_parameters(config).learned}
                  for name, config in MODELS.items()}
    found = {"command": "python tools/experts_against_dense.py", "tokens": TOKENS, "parameters": parameters,
             "unigram": round(unigram_entropy(corpus.train, held_out, tokenizer), 4), "pairs": pairs}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
