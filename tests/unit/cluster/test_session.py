"""A cluster that does not answer, and the environment of the workers."""

from __future__ import annotations

import socket

import pytest

from support.s3_server import silent_address
from tercet.cluster.session import RAY_PATIENCE, environment, start_ray, wait_for_head
from tercet.config.sections import WorkersConfig
from tercet.errors import ConfigError, TrainingError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_PATIENCE[0], "1")


def test_a_head_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wait_for_head(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_head_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_address() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(TrainingError, match=f"no Ray cluster answers at {address}") as caught:
            start_ray(WorkersConfig())
    assert "unset RAY_ADDRESS" in caught.value.hint


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "head", "head:port", "a..b:6379"])
def test_an_invalid_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: ") as caught:
        start_ray(WorkersConfig())
    assert "6379" in caught.value.hint


PASSED = (
    *(
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TORCH_NCCL_BLOCKING_WAIT",
        "TORCH_LOGS",
        "CUDA_LAUNCH_BLOCKING",
    ),
    *("CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG"),
    *("CUBLASLT_LOG_LEVEL", "NVIDIA_TF32_OVERRIDE", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "OFI_NCCL_PROTOCOL"),
    *("RDMAV_FORK_SAFE", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "AWS_REGION", "HF_HOME", "TERCET_CACHE_DIR"),
)
KEPT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "CUDA_VERSION", "CUDA_CACHE_PATH", "CUDA_TOOLKIT_ROOT"),
    *("CUDA_MPS_PIPE_DIRECTORY", "CUDA_INJECTION64_PATH", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "PYTORCH_VERSION"),
    *("CUDNN_VERSION", "LD_LIBRARY_PATH", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PATH", "PYTHONPATH"),
)


def test_which_variables_the_workers_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives each worker its GPUs; paths and versions belong to a machine."""
    for name in (*PASSED, *KEPT):
        monkeypatch.setenv(name, "x")
    passed = environment(WorkersConfig())
    assert [name for name in PASSED if passed.get(name) != "x"] == []
    assert [name for name in KEPT if name in passed] == []


@pytest.mark.parametrize(
    ("use_gpu", "given", "expected"),
    [
        ("auto", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (False, {}, {}),
        (True, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
    ],
)
def test_segments_of_gpu_memory_grow(
    use_gpu: bool | str, given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    passed = environment(WorkersConfig.model_validate({"use_gpu": use_gpu}))
    assert {name: value for name, value in passed.items() if name.endswith("ALLOC_CONF")} == expected
