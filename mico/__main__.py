"""`python -m mico` is `mico`."""

from __future__ import annotations

import sys

from mico.cli import main

if __name__ == "__main__":
    sys.exit(main())
