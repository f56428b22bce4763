"""The suite runs without a network, without the user's own data folder, and on few threads."""

from __future__ import annotations

import os
import signal

import torch
from hypothesis import settings

# Read by huggingface_hub and datasets when they are first imported, which no plugin does before this file.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MICO_DATA_DIR", None)

# A shell that starts the suite in the background makes it ignore Ctrl-C, and its children after it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny matrices gain nothing from many threads, and oversubscribed ones slow each other several times.
torch.set_num_threads(min(torch.get_num_threads(), 4))

# No deadline: a busy machine is not a failure. In CI the examples are the same every time.
settings.register_profile("mico", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("mico")
