"""Metrics, results row by row, statistics, the gate.

- `encodings`: embeddings of the texts of one evaluation, shared by its evaluators and its ranks
- `gpu_miner`: a model as the miner of hard negatives uses it, on a GPU
- `nearest`: the nearest texts of each query, in blocks of bounded memory
- `evaluators`: the evaluators of sentence-transformers, sharing one encoding, and the loss of a split
- `evaluate`: metrics of a model on a frozen split
- `row_results`: results of a model on each row of a split; nDCG and MRR of a ranked list
- `measurement`: the row results of one model, kept in storage and measured once
- `paired`: two models on the same rows: the difference, and how certain it is
- `gate`: the decision whether the candidate replaces the reference
- `comparison`: from two measured models to a decision, and what a new model changes for an index
- `label_check`: a warning if the labels of new rows look wrong
"""
