"""The life of a run, and of a night.

- `model_card`: README.md of a published model
- `run`: one run: survey, plan, workers, evaluation, publish, report
- `mining`: hard negatives for a dataset version
- `onnx_export`: a published version as one ONNX file
- `publishers`: notify others of a new champion
- `nightly`: one night: new rows, a run, a comparison, a decision
"""
