"""The model class of MiniCPM: Granite's layers under MiniCPM's config, with Llama's tensor names."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, GraniteForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mico.adapters.minicpm_config import MiniCPMConfig


class MiniCPMForCausalLM(GraniteForCausalLM):
    """MiniCPM 1, 2 and 4 with dense attention."""

    config_class = MiniCPMConfig


if CONFIG_MAPPING[MiniCPMConfig.model_type] is MiniCPMConfig:
    AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM, exist_ok=True)
