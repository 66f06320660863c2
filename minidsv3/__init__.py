"""minidsv3: DeepSeek-V3 small enough to read, complete enough to train. Start with notebooks/00_overview.ipynb."""

from .config import ConfigError, ModelConfig
from .model import Transformer

__all__ = ["ConfigError", "ModelConfig", "Transformer"]
