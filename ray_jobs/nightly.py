"""Entry point for `ray job submit` every night: new rows, a run, the champion kept or replaced.

ray job submit --working-dir . -- python ray_jobs/nightly.py my.yaml
"""

import sys

from tercet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["nightly", *sys.argv[1:]]))
