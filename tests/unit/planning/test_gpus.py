"""What is known of the memory of GPUs before anything runs on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.planning.gpus import bytes_of_this_machine, bytes_of_types

DRIVER = """#!/bin/sh
{body}
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia-smi` of a machine with two GPUs of 40 and 80 GiB, the only program on the path."""
    program = tmp_path / "nvidia-smi"
    program.write_text(DRIVER.format(body='echo "0, 81920"; echo "1, 40960"'))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.mark.parametrize(
    ("visible", "gib"),
    [(None, 40), ("0", 80), ("1", 40), ("0, 1", 40), ("GPU-8932f937", 40), ("", None), ("-1", None), ("7", None)],
)
@pytest.mark.usefixtures("driver")
def test_the_smallest_visible_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, gib: int | None) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert bytes_of_this_machine() == (None if gib is None else gib * 2**30)


@pytest.mark.parametrize("body", ["exit 9", "echo No devices were found", 'echo "0, [N/A]"', ""])
def test_a_driver_without_an_answer(driver: Path, body: str) -> None:
    driver.write_text(DRIVER.format(body=body))
    assert bytes_of_this_machine() is None


def test_a_machine_without_a_driver(driver: Path) -> None:
    driver.unlink()
    assert bytes_of_this_machine() is None


def test_types_of_accelerator_by_their_names_in_ray() -> None:
    assert bytes_of_types(["H100", "A10G"]) == 24 * 2**30
    assert bytes_of_types(["H100", "a card of tomorrow"]) is None
    assert bytes_of_types([]) is None
