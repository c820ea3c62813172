"""Everything that one rank does to train. No Ray.

- `arguments`: the plan as transformers' TrainingArguments
- `choices`: choices that a trial on a machine decides, stored once per run
- `precision`: the precision that the run began with: named, measured, or the default of its device
- `accumulation`: micro-batches per step, and the trial that decides their number
- `longest_batch`: tries the longest micro-batch before the first step
- `saved_state`: keeps a copy of what a step changes, and puts it back
- `forward`: the forward pass that the run chose: packing and attention kernel
- `ledger`: which rows each step consumed, and the proof that each pass used each row once
- `meter`: counts tokens, operations and the time of each phase
- `peak`: the most that a device can compute, from datasheets or measured
- `prefetch`: prepares the next batch while a step runs
- `token_ids`: token ids of the rows to train on, from the cache of this machine
- `embedding_gradient`: a sparse gradient for the word embeddings
- `checkpointing`: the part of the trainer that saves and loads checkpoints
- `host_copies`: copies of weights and moments, from which a thread writes a checkpoint
- `optimizer_state`: saves and loads optimizer state in one format for every parallelism
- `deepspeed_engine`: everything that changes DeepSpeed's engine
- `guards`: stop a run that cannot succeed: NaN, no learning, ranks that differ or hang
- `callbacks`: record evaluations, checkpoints and progress; stop on preemption
- `shared_loss`: the loss of rows that the ranks share unequally
- `trainer`: SentenceTransformerTrainer with tercet's row order and checkpoints
- `attempt`: one attempt at a run, which rank 0 holds the lease for
- `assembly`: makes what a rank trains with: rows, model, loss, trainer, callbacks
- `worker`: one rank, from the plan to the last commit
"""
