"""What runs leave in storage.

- `lease`: one attempt at a time may commit
- `checkpoint`: files of every rank, and the commit that makes them count
- `best`: the best model of a run, and which checkpoints are kept
- `tensor_file`: writes safetensors files, and hashes them on the way
- `uploader`: writes and uploads checkpoints in the background
- `journal`: the events and incidents of a run
- `precision`: the precision that a run chose when it began
- `training_log`: metrics of each evaluation, and the log of a finished training
- `throughput`: how fast a run trained, and where its time went
- `report`: the result of a run, as a document and as a page
- `decision`: a decision of the gate, with every number that it rests on
- `champion`: the pointer to the version that serves, and its history
- `registry`: published versions of a model, and promotion
"""
