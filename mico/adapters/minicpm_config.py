"""The config of MiniCPM (Hu et al. 2024) in terms of Granite's, whose layers scale at the same places.

Imported right after AutoConfig (mico/plugin.py). The model's class, which takes much longer to import, is registered
when the first config is made: nobody gets to the model without one.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.models.granite.configuration_granite import GraniteConfig

DERIVED = ("embedding_multiplier", "attention_multiplier", "logits_scaling")  # Granite's fields, not saved


@strict
class MiniCPMConfig(GraniteConfig):
    """Fields and defaults of the original config; Granite's are derived from them.

    scale_emb multiplies the embeddings; dim_model_base / hidden_size the logits; scale_depth / sqrt(layers) what each
    half of a layer adds. The last is saved as `residual_multiplier`, so that a model cut to fewer layers keeps it.
    """

    model_type = "minicpm"

    tie_word_embeddings: bool = True
    head_dim: int | None = None
    scale_emb: float | int = 1
    scale_depth: float | int = 1
    dim_model_base: float | int = 1
    residual_multiplier: float | int | None = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # the code beside the original weights is not needed
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.embedding_multiplier = self.scale_emb
        self.attention_multiplier = self.head_dim**-0.5
        self.logits_scaling = self.hidden_size / self.dim_model_base
        if self.residual_multiplier is None:
            self.residual_multiplier = self.scale_depth / math.sqrt(self.num_hidden_layers)
        super().__post_init__(**kwargs)
        if isinstance(self.rope_parameters, dict) and self.rope_parameters.get("rope_type") == "longrope":
            # The original scales attention by the two lengths alone: sqrt(1 + ln(max / original) / ln original).
            self.rope_parameters.pop("factor", None)
        import_module("mico.adapters.minicpm_model")

    def to_dict(self) -> dict[str, Any]:
        """The original fields, and `residual_multiplier`."""
        return {key: value for key, value in super().to_dict().items() if key not in DERIVED}


if MiniCPMConfig.model_type not in CONFIG_MAPPING:  # a transformers that knows it has come first
    AutoConfig.register(MiniCPMConfig.model_type, MiniCPMConfig)
