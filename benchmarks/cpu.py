"""CPU time of the whole machine, from /proc/stat: Ray's processes are not children of the one that starts them."""

import os
from pathlib import Path


def machine_cpu_seconds() -> float:
    """Seconds that all cores together were busy since the machine started, with every program on it."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
