"""Decide whether the workers get GPUs, and say why."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.cluster.autoscaler import can_have
from tercet.config.sections import WorkersConfig
from tercet.errors import PlanError
from tercet.planning.gpus import bytes_of_types


@dataclass(frozen=True)
class Devices:
    """What the workers compute on."""

    use_gpu: bool
    reason: str

    def text(self) -> str:
        """Return the choice and its reason as one line."""
        return f"the workers use {'GPUs' if self.use_gpu else 'CPUs'}: {self.reason}"


def choose_devices(workers: WorkersConfig, address: str) -> Devices:
    """Return whether the workers get one GPU each. Ray must be running.

    address: of the cluster that was joined; empty for one on this machine alone. `auto` means GPUs where there is one
    for each of the fewest workers that the recipe allows, or where the cluster's autoscaler can start machines for
    them; else CPUs. Raises PlanError if `use_gpu: true` can never be satisfied."""
    import ray

    if workers.use_gpu is False:
        return Devices(False, "workers.use_gpu is false")
    needed, num_gpus = workers.min or workers.num_workers, int(ray.cluster_resources().get("GPU", 0))
    place = "the Ray cluster" if address else "this machine"
    has = f"{place} has {_count(num_gpus, 'GPU')}"
    if num_gpus >= needed:
        as_told = "workers.use_gpu is true, and " if workers.use_gpu is True else ""
        return Devices(True, f"{as_told}{has} for {_count(needed, 'worker')}")
    short = has if needed == 1 else f"{has}, and {needed} workers need one each"
    answer = can_have(ray.get_runtime_context().gcs_address, needed, workers.cpus_per_worker, 1) if address else False
    if answer:
        return Devices(True, f"{short}; it can start the missing machines")
    if workers.use_gpu is True:
        if answer is False:
            raise PlanError(
                f"workers.use_gpu is true, but {short}",
                hint=_what_helps(num_gpus, workers) + "set workers.use_gpu to false to train on CPUs",
            )
        limit = f"the start waits for them for {workers.start_timeout_seconds} s at most"
        return Devices(True, f"workers.use_gpu is true; {short}, so {limit}")
    unknown = "; whether it can start machines with GPUs is not known: if it can, set workers.use_gpu to true"
    return Devices(False, short + (unknown if answer is None else ""))


# Ray 2.60 gives a machine this resource for the type of its accelerators.
_TYPE = "accelerator_type:"


def gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU in the cluster; None if a type is unknown, or no machine with one is there
    yet. Ray must be running."""
    import ray

    names = [name.removeprefix(_TYPE) for name in ray.cluster_resources() if name.startswith(_TYPE)]
    return bytes_of_types(names)


def _what_helps(num_gpus: int, workers: WorkersConfig) -> str:
    if num_gpus == 0:
        return ""
    name = "workers.num_workers" if workers.min is None else "workers.min"
    return f"lower {name} to {num_gpus}, or "


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
