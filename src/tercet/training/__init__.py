"""What one rank does. No Ray.

- `arguments`: the plan in the words of transformers, and the choice of precision
- `choices`: what a trial on a machine decides, stored once per run
- `forward`: the forward pass that the run chose: packing and attention kernel
- `ledger`: which rows each step consumed, and the proof of it
- `prefetch`: prepares the next batch while a step runs
- `embedding_gradient`: the gradient of the word embeddings, row by row
- `optimizer_state`: the optimizer state in storage: one format for every parallelism
- `deepspeed_engine`: where tercet reaches into the engine of DeepSpeed
- `guards`: end a run that cannot end well: NaN, no learning, ranks that differ or hang
- `callbacks`: evaluations, checkpoints, progress, preemption
- `trainer`: SentenceTransformerTrainer with tercet order and checkpoints
- `attempt`: one attempt at a run, which rank 0 holds the lease for
- `assembly`: makes what a rank trains with: rows, model, loss, trainer, callbacks
- `worker`: one rank, from the plan to the last commit
"""
