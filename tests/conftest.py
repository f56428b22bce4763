"""The suite runs without a network, without the user's own data, caches and tokens, and on few threads."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Read by huggingface_hub and datasets when they are first imported, which no plugin does before this file.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MICO_DATA_DIR", None)
for name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
):
    os.environ.pop(name, None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mico-tests-")
# The stand-in of the hub is on this machine, whatever proxy leads to others.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# A shell that starts the suite in the background makes it ignore Ctrl-C, and its children after it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny matrices gain nothing from many threads, and oversubscribed ones slow each other several times.
torch.set_num_threads(min(torch.get_num_threads(), 4))

# No deadline: a busy machine is not a failure. In CI the examples are the same every time.
settings.register_profile("mico", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("mico")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Sums of a model depend on them in the last digit: what a test sets, the next does not find."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
