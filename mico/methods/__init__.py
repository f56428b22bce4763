"""Compression methods by name. Adding one: a file with a function of type `Method`, and a row here."""

from mico.methods.method import Layer, LayerResult, Method, StreamProblem
from mico.methods.mico import mico
from mico.methods.sparsegpt import sparsegpt
from mico.methods.wanda import rtn, wanda

METHODS: dict[str, Method] = {
    "mico": mico,
    "sparsegpt": sparsegpt,
    "gptq": sparsegpt,  # the same sweep; mico/settings.py refuses a sparsity for it
    "wanda": wanda,
    "rtn": rtn,
}
PAIRED = frozenset({"mico"})  # methods that need the dense model's inputs beside the compressed model's

__all__ = ["METHODS", "PAIRED", "Layer", "LayerResult", "Method", "StreamProblem"]
