"""The life of a run, and of a night: the stages in order.

- `model_card`: README.md of a published model
- `run`: one run: survey, plan, train, evaluate on the test split, publish, report
- `mining`: hard negatives for a dataset version
- `onnx_export`: a published version as one ONNX file
- `publishers`: notifications of a new champion: ONNX export, Hub, MLflow, webhook
- `nightly`: one night: new rows, a run, a comparison, a decision
"""
