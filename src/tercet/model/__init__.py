"""Loads the model, packs its inputs, shards it, and computes its loss.

- `libraries`: imports the machine-learning libraries and silences their notices
- `devices`: the device on which a process computes
- `precision`: the precisions that a device has, and computing in one of them
- `collectives`: communication among the ranks of a process group
- `sharding`: checks how weights are distributed over ranks, and gathers them
- `lora`: adds an adapter beside frozen weights, and merges it to publish
- `encoder`: loads the recipe's model, checks it, and saves it whole
- `host_model`: takes the trained weights on the host, to be written from there
- `saved_form`: proves before the first step that the model can be saved and loaded again
- `loss`: makes the recipe's loss, and computes it from embeddings
- `determinism`: the same bits again on a GPU
- `dropout`: a fast dropout for CPUs
- `weight_casts`: changes the weights of a layer to 16 bits at once
- `text_groups`: cuts texts, sorted by length, into groups of similar length
- `grouped_attention`: attention over a row of texts, as matrices over groups of similar length
- `fused_attention`: attention over a row of texts in one kernel of a GPU, after a trial
- `packed_attention`: attention over a row of texts, by the best kernel for the device
- `row`: makes one row of the texts of a batch, and runs a model on it
- `packed_model`: makes a model take all columns of a batch in one row
- `packing_trial`: decides by a trial on a small random copy whether a model can be packed
"""
