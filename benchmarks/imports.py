"""CPU seconds of `tercet --help` and `tercet plan`, interleaved with a bare Python.

python benchmarks/imports.py RECIPE [--runs 11]
"""

import argparse
import resource
import statistics
import subprocess
import sys


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--runs", type=int, default=11)
    arguments = parser.parse_args()
    tercet = [sys.executable, "-m", "tercet.cli"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "tercet --help": [*tercet, "--help"],
        "tercet plan": [*tercet, "plan", arguments.recipe],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(arguments.runs + 1):
        for name, command in commands.items():
            measured = cpu_seconds(command)
            if run:  # the first run fills the caches
                seconds[name].append(measured)
    for name, values in seconds.items():
        print(f"{name:<16} median {statistics.median(values):.3f}  min {min(values):.3f}  max {max(values):.3f} CPU-s")


if __name__ == "__main__":
    main()
