"""The door: ``python -m aam.train COMMAND``, installed also as ``aam COMMAND``."""

from __future__ import annotations

import sys

from aam.cli import main

if __name__ == "__main__":
    sys.exit(main())
