"""A published version as one ONNX file, from tokens to embedding. It is valid only after it was measured again.

torch's exporter is used directly: sentence-transformers exports through optimum, which needs transformers < 4.58.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.artifacts.checkpoint import FileRecord, upload_files
from tercet.artifacts.registry import Version
from tercet.errors import ConfigError, CorruptObject
from tercet.evaluation.evaluate import evaluate
from tercet.planning.rows import load_splits
from tercet.planning.survey import read_plan
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, seal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_CHANGE = 1e-3  # of any metric: a tenth of a point; rounding of fp32 changes about 1e-6
OUTPUT = "sentence_embedding"
EXAMPLES = ("a text", "another text, which is longer")


class Exported(Document):
    """The document that makes an export valid. It is written last."""

    version: int
    inputs: tuple[str, ...]
    """Names of the inputs; each is int64 of shape (batch, tokens)."""
    files: dict[str, FileRecord]
    metrics: dict[str, float]
    """Metrics of the exported model on the test split."""
    metrics_before: dict[str, float]
    """Metrics of the original model on the test split."""


def export(storage: Storage, version: Version, model_dir: Path, work_dir: Path) -> str:
    """Export a version, measure it, and upload it. Returns the URI of the folder.

    Both models are measured on the test split of the version's run. Raises ConfigError if onnx, onnxscript or
    onnxruntime is not installed, and CorruptObject if a metric differs by more than MAX_CHANGE."""
    plan = read_plan(storage, version.lineage.run_id)
    model, path = _load(model_dir), work_dir / "model.onnx"
    work_dir.mkdir(parents=True)
    inputs = _write(model, path)
    splits, batch_size = load_splits(plan, storage), plan.config.evaluation.batch_size
    before = evaluate(model, splits, "test", batch_size)
    with _running(model, path, inputs):
        after = evaluate(model, splits, "test", batch_size)
    if wrong := [name for name, value in before.items() if abs(after[name] - value) > MAX_CHANGE]:
        changes = ", ".join(f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in wrong)
        raise CorruptObject(
            f"version {version.number} has other metrics as ONNX: {changes}", hint="the export was not published"
        )
    model.tokenizer.backend_tokenizer.save(str(work_dir / "tokenizer.json"))
    folder = layout.onnx_prefix(version.name, version.number)
    files = upload_files(storage, work_dir, folder)
    exported = Exported(version=version.number, inputs=inputs, files=files, metrics=after, metrics_before=before)
    storage.put(layout.exported_key(version.name, version.number), seal(exported))
    return storage.uri_of(folder)


def _load(model_dir: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    # With `eager` attention, the exporter sees plain matrix products.
    options = {"attn_implementation": "eager", "dtype": "float32"}
    return SentenceTransformer(str(model_dir), device="cpu", model_kwargs=options).eval()


def _write(model: SentenceTransformer, path: Path) -> tuple[str, ...]:
    """Export the model to `path`. Returns the names of the inputs."""
    import torch

    features = model.preprocess(list(EXAMPLES))
    inputs = tuple(name for name, value in features.items() if isinstance(value, torch.Tensor))
    rest = {name: value for name, value in features.items() if name not in inputs}

    class Embeds(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = self.model({**rest, **dict(zip(inputs, tensors, strict=True))})[OUTPUT]
            return embeddings

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = ({0: batch, 1: tokens},) * len(inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                Embeds().eval(),
                tuple(features[name] for name in inputs),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=list(inputs),
                output_names=[OUTPUT],
                verbose=False,
            )
    except ImportError:  # torch's own error names the package that is missing
        raise _not_installed() from None
    program.save(str(path))
    return inputs


@contextlib.contextmanager
def _running(model: SentenceTransformer, path: Path, inputs: tuple[str, ...]) -> Iterator[None]:
    """Let the model compute its embeddings with the ONNX file, inside the context."""
    import torch

    try:
        import onnxruntime
    except ImportError:
        raise _not_installed() from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
        [embeddings] = session.run([OUTPUT], {name: features[name].numpy() for name in inputs})
        return {**features, OUTPUT: torch.from_numpy(embeddings)}

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _not_installed() -> ConfigError:
    return ConfigError("nightly.publish.onnx needs ONNX, which is not installed", hint="pip install 'tercet[onnx]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints its progress and warns about its own code."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
