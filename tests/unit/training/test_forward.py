"""A run keeps the forward pass that it began with: its packing, and the kernel of its attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support import builders, tiny_model
from tercet.errors import PlanError
from tercet.model import packed_model, packing_trial
from tercet.model.packing_trial import Trial
from tercet.planning.packing import ForwardChoice, stored_choice
from tercet.planning.plan import TrainPlan
from tercet.storage.documents import seal
from tercet.storage.layout import forward_key
from tercet.storage.local import LocalStorage
from tercet.training import forward as module
from tercet.training.forward import resolve_forward

Load = Callable[[], SentenceTransformer]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tiny_model.tiny_bert(tmp_path_factory.mktemp("made") / "model", tiny_model.all_texts())
    return lambda: SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets why the kernel that knows bounds is not used on this machine; None: it is."""
    return lambda why: monkeypatch.setattr(module, "kernel_obstacle", lambda *_: why)


def plan(packing: str = "auto") -> TrainPlan:
    return builders.plan(workers={"packing": packing})


def resolve(storage: LocalStorage, model: SentenceTransformer, packing: str = "auto") -> Any:
    return resolve_forward(plan(packing), storage, model, None, torch.device("cpu"))


def stored(storage: LocalStorage) -> ForwardChoice:
    choice = stored_choice(storage, plan().run_id)
    assert choice is not None
    return choice


def no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packing impossible, as with libraries whose code for this architecture takes no rows."""
    monkeypatch.setattr(packing_trial, "try_rows", lambda _: Trial("it fails here"))


@pytest.mark.parametrize("packing", ["auto", "packed"])
def test_what_the_run_chose_is_stored_and_used(storage: LocalStorage, load: Load, packing: str) -> None:
    """A run of an earlier tercet has stored nothing: it makes the same choice when it resumes."""
    model = load()
    forward = resolve(storage, model, packing)
    assert forward.packing == "packed"
    assert forward.reason.startswith("one row of real tokens, no padding; a trial differs from padding by ")
    assert stored(storage) == ForwardChoice(packing="packed", reason=forward.reason, attention="matrices")
    assert model[0].attention == "matrices"
    assert model[0].can_flatten_inputs


@pytest.mark.parametrize("packing", ["plain", "chunked"])
def test_what_the_recipe_names_is_not_stored(storage: LocalStorage, load: Load, packing: str) -> None:
    assert resolve(storage, load(), packing).packing == packing
    assert not storage.exists(forward_key(plan().run_id))


def test_a_run_that_began_without_packing_resumes_without(
    storage: LocalStorage, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_row(patch)
        first = resolve(storage, load())
    second = resolve(storage, load())
    assert first.packing == second.packing == "chunked"
    assert first.reason == second.reason
    assert resolve(LocalStorage(Path(storage.uri) / "other"), load()).packing == "packed"


def test_a_run_that_began_packed_is_refused_where_nothing_can_be_packed(
    storage: LocalStorage, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(storage, load())
    no_row(monkeypatch)
    with pytest.raises(PlanError, match=r"pass is packed, which is not possible here \(not packed: it fails"):
        resolve(storage, load())


def test_the_kernel_is_kept(storage: LocalStorage, load: Load, kernel: Callable[[str | None], None]) -> None:
    kernel("it is off by 9%")
    resolve(storage, load())
    kernel(None)
    model = load()
    resolve(storage, model)
    assert (stored(storage).attention, model[0].attention) == ("matrices", "matrices")


def test_a_kernel_that_does_not_run_here_is_refused(
    storage: LocalStorage, load: Load, kernel: Callable[[str | None], None]
) -> None:
    kernel(None)
    model = load()
    resolve(storage, model)
    assert (stored(storage).attention, model[0].attention) == ("bounds", "bounds")
    kernel("only supports Ampere GPUs or newer")
    with pytest.raises(PlanError, match=r"kernel for rows of texts, which is not possible here \(only supports Ampere"):
        resolve(storage, load())


def test_the_switch_offers_the_kernel_with_dropout_to_new_runs_alone(
    storage: LocalStorage, load: Load, kernel: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(None)
    assert resolve(storage, load()).packing == "packed"
    assert stored(storage).attention == "bounds"
    monkeypatch.setenv("TERCET_FUSED_ATTENTION", "1")
    monkeypatch.setattr(packed_model, "fused_obstacle", lambda *_: None)
    model = load()
    resolve(storage, model)
    assert model[0].attention == "bounds"  # as the run began
    other = LocalStorage(Path(storage.uri) / "other")
    resolve(other, model)
    assert (stored(other).attention, model[0].attention) == ("fused", "fused")
    monkeypatch.delenv("TERCET_FUSED_ATTENTION")
    with pytest.raises(PlanError, match=r"not possible here \(the environment variable TERCET_FUSED_ATTENTION"):
        resolve(other, load())


def test_a_kernel_that_fails_on_another_rank_is_used_on_none(
    storage: LocalStorage, load: Load, kernel: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel(None)
    monkeypatch.setattr(module, "gather_objects", lambda own: [own, ["only supports Ampere GPUs or newer"]])
    resolve(storage, load())
    assert stored(storage).attention == "matrices"


def test_rows_that_the_recipe_names_and_the_trial_refuses(
    storage: LocalStorage, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error for a new run. A run that began before this was an error keeps what it chose."""
    no_row(monkeypatch)
    with pytest.raises(PlanError, match=r"workers\.packing is packed, but this model cannot be packed: it fails here"):
        resolve(storage, load(), "packed")
    assert not storage.exists(forward_key(plan().run_id))
    assert resolve(storage, load(), "auto").packing == "chunked"
    assert resolve(storage, load(), "packed").packing == "chunked"


def test_a_run_from_before_the_trial_stays_packed(
    storage: LocalStorage, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice was stored by a list of architectures, of which each is packed to the same bits."""
    no_row(monkeypatch)
    choice = ForwardChoice(packing="packed", reason="one row of real tokens, no padding", attention="matrices")
    storage.put_if_absent(forward_key(plan().run_id), seal(choice))
    assert resolve(storage, load()).packing == "packed"
