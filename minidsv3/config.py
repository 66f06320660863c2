"""The shape of a DeepSeek-V3 model: one dataclass with the field names of the hub's `config.json`, and three presets.

Report sections 2 (architecture) and 4.2 (the full-size values). `nano` trains on two CPU cores, `mini` on one GPU and
`full` is the published 671 B model; all three run the same code. Fields below the line "ours" exist on no hub: they say
how to initialise, and settle two points that the report and the released weights describe differently.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be a DeepSeek-V3; the sentence names the field, its value and what would be right."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's context extension (section 4.3): frequencies are interpolated by `factor` below a ramp of wavelengths.

    `mscale` and `mscale_all_dim` follow the released code: cos and sin are multiplied by the ratio of the two
    temperatures, the whole attention logit by the square of the second (see `attention.softmax_scale`).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            _require(_is_number(value) or (value is None and field.name.startswith("mscale")),
                     f"rope_scaling.{field.name} is {value!r}; it must be a number")
        _require(self.factor >= 1, f"rope_scaling.factor is {self.factor}; YaRN stretches, so it must be at least 1")
        _require(self.original_max_position_embeddings > 0,
                 f"rope_scaling.original_max_position_embeddings is {self.original_max_position_embeddings}; "
                 "it is the context of pre-training and must be positive")
        _require(self.beta_fast > self.beta_slow > 0,
                 f"rope_scaling has beta_fast {self.beta_fast} and beta_slow {self.beta_slow}; "
                 "beta_fast must be the larger of two positive numbers of rotations")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that decides the shape and the arithmetic of a `Transformer`.

    Defaults are the published 671 B model. Raises `ConfigError` (a ValueError) for values that do not fit together.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3              # the first layers have a dense FFN
    intermediate_size: int = 18432              # width of that dense FFN
    # multi-head latent attention (section 2.1.1)
    num_attention_heads: int = 128
    q_lora_rank: int = 1536                     # d_c'
    kv_lora_rank: int = 512                     # d_c, what the cache holds
    qk_nope_head_dim: int = 128                 # d_h
    qk_rope_head_dim: int = 64                  # d_h^R
    v_head_dim: int = 128
    # DeepSeekMoE (section 2.1.2)
    n_routed_experts: int = 256                 # N_r
    num_experts_per_tok: int = 8                # K_r
    n_shared_experts: int = 1                   # N_s
    moe_intermediate_size: int = 2048
    n_group: int = 8                            # nodes
    topk_group: int = 4                         # M: a token visits at most this many nodes
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5          # in the released config only; the report has no such factor
    # multi-token prediction (section 2.2)
    num_nextn_predict_layers: int = 1           # D
    # positions and norms
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = YarnScaling(factor=40, original_max_position_embeddings=4096)
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 0
    eos_token_id: int = 1
    # ours
    init_std: float | None = None               # None: 0.006 at width 7168 (section 4.2), same gate spread at others
    mtp_order: str = "embedding_first"          # eh_proj reads [emb ; h] in the weights, [h ; emb] in eq. 21
    mtp_hidden: str = "post_norm"               # h^0 after the final norm (engines, transformers), or "pre_norm"

    def __post_init__(self):
        self._validate()
        if self.init_std is None:
            object.__setattr__(self, "init_std", 0.006 * math.sqrt(7168 / self.hidden_size))

    def _validate(self) -> None:
        zero_is_fine = {"first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts",
                        "bos_token_id", "eos_token_id"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _require(isinstance(value, int) and not isinstance(value, bool),
                         f"{field.name} is {value!r}; it must be a whole number")
                least = 0 if field.name in zero_is_fine else 1
                _require(value >= least, f"{field.name} is {value}; it must be at least {least}")
            elif field.type is bool:
                _require(isinstance(value, bool), f"{field.name} is {value!r}; it must be True or False")
            elif field.type is float or (field.name == "init_std" and value is not None):
                _require(_is_number(value) and value > 0, f"{field.name} is {value!r}; it must be a positive number")
        _require(self.rope_scaling is None or isinstance(self.rope_scaling, YarnScaling),
                 f"rope_scaling is {self.rope_scaling!r}; it must be None or a YarnScaling")
        _require(self.qk_rope_head_dim % 2 == 0,
                 f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number")
        _require(self.first_k_dense_replace <= self.num_hidden_layers,
                 f"first_k_dense_replace is {self.first_k_dense_replace}; "
                 f"the model has only {self.num_hidden_layers} layers")
        _require(max(self.bos_token_id, self.eos_token_id) < self.vocab_size,
                 f"bos_token_id {self.bos_token_id} and eos_token_id {self.eos_token_id} "
                 f"must lie below vocab_size {self.vocab_size}")
        _require(self.mtp_order in ("embedding_first", "hidden_first"),
                 f"mtp_order is {self.mtp_order!r}; "
                 "it must be 'embedding_first' (released weights) or 'hidden_first' (eq. 21)")
        _require(self.mtp_hidden in ("post_norm", "pre_norm"),
                 f"mtp_hidden is {self.mtp_hidden!r}; it must be 'post_norm' or 'pre_norm'")
        self._validate_groups()

    def _validate_groups(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        _require(experts % groups == 0, f"n_group is {groups}; it must divide n_routed_experts, which is {experts}")
        per_group = experts // groups
        _require(per_group >= 2,
                 f"n_group is {groups} for n_routed_experts {experts}: a group holds {per_group} expert, "
                 "but its score is the sum of its two best, so it needs at least 2")
        _require(self.topk_group <= groups,
                 f"topk_group is {self.topk_group}; there are only n_group = {groups} groups to choose from")
        _require(self.num_experts_per_tok <= self.topk_group * per_group,
                 f"num_experts_per_tok is {self.num_experts_per_tok}; the {self.topk_group} chosen groups hold only "
                 f"{self.topk_group * per_group} experts")

    # ---- derived ------------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part (192 at full size)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has experts; MTP modules (layer >= num_hidden_layers) always do."""
        return layer >= self.first_k_dense_replace

    @property
    def moe_layers(self) -> int:
        """How many layers have a router, MTP modules included."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    # ---- presets and the hub ------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides) -> "ModelConfig":
        """The preset `name`, with any field overridden.

        `nano` (2 CPU cores, 12.1 M parameters), `mini` (one GPU, 1.24 B) or `full` (671 B).
        """
        _require(name in PRESETS, f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(overrides) - known)
        _require(not unknown, f"{', '.join(unknown)} is no field of ModelConfig; "
                              f"its fields are {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_hub(cls, source: str | Path | dict) -> "ModelConfig":
        """Reads a hub `config.json`: a dict, the file, or a folder that holds it.

        Understands the published file and what transformers 5 writes (`rope_parameters`, no `scoring_func`, MTP 0).
        Whatever this code would compute differently (another scoring function, biases, tied embeddings) is refused.
        """
        hub = dict(source) if isinstance(source, dict) else _read_config_file(Path(source))
        for key, right in ONLY.items():
            value = hub.get(key, right)
            _require(value == right,
                     f"{key} is {value!r}; DeepSeek-V3 has {right!r} and this code computes nothing else")
        heads, kv_heads = hub.get("num_attention_heads"), hub.get("num_key_value_heads")
        _require(kv_heads in (None, heads),
                 f"num_key_value_heads is {kv_heads}; latent attention expands one key for each of the {heads} heads")
        rope = dict(hub.get("rope_parameters") or hub.get("rope_scaling") or {})
        known = {field.name for field in fields(cls)} - {"rope_scaling", "rope_theta"}
        values = {key: value for key, value in hub.items() if key in known and value is not None}
        absent = sorted(known - values.keys() - MAY_BE_ABSENT)
        _require(not absent,
                 f"the config has no {', '.join(absent)}; a DeepSeek-V3's config.json gives a value for each")
        values |= {key: value for key, value in hub.get("minidsv3", {}).items() if key in OURS}
        theta = rope.pop("rope_theta", hub.get("rope_theta", 10000.0))
        return cls(**values, rope_theta=float(theta), rope_scaling=_yarn_from_hub(rope))

    def to_hub(self) -> dict:
        """The hub's `config.json` as a dict; our own fields travel under the key `minidsv3`, which others ignore."""
        hub = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **asdict(self), **ONLY,
               "num_key_value_heads": self.num_attention_heads, "initializer_range": 0.02, "attention_dropout": 0.0,
               "ep_size": 1, "use_cache": True}
        hub["minidsv3"] = {name: hub.pop(name) for name in OURS}
        if self.rope_scaling is not None:
            yarn = {key: value for key, value in asdict(self.rope_scaling).items() if value is not None}
            hub["rope_scaling"] = {"type": "yarn", **yarn}
        return hub

    def replace(self, **overrides) -> "ModelConfig":
        """The same configuration with some fields changed (and checked again)."""
        return replace(self, **overrides)


# Fields of the hub's file for which V3 has one value and this code knows no other.
ONLY = {"attention_bias": False, "hidden_act": "silu", "moe_layer_freq": 1, "rope_interleave": True,
        "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_method": "noaux_tc"}
ROPE_ONLY = {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}

OURS = ("init_std", "mtp_order", "mtp_hidden")
# Fields that a hub's file may leave out: then the dataclass's value holds.
# A missing width would mean the 671 B model's.
MAY_BE_ABSENT = {"norm_topk_prob", "num_nextn_predict_layers", "rms_norm_eps", "bos_token_id", "eos_token_id", *OURS}

PRESETS: dict[str, dict] = {
    "full": {},
    "mini": dict(
        vocab_size=32768, hidden_size=1024, num_hidden_layers=12, first_k_dense_replace=1, intermediate_size=2816,
        num_attention_heads=16, q_lora_rank=512, kv_lora_rank=256,
        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
        n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=512, n_group=8, topk_group=4,
        max_position_embeddings=4096, rope_scaling=None),
    "nano": dict(
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, first_k_dense_replace=1, intermediate_size=768,
        num_attention_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=128, n_group=4, topk_group=2,
        max_position_embeddings=1024, rope_scaling=None),
}


def _read_config_file(path: Path) -> dict:
    file = path / "config.json" if path.is_dir() else path
    _require(file.is_file(), f"there is no config.json at {path}; a checkpoint folder holds one beside its weights")
    try:
        hub = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); it should be a hub config.json") from error
    _require(isinstance(hub, dict), f"{file} holds a {type(hub).__name__}; a hub config.json is one object in braces")
    return hub


def _yarn_from_hub(rope: dict) -> YarnScaling | None:
    """`rope_scaling` of the hub or `rope_parameters` of transformers 5, without its `rope_theta`."""
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    _require(kind in ("default", "yarn"),
             f"the rotary embedding is of type {kind!r}; DeepSeek-V3 has 'default' or 'yarn'")
    if kind == "default":
        return None
    for key, right in ROPE_ONLY.items():
        value = rope.pop(key, right)
        _require(value in (right, None), f"rope_scaling.{key} is {value!r}; DeepSeek-V3 has {right!r} and this code "
                                         "computes nothing else")
    known = {field.name for field in fields(YarnScaling)}
    unknown = sorted(rope.keys() - known)
    absent = sorted({"factor", "original_max_position_embeddings"} - rope.keys())
    _require(not unknown, f"rope_scaling has {', '.join(unknown)}, which this code does not know; "
                          f"YaRN has {', '.join(sorted(known))}")
    _require(not absent, f"rope_scaling has no {', '.join(absent)}; YaRN needs it")
    return YarnScaling(**{"mscale": None, "mscale_all_dim": None} | rope)
