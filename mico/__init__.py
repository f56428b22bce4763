"""mico: post-training compression of language models, measured in true bits."""

__version__ = "0.1.0"
