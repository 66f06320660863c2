"""minidsv3: DeepSeek-V3 small enough to read, complete enough to train. Start with notebooks/00_overview.ipynb."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import ConfigError, ModelConfig
from .generate import generate
from .model import Transformer

__all__ = ["ConfigError", "ModelConfig", "Transformer", "generate", "load_checkpoint", "save_checkpoint"]
