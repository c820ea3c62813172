"""`python -m tercet.cli`: the command line where `tercet` is not on the PATH."""

from __future__ import annotations

import sys

from tercet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
