"""An attempt holds the run while it trains, resumes from the newest whole checkpoint, and records why it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import builders
from support.checkpoints import FILES, RUN, committed
from tercet.artifacts.journal import counts
from tercet.artifacts.lease import Holder, read_attempts
from tercet.errors import LeaseLost, NonFiniteError, OutOfMemory, RunIsTaken
from tercet.planning.plan import TrainPlan
from tercet.storage.documents import unseal
from tercet.storage.layout import lease_key
from tercet.storage.local import LocalStorage
from tercet.training import attempt as module
from tercet.training.attempt import hold_run

PLAN: TrainPlan = builders.plan(checkpoint={"lease_seconds": 3}).model_copy(update={"run_id": RUN})


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def holder(storage: LocalStorage) -> Holder:
    return unseal(Holder, storage.read(lease_key(RUN)), "LEASE.json")


def test_the_first_attempt_begins_at_the_start(storage: LocalStorage, tmp_path: Path) -> None:
    with hold_run(storage, PLAN, "one", 2, tmp_path / "resume") as run:
        assert (run.commit, run.resume_dir) == (None, None)
        assert (run.attempt.generation, run.attempt.first_step, run.attempt.world_size) == (1, 0, 2)
        assert run.lineage == (run.attempt,) == read_attempts(storage, RUN)
        assert not holder(storage).released
        run.confirm()
    assert (holder(storage).released, holder(storage).finished) == (True, True)
    assert counts(storage, RUN) == {}


def test_the_next_attempt_resumes_from_the_newest_whole_checkpoint(storage: LocalStorage, tmp_path: Path) -> None:
    older, newer = (committed(storage, tmp_path, step) for step in (10, 20))
    storage.put(f"{newer.folder}/model.safetensors", b"damaged")
    with hold_run(storage, PLAN, "one", 1, tmp_path / "resume") as run:
        assert run.commit == older
        assert run.resume_dir == tmp_path / "resume"
        assert {path.name for path in run.resume_dir.rglob("*") if path.is_file()} == {Path(p).name for p in FILES}
        assert run.attempt.first_step == 10
        assert run.lineage == (*older.lineage, run.attempt)
    assert counts(storage, RUN) == {"checkpoint_skipped": 1}


def test_every_other_rank_gets_the_checkpoint_of_rank_0_and_no_lease(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = committed(storage, tmp_path, 10)
    with hold_run(storage, PLAN, "one", 2, tmp_path / "rank-0") as first:
        monkeypatch.setattr(module, "run_on_rank_0", lambda _: (commit, first.attempt))
        with hold_run(storage, PLAN, "one", 2, tmp_path / "rank-1") as second:
            assert (second.commit, second.attempt, second.lease) == (commit, first.attempt, None)
            assert (tmp_path / "rank-1/model.safetensors").read_bytes() == FILES["model.safetensors"]
            second.confirm()  # does nothing without a lease
        assert not holder(storage).released


def test_an_error_is_recorded_and_the_lease_released(storage: LocalStorage, tmp_path: Path) -> None:
    error = NonFiniteError("step 3: the loss is nan", hint="")
    with pytest.raises(NonFiniteError) as caught, hold_run(storage, PLAN, "one", 1, tmp_path / "resume"):
        raise error
    assert caught.value is error
    assert counts(storage, RUN) == {"non_finite": 1}
    assert (holder(storage).released, holder(storage).finished) == (True, False)


def test_an_error_of_a_library_is_replaced_by_tercets_own(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory) as caught, hold_run(storage, PLAN, "one", 1, tmp_path / "resume"):
        raise MemoryError("no room")
    assert isinstance(caught.value.__cause__, MemoryError)
    assert counts(storage, RUN) == {"out_of_memory": 1}
    assert not holder(storage).finished


def test_an_error_of_no_known_kind_is_recorded_as_lost_by_the_next_attempt(
    storage: LocalStorage, tmp_path: Path
) -> None:
    with pytest.raises(KeyError), hold_run(storage, PLAN, "one", 1, tmp_path / "resume"):
        raise KeyError("x")
    assert counts(storage, RUN) == {}
    with hold_run(storage, PLAN, "two", 1, tmp_path / "resume") as run:
        assert run.attempt.generation == 2
        run.report_hang(rank=1, seconds=8)
    assert counts(storage, RUN) == {"lost": 1, "hung": 1}


def test_an_attempt_that_fails_to_begin_releases_the_lease(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise LeaseLost("taken over")

    monkeypatch.setattr(module, "fetch_newest", fails)
    with pytest.raises(LeaseLost), hold_run(storage, PLAN, "one", 1, tmp_path / "resume"):
        pytest.fail("it began")
    assert (holder(storage).released, holder(storage).finished) == (True, False)
    assert counts(storage, RUN) == {}  # no attempt has begun that could have ended


def test_a_second_attempt_is_refused_while_the_first_one_lives(storage: LocalStorage, tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"config": builders.config(checkpoint={"lease_seconds": 1})})
    with hold_run(storage, plan, "one", 1, tmp_path / "a"), pytest.raises(RunIsTaken):  # noqa: SIM117
        with hold_run(storage, plan, "two", 1, tmp_path / "b"):
            pytest.fail("it began")
