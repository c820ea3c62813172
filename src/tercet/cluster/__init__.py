"""Ray around the worker: the only wing that imports ray.

- `session`: joins or starts a Ray cluster, and waits no longer than its head lives
- `devices`: whether the workers get GPUs, and why
- `autoscaler`: whether the cluster can grow
- `process_group`: the process group of the workers, without torch in the driver
- `policies`: scaling and failure policies inside the controller of Ray Train
- `failures`: what ended the workers, from Ray's and torch's errors
- `train`: runs the workers to the end, or raises why they did not get there
- `metrics`: the throughput of each rank in Ray's own metrics
- `jobs`: runs on a remote cluster, through Ray Jobs
"""
