"""``python -m inductor_sparse``."""

from __future__ import annotations

import sys

from inductor_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
