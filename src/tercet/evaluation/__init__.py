"""Metrics, results row by row, statistics, the gate.

- `evaluators`: the evaluators of sentence-transformers, sharing one encoding, and the loss of a split
- `evaluate`: metrics of a model on a frozen split
- `row_results`: what a model does on each row of a split
- `measurement`: the row results of one model, kept in storage
- `paired`: two models on the same rows: the difference, and how sure it is
- `gate`: promote the candidate or not
- `comparison`: two measurements to a decision, and what a new model means for an index
- `label_check`: whether the labels of new rows look wrong
"""
