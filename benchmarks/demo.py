"""Wall and CPU seconds of the demo, by stage, in an empty folder.

python benchmarks/demo.py [--set a.b=value]…

CPU seconds count the whole machine, so nothing else may run.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu import machine_cpu_seconds

STAGES = ("data", "start", "train", "test", "publish")


def stage_of(store: Path) -> str:
    """The present stage, from the run's events."""
    stage = "data"
    for path in store.glob("runs/*/events.jsonl"):
        for line in path.read_text().splitlines():
            name, _, what = json.loads(line)["event"].partition(" ")
            stage = name if what == "started" else stage
    return stage


def main() -> None:
    """Run the demo in a new folder and print the seconds of each stage."""
    wall, cpu = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    with tempfile.TemporaryDirectory(prefix="tercet-demo-") as folder:
        store = Path(folder) / "store"
        command = [sys.executable, "-m", "tercet.cli", "demo", "--set", f"storage.uri={store}", *sys.argv[1:]]
        child = subprocess.Popen(command)
        last_wall, last_cpu = time.monotonic(), machine_cpu_seconds()
        while child.poll() is None:
            time.sleep(0.2)
            now, used, stage = time.monotonic(), machine_cpu_seconds(), stage_of(store)
            wall[stage] += now - last_wall
            cpu[stage] += used - last_cpu
            last_wall, last_cpu = now, used
    print(f"\n{'stage':<10} {'wall s':>8} {'CPU s':>8}")
    for stage in STAGES:
        print(f"{stage:<10} {wall[stage]:>8.1f} {cpu[stage]:>8.1f}")
    print(f"{'all':<10} {sum(wall.values()):>8.1f} {sum(cpu.values()):>8.1f}")
    sys.exit(child.returncode)


if __name__ == "__main__":
    main()
