"""Image-text data for calibration and training. sources -> inputs; what other rooms use is listed here."""

from mico.image_text.inputs import UNLABELLED, Pairs, chat_text, collate, encode, pairs
from mico.image_text.sources import ImageTextSource, Picture, Sample, chosen, is_image_text, load_image_text

__all__ = [
    "UNLABELLED",
    "ImageTextSource",
    "Pairs",
    "Picture",
    "Sample",
    "chat_text",
    "chosen",
    "collate",
    "encode",
    "is_image_text",
    "load_image_text",
    "pairs",
]
