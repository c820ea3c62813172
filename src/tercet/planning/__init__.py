"""Derive everything from a recipe and storage, or refuse it with reasons. No torch.

- `model_files`: locate the base model, and read its size from its files
- `new_architecture`: stella and GTE models as transformers has them natively
- `gpus`: the memory of the GPUs that workers will use
- `packing`: choose how texts share a forward pass
- `estimates`: estimated memory, tokens and seconds
- `parallelism`: choose the parallelism that fits into memory
- `engine_settings`: settings of DeepSpeed and FSDP2 for a parallelism
- `dataset_plan`: what a dataset version contributes to training
- `problems`: why a recipe cannot work, each problem with a hint
- `plan`: the `TrainPlan`, and its derivation from what the survey found
- `rows`: load the rows of a plan on this machine
- `survey`: read storage and derive the plan
"""
