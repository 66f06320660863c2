"""Who holds what: one model on gpus = pp x dp GPUs, with dp = edp x ep (report section 3.2).

    pp    pipeline ranks: each holds one stage or two (places.py)
    dp    GPUs with the same stages. Each takes micro-batches of its own; all of the model but the experts is repeated
    ep    GPUs of a dp group that share out a layer's routed experts
    edp   copies of each expert: dp / ep

The report trains on 2048 GPUs with pp 16 and ep 64 over 8 nodes, so dp is 128 and edp 2; the last two are derived.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..config import ModelConfig
from ..cost import Weight, layer_weights, main_weights, mtp_weights
from .places import chains, places
from .schedule import ORDERS, Orders
from .stage import split

NODE = 8                            # GPUs that NVLink joins (section 3.1)


class Piece(NamedTuple):
    """A stage: its number in the chain, its layers of the main model, and which end of the model it holds."""

    stage: int
    layers: range
    first: bool         # the embedding
    last: bool          # the final norm, the head, the MTP modules


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model laid out over GPUs. `micro_batches` are those of one pipeline in one step, each one sequence.

    Raises ValueError if the GPUs, the experts, the layers or the micro-batches cannot be shared out like that.
    """

    config: ModelConfig
    gpus: int
    pp: int
    ep: int
    micro_batches: int
    sequence: int = 4096            # tokens
    schedule: str = "dualpipe"

    def __post_init__(self):
        for name in ("gpus", "pp", "ep", "micro_batches", "sequence"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.schedule not in ORDERS:
            raise ValueError(f"schedule is {self.schedule!r}; it must be one of {', '.join(ORDERS)}")
        if self.gpus % self.pp:
            raise ValueError(f"{self.gpus} GPUs do not divide into pp = {self.pp} pipeline ranks; "
                             "gpus must be a multiple of pp")
        if self.dp % self.ep:
            raise ValueError(f"ep is {self.ep}; it must divide gpus / pp = {self.dp}, the GPUs with the same stages")
        if self.config.n_routed_experts % self.ep:
            raise ValueError(f"ep is {self.ep}; it must divide the {self.config.n_routed_experts} routed experts "
                             "of a layer")
        if self.ep % self.nodes:
            raise ValueError(f"ep is {self.ep}; it must stand on {self.nodes} nodes of {NODE} GPUs in equal numbers")
        self.orders, self.pieces        # both refuse what they cannot do

    @property
    def dp(self) -> int:
        return self.gpus // self.pp

    @property
    def edp(self) -> int:
        return self.dp // self.ep

    @property
    def nodes(self) -> int:
        """Nodes on which the ranks of ep stand."""
        return -(-self.ep // NODE)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.dp * self.micro_batches * self.sequence

    @cached_property
    def orders(self) -> Orders:
        """What each pipeline rank does, in order."""
        return ORDERS[self.schedule](self.pp, self.micro_batches)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The model cut into the stages of one chain: 2 pp of them if the schedule folds it, else pp."""
        stages = chains(self.schedule, self.pp).length
        return [Piece(stage, layers, stage == 0, stage == stages - 1)
                for stage, layers in enumerate(split(self.config, stages))]

    def held(self, rank: int) -> list[Piece]:
        """The stages that pipeline rank `rank` holds, in the model's order."""
        positions = sorted(place.position for place in places(self.schedule, self.pp, rank))
        return [self.pieces[position] for position in positions]

    def weights(self, rank: int) -> list[Weight]:
        """Every tensor on one GPU of pipeline rank `rank`, each layer's own; of the routed experts its share."""
        held = self.held(rank)
        ends = any(piece.first for piece in held) and any(piece.last for piece in held)
        return [weight._replace(copies=weight.copies // self.ep) if weight.part == "routed" else weight
                for piece in held for weight in piece_weights(self.config, piece, shared_embedding=ends)]

    @cached_property
    def copies(self) -> list[tuple[str, int]]:
        """What the pipeline ranks together hold twice: a sentence and the number of values."""
        ranks = [self.held(rank) for rank in range(self.pp)]
        twice = [piece for piece in self.pieces if sum(piece in held for held in ranks) > 1]
        mirrored = sum(count(piece_weights(self.config, piece, shared_embedding=True)) for piece in twice)
        apart = sum(any(piece.last for piece in held) and not any(piece.first for piece in held) for held in ranks)
        embedding = self.config.vocab_size * self.config.hidden_size * (self.config.num_nextn_predict_layers > 0)
        found = [("stages that two mirrored ranks hold", mirrored),
                 ("the embedding, at the last stage, where MTP reads it", apart * embedding)]
        return [(what, values) for what, values in found if values]


def piece_weights(config: ModelConfig, piece: Piece, shared_embedding: bool) -> list[Weight]:
    """The tensors of one stage, each layer's own, with every routed expert.

    The MTP modules use the head of their own stage, and the embedding of the first one if their rank holds that too
    (section 3.2.3: "physical sharing"); else they need a copy.
    """
    embedding, *_, norm, head = main_weights(config)
    weights = [weight for layer in piece.layers for weight in layer_weights(config, config.is_moe(layer))]
    weights += [embedding] * piece.first
    if piece.last:
        module = mtp_weights(config.replace(num_nextn_predict_layers=1))
        own = [weight for weight in module if weight.part not in ("embedding", "head")]
        weights += [norm, head] + own * config.num_nextn_predict_layers
        weights += [embedding] * bool(config.num_nextn_predict_layers and not shared_embedding)
    return weights


def count(weights: Iterable[Weight]) -> int:
    """Values in all copies."""
    return sum(weight.size * weight.copies for weight in weights)
