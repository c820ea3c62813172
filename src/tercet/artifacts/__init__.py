"""What runs leave in storage.

- `lease`: one attempt at a time may commit
- `checkpoint`: what a checkpoint is, and when it counts
- `best`: the best checkpoint of a run, and how long the others are kept
- `uploader`: uploads checkpoints off the training path
- `journal`: the events and incidents of a run
- `training_log`: metrics of each evaluation, and the log of a finished training
- `report`: the result of a run, as a document and as a page
- `decision`: what a gate decided, with every number it rests on
- `champion`: the pointer to the version that serves, and its history
- `registry`: published versions of a model, and promotion
"""
