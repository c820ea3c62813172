"""CPU time of the whole machine, from /proc/stat: Ray's processes do not stay below the one that started them."""

import os
from pathlib import Path


def machine_cpu_seconds() -> float:
    """Seconds that all cores were busy since the machine started. A difference of two counts other programs too."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
