"""Load the model, pack its inputs, shard it, compute its loss.

- `libraries`: imports the libraries quietly
- `collectives`: what all ranks of a process group share
- `sharding`: how the weights are spread over ranks, and gathered again
- `lora`: small trained matrices beside frozen weights
- `encoder`: the model, checked against the recipe, and saved whole
- `loss`: the loss of the recipe, also over given embeddings
- `dropout`: a faster dropout for CPUs
- `grouped_attention`: attention over a row of many texts, in groups of similar lengths
- `packed_attention`: attention over a row of many texts, by a kernel that knows their bounds
- `packed_model`: a model that takes all columns of a batch in one row
"""
