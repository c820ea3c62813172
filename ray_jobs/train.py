"""Entry point for `ray job submit`: run a recipe.

ray job submit --working-dir . -- python ray_jobs/train.py my.yaml
"""

import sys

from tercet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
