"""Every private name of another library that tercet relies on, so that an upgrade fails here with a list.

`NAMES` are functions and classes, `TEXTS` are attributes, which classes set in their methods and so are looked up in
the source. A scan of tercet's own source finds private names that are missing here. The environment variables that
tercet sets for Ray are checked too.
docs/decisions/0017-private-names.md says what each is for. Versions: ray 2.60, deepspeed 0.19, transformers 5.23,
accelerate 1.15, sentence-transformers 6.2, torch 2.13, datasets 5.2.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tercet

SOURCE = Path(tercet.__file__).parent

RAY_INTERNAL = "ray.train.v2._internal."
EVALUATION = "sentence_transformers.sentence_transformer.evaluation:"
TRANSFORMER = "sentence_transformers.base.modules.transformer:Transformer"
MPNET = "transformers.models.mpnet.modeling_mpnet:"
STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
ZERO_INIT = "deepspeed.runtime.zero.partition_parameters:Init"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"

# module:name → parameters, None for what is not called. Public names are here where tercet overrides them.
NAMES: dict[str, str | None] = {
    f"{RAY_INTERNAL}callbacks.placement_group_callback:PlacementGroupCleanerCallback": None,
    f"{RAY_INTERNAL}exceptions:WorkerGroupStartupFailedError": None,
    f"{RAY_INTERNAL}exceptions:WorkerGroupStartupTimeoutError": None,
    f"{RAY_INTERNAL}exceptions:WorkerHealthCheckFailedError": None,
    f"{RAY_INTERNAL}execution.context:get_train_context": "",
    f"{RAY_INTERNAL}execution.failure_handling:DefaultFailurePolicy.__init__": "self, failure_config",
    f"{RAY_INTERNAL}execution.failure_handling:DefaultFailurePolicy.make_decision": "self, training_failed_error",
    f"{RAY_INTERNAL}execution.failure_handling:FailureDecision": None,
    f"{RAY_INTERNAL}execution.scaling_policy.elastic:ElasticScalingPolicy.__init__": "self, scaling_config",
    f"{RAY_INTERNAL}execution.scaling_policy.elastic:ElasticScalingPolicy._count_possible_workers": (
        "self, reserved_resources"
    ),
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks": "self",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller": (
        "self, **controller_init_kwargs"
    ),
    "ray.train.v2.api.exceptions:ControllerError.__init__": "self, controller_failure",
    "ray.train.v2.api.exceptions:PreemptionError.__init__": "self, preemption_info, drain_timed_out",
    "ray.train.v2.api.exceptions:WorkerGroupError.__init__": "self, error_message, worker_failures",
    "ray._raylet:GcsClient": None,
    "ray.train.backend:Backend.on_start": "self, worker_group, backend_config",
    "ray.train.backend:Backend.on_shutdown": "self, worker_group, backend_config",
    f"{RAY_INTERNAL}execution.worker_group.worker_group:WorkerGroup.execute_async": "self, fn, *fn_args, **fn_kwargs",
    f"{RAY_INTERNAL}execution.worker_group.worker_group:WorkerGroup.execute_single": (
        "self, rank, fn, *fn_args, **fn_kwargs"
    ),
    f"{STAGE_3}._get_param_partition_rank": "self, param",
    f"{STAGE_3}.get_param_id": "self, param",
    f"{ENGINE}._backward_prologue_per_tensor": "self, grad",
    f"{ENGINE}.coalesce_grad_reduction": "self",
    f"{ENGINE}.set_gradient_accumulation_boundary": "self, is_boundary",
    f"{ENGINE}.zero_cpu_offload": "self",
    f"{ENGINE}.zero_offload_optimizer": "self",
    f"{ENGINE}.zero_optimization_stage": "self",
    "deepspeed.ops:__compatible_ops__": None,
    "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref": None,
    "transformers.integrations.deepspeed:unset_hf_deepspeed_config": "",
    "transformers:PreTrainedModel._from_config": "config, **kwargs",
    "transformers:PreTrainedModel._supports_attention_backend": None,
    "transformers:PreTrainedConfig._attn_implementation": None,
    "torch.nn.parallel:DistributedDataParallel._get_ddp_logging_data": "self",
    "transformers:Trainer._clip_grad_norm": "self, model",
    "transformers:Trainer._get_grad_norm": "self, model, grad_norm",
    "transformers:Trainer._init_training_state": (
        "self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"
    ),
    "transformers:Trainer._load_optimizer_and_scheduler": "self, checkpoint",
    "transformers:Trainer._load_rng_state": "self, checkpoint",
    "transformers:Trainer._load_scaler": "self, checkpoint",
    "transformers:Trainer._prepare_input": "self, data",
    "transformers:Trainer._prepare_for_training": "self, max_steps, train_dataloader, resume_from_checkpoint",
    "transformers:Trainer._save_checkpoint": "self, model, trial",
    "transformers:Trainer._save_optimizer_and_scheduler": "self, output_dir",
    "transformers:Trainer.create_accelerator_and_postprocess": "self",
    "transformers:Trainer.evaluation_loop": (
        "self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix"
    ),
    "transformers:Trainer.get_batch_samples": "self, epoch_iterator, num_batches, device",
    "transformers:Trainer.save_model": "self, output_dir, _internal_call",
    "transformers:Trainer.training_step": "self, model, inputs, num_items_in_batch",
    f"{MPNET}MPNetModel.forward": (
        "self, input_ids, attention_mask, position_ids, inputs_embeds, output_attentions, output_hidden_states, "
        "return_dict, **kwargs"
    ),
    f"{MPNET}MPNetSelfAttention.forward": (
        "self, hidden_states, attention_mask, position_bias, output_attentions, **kwargs"
    ),
    f"{MPNET}MPNetEncoder.compute_position_bias": "self, x, position_ids, num_buckets",
    "accelerate.state:GradientState._set_sync_gradients": "self, sync_gradients",
    "accelerate.utils:DeepSpeedEngineWrapper.backward": "self, loss, sync_gradients, **kwargs",
    "accelerate.utils:DeepSpeedEngineWrapper.get_global_grad_norm": "self",
    "sentence_transformers.base.modules:Transformer.preprocess": "self, inputs, prompt, processing_kwargs, **kwargs",
    "sentence_transformers:SentenceTransformerTrainer._load_from_checkpoint": "self, checkpoint_path",
    "sentence_transformers:SentenceTransformerTrainer.add_model_card_callback": "self, default_args_dict",
    "sentence_transformers:SentenceTransformerTrainer.collect_features": "self, inputs",
    "sentence_transformers:SentenceTransformerTrainer.compute_loss": (
        "self, model, inputs, return_outputs, num_items_in_batch"
    ),
    "sentence_transformers.base.losses.gradcache:uses_gradient_cache": "loss",
    "sentence_transformers.sentence_transformer.losses:CachedMultipleNegativesRankingLoss.calculate_loss": (
        "self, reps, labels, with_backward"
    ),
    f"{EVALUATION}InformationRetrievalEvaluator.compute_all_metrics": (
        "self, model, corpus_model, corpus_embeddings, output_path"
    ),
    f"{EVALUATION}InformationRetrievalEvaluator.compute_metrics": "self, queries_result_list",
    f"{EVALUATION}InformationRetrievalEvaluator.embed_inputs": (
        "self, model, sentences, encode_fn_name, prompt_name, prompt, **kwargs"
    ),
    f"{EVALUATION}TripletEvaluator._get_similarity_functions": "self",
    f"{EVALUATION}TripletEvaluator.embed_inputs": "self, model, sentences, encode_fn_name, **kwargs",
    f"{TRANSFORMER}._infer_flatten_position_offset": "self",
    "torch:_foreach_copy_": None,
    "torch:_foreach_norm": None,
    "torch:ops.aten._flash_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
        "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, Tensor? block_table=None, "
        "int? num_splits=None"
    ),
    "torch:ops.aten._efficient_attention_forward": (
        "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
        "bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None"
    ),
    "torch:ops.aten._softmax": "Tensor self, int dim, bool half_to_float",
    "torch:ops.aten._softmax_backward_data": "Tensor grad_output, Tensor output, int dim, ScalarType input_dtype",
    "torch:ops.aten.embedding_dense_backward": (
        "Tensor grad_output, Tensor indices, SymInt num_weights, SymInt padding_idx, bool scale_grad_by_freq"
    ),
    "torch.distributed.distributed_c10d:_abort_process_group": "group",
    "torch.distributed.distributed_c10d:_get_default_store": "",
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "module, params_and_buffers_to_ignore"
    ),
    "datasets.table:MemoryMappedTable.from_file": "filename, replays",
    "datasets.table:concat_tables": "tables, axis",
    "fsspec.asyn:sync": "loop, func, *args, timeout, **kwargs",
    "s3fs:S3FileSystem.set_session": "self, refresh, kwargs",
    "peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer": "self",
    "peft.tuners.tuners_utils:BaseTunerLayer.merge": "self, safe_merge, adapter_names",
}

# (module:class or module, text of its source)
TEXTS = [
    ("torch.nn:Module", '"_non_persistent_buffers_set"'),
    (f"{RAY_INTERNAL}execution.context:TrainContext", "preemption_context: PreemptionContext"),
    (f"{RAY_INTERNAL}execution.preemption:PreemptionContext", "preemption_info:"),
    (f"{RAY_INTERNAL}exceptions:WorkerHealthCheckFailedError", "self.health_check_failure ="),
    ("ray.train.v2.api.data_parallel_trainer:DataParallelTrainer", "scaling_policy="),
    ("ray.train.v2.api.data_parallel_trainer:DataParallelTrainer", "failure_policy="),
    (STAGE_1_AND_2, "self.single_partition_of_fp32_groups ="),
    (STAGE_1_AND_2, "self.bit16_groups_flat ="),
    (STAGE_3, "self.fp32_partitioned_groups_flat ="),
    (STAGE_3, "self.fp16_partitioned_groups_flat ="),
    ("torch.amp.grad_scaler:GradScaler", "self._per_optimizer_states:"),
    ("torch.amp.grad_scaler:GradScaler", "self._scale:"),
    ("torch.amp.grad_scaler:GradScaler", "self._growth_tracker:"),
    (STAGE_3, "self.grad_position ="),
    (STAGE_3, "self.ipg_buckets:"),
    (STAGE_3, "self.persistent_parameters ="),
    ("deepspeed.runtime.torch_autocast", "comm_dtype"),
    ("deepspeed.utils.mixed_precision_linkage", "_hp_mapping ="),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "hp_fragment_address:"),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "lp_fragment_address:"),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "param_group_index:"),
    (ZERO_INIT, "param.ds_id ="),
    (ZERO_INIT, "param.ds_numel ="),
    (ZERO_INIT, "param.ds_shape ="),
    (ZERO_INIT, "param.ds_process_group ="),
    (ZERO_INIT, "param.ds_zero_partition_world_size ="),
    (ZERO_INIT, "param.ds_tensor ="),
    ("transformers.integrations.peft:PeftAdapterMixin", "_hf_peft_config_loaded ="),
    ("accelerate:Accelerator", "self.deepspeed_engine_wrapped ="),
    ("accelerate:Accelerator", "self.ddp_handler ="),
    ("accelerate.utils.fsdp_utils", "base_model_prefix"),
    ("accelerate:FullyShardedDataParallelPlugin", "transformer_cls_names_to_wrap:"),
    ("accelerate:FullyShardedDataParallelPlugin", "mixed_precision_policy:"),
    (TRANSFORMER, "self._flatten_position_offset ="),
    (TRANSFORMER, "self.can_flatten_inputs ="),
    (TRANSFORMER, "self.model_forward_params"),
    ("sentence_transformers:SentenceTransformer", "self._distributed_inference"),
    ("datasets:Dataset", "self._indices:"),
]

# Private names that are no library's internals, or documented although they begin with an underscore.
NOT_INTERNAL = {
    "_exit",  # os
    "_current_frames",  # sys
    "_replace",  # typing.NamedTuple
}

LIBRARIES = {"ray", "deepspeed", "transformers", "accelerate", "sentence_transformers", "torch", "datasets"}
LIBRARIES |= {"fsspec", "s3fs", "peft", "safetensors"}

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


@pytest.fixture(autouse=True)
def train_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")


def look_up(name: str) -> Any:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    return value


def parameters_of(value: Any) -> str:
    """Names of the parameters, `*` and `**` included; of an operator of torch, with their types."""
    if hasattr(value, "default"):
        return str(value.default._schema).partition("(")[2].partition(")")[0]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(value).parameters.values()
    return ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_parameters(name: str) -> None:
    value = look_up(name)
    if NAMES[name] is not None:
        assert parameters_of(value) == NAMES[name]


@pytest.mark.parametrize(("owner", "text"), TEXTS)
def test_an_attribute(owner: str, text: str) -> None:
    value = look_up(owner)
    classes = value.__mro__ if inspect.isclass(value) else [value]
    assert any(text in inspect.getsource(each) for each in classes if getattr(each, "__module__", "") != "builtins")


RAY_VARIABLES = sorted(
    {
        name
        for path, tree in TREES.items()
        if path.parent.name == "cluster"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"^RAY_\w+$", node.value)
    }
)


@pytest.fixture(scope="module")
def variables_of_ray() -> set[str]:
    """Environment variables that the installed Ray reads."""
    root = Path(importlib.import_module("ray").__file__ or "").parent
    folders = ("_private", "train/v2/_internal", "dashboard/modules/job")
    sources = [root / "_raylet.so", *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return {name.decode() for path in sources for name in re.findall(rb"\bRAY_\w+", path.read_bytes())}


@pytest.mark.parametrize("name", RAY_VARIABLES)
def test_ray_reads_each_environment_variable(name: str, variables_of_ray: set[str]) -> None:
    """Ray ignores a variable that it does not know."""
    assert name in variables_of_ray


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables, arguments and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_uses(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and private name of each use: an attribute, an import, or the string that `getattr` takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            for alias in node.names:
                parts = [*(module.split(".") if module else []), *alias.name.split(".")]
                if parts[0] in LIBRARIES and any(map(is_private, parts)):
                    yield node.lineno, parts[-1]


def overridden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private method that replaces one of a library's class."""
    modules = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [look_up(modules[name]) for base in node.bases if (name := ast.unparse(base)) in modules]
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef) and is_private(each.name)]
            for method in methods:
                if any(hasattr(base, method.name) for base in bases):
                    yield method.lineno, method.name


LISTED = {part for name in NAMES for part in name.partition(":")[2].split(".")}
LISTED |= {word for _, text in TEXTS for word in re.findall(r"\w+", text)} | NOT_INTERNAL


def missing(tree: ast.AST, own: set[str]) -> list[tuple[int, str]]:
    return [(line, name) for line, name in (*private_uses(tree, own), *overridden(tree)) if name not in LISTED]


OWN = set().union(*map(own_names, TREES.values()))


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_private_name_in_the_source_is_listed(path: Path) -> None:
    assert missing(TREES[path], OWN) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch\ntorch._dynamo.reset()", "_dynamo"),
        ("from ray._private.worker import global_worker", "global_worker"),
        ("import ray._private.worker", "worker"),
        ("from transformers.trainer import _is_peft_model", "_is_peft_model"),
        ("value = getattr(error, '_base_exc', error)", "_base_exc"),
        (
            "from transformers import Trainer\nclass T(Trainer):\n def _save(self, folder): ...",
            "_save",
        ),
    ],
)
def test_the_scan_finds(code: str, name: str) -> None:
    tree = ast.parse(code)
    assert {found for _, found in missing(tree, own_names(tree))} >= {name}
