"""`python -m qwenrun`."""

from __future__ import annotations

import sys

from qwenrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
