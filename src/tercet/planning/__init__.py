"""Everything derived from a recipe and storage, or a refusal. No torch.

- `model_files`: where the base model comes from, and what its files say
- `packing`: how texts share a forward pass, decided from the model files
- `estimates`: estimated memory, tokens and seconds
- `parallelism`: the parallelism that fits
- `engine_settings`: the parallelism in the words of DeepSpeed and FSDP2
- `dataset_plan`: what a dataset version contributes to training
- `problems`: what cannot work, each problem with a hint
- `plan`: recipe and storage to a TrainPlan
- `rows`: the rows of a plan on this machine
- `survey`: reads storage and derives the plan
"""
