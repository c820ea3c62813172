"""Which night a moment belongs to, what a user and a scheduler see, and the comparison. tests/flow has whole nights."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from support import tiny_model
from support.published import as_best_model
from tercet.artifacts.champion import read_champion
from tercet.artifacts.registry import register, serve
from tercet.cli.main import main
from tercet.cli.nightly import REFUSED_EXIT_CODE, night_text
from tercet.cluster import session
from tercet.config.recipe import Config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.evaluation.comparison import IndexImpact
from tercet.pipeline import nightly as module
from tercet.pipeline.nightly import Night, night_of, read_night
from tercet.planning.survey import survey
from tercet.storage import open_storage
from tercet.storage.local import LocalStorage

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: datetime.tzinfo = datetime.UTC) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone)


@pytest.mark.parametrize(
    ("now", "night"),
    [
        (at("2026-03-14 23:59"), "2026-03-14"),
        (at("2026-03-15 00:01"), "2026-03-14"),  # a retry of the start above
        (at("2026-03-15 11:59"), "2026-03-14"),
        (at("2026-03-15 12:00"), "2026-03-15"),
        (at("2026-03-29 01:30", BERLIN), "2026-03-28"),
        (at("2026-03-29 03:30", BERLIN), "2026-03-28"),  # an hour later: clocks went forward
        (at("2026-10-25 02:30", BERLIN), "2026-10-24"),
        (at("2026-10-25 02:30", BERLIN).replace(fold=1), "2026-10-24"),  # the same hour again: they went back
        (at("2026-10-26 02:30", BERLIN), "2026-10-25"),
    ],
)
def test_the_night_of_a_moment(now: datetime.datetime, night: str) -> None:
    assert night_of(now, 12) == datetime.date.fromisoformat(night)


def test_the_hour_at_which_a_night_begins_can_be_set() -> None:
    """In Tokyo, midnight is 15:00 UTC."""
    tokyo = ZoneInfo("Asia/Tokyo")
    before, after = at("2026-03-14 23:50", tokyo), at("2026-03-15 00:10", tokyo)
    assert night_of(before, 3) == night_of(after, 3) == datetime.date(2026, 3, 14)
    noon, later = at("2026-03-15 11:59", tokyo), at("2026-03-15 12:01", tokyo)
    assert (night_of(noon, 3), night_of(later, 3)) == (datetime.date(2026, 3, 14), datetime.date(2026, 3, 15))


def a_night(**changes: Any) -> Night:
    values: dict[str, Any] = {
        "name": "search",
        "date": datetime.date(2026, 3, 14),
        "run_id": "20260314-search-370c47fc-01234567",
        "experiment_hash": "370c47fc",
        "dataset_versions": {"poems": "0123456789abcdef"},
        "outcome": "promoted",
        "sentence": "Promote: it is better.",
        "champion_before": 3,
        "champion": 4,
        "metrics": {"base": {"ndcg@10": 0.5}, "champion-3": {"ndcg@10": 0.6}, "candidate": {"ndcg@10": 0.7}},
        "index_impact": IndexImpact(
            num_queries=100,
            overlap_at_10=0.83,
            num_queries_with_other_first=7,
            mean_score_shift=-0.021,
            score_shift_quantiles={0.5: -0.02},
            num_rows=1_000_000,
            embedding_seconds=9000,
        ),
        "unix_seconds": 0.0,
        "seconds": 812.4,
    }
    return Night(**{**values, **changes})


def test_the_text_for_the_morning() -> None:
    text = night_text(a_night()).splitlines()
    assert text[:2] == ["Night of 2026-03-14: promoted", "  Promote: it is better."]
    assert "  test      candidate    ndcg@10 0.7000" in text
    index = "  index     83% of the ten nearest stay, scores move by -0.021; embedding 1,000,000 rows again takes 2.5 h"
    assert index in text
    assert text[-1] == "  champion  generation 4, which replaced generation 3"
    odd = night_text(a_night(warning="40 test rows are new, and …")).splitlines()
    assert odd[2] == "  Warning: 40 test rows are new, and …"
    kept = night_text(a_night(outcome="kept", champion=3)).splitlines()
    assert kept[-1] == "  champion  generation 3"
    nothing = a_night(outcome="nothing_to_do", metrics={}, index_impact=None, champion=None, champion_before=None)
    assert night_text(nothing).splitlines()[0] == "Night of 2026-03-14: nothing to do"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("promoted", 0), ("kept", 0), ("undecided", 0), ("nothing_to_do", 0), ("refused", REFUSED_EXIT_CODE)],
)
def test_the_exit_code_says_whether_the_candidate_was_refused(
    outcome: str, code: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: x, dataset: {name: d}, model: {name_or_path: m}, loss: {name: TripletLoss}}")
    monkeypatch.setattr(module, "nightly", lambda *_: a_night(outcome=outcome))
    assert main(["nightly", str(recipe), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["outcome"] == outcome


def test_a_candidate_is_compared_with_the_base_model_and_then_with_the_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, and with a copy of the base model in place of a trained one."""
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "start_ray", lambda _: None)
    monkeypatch.setattr(session, "with_devices", lambda config: config)
    monkeypatch.setattr(
        session, "in_fresh_processes", lambda _, tasks: {name: measure() for name, measure in tasks.items()}
    )
    monkeypatch.setattr(module, "run", lambda *_: None)
    store = tmp_path / "store"
    storage = open_storage(str(store))
    model = tiny_model.tiny_bert(tmp_path / "model", tiny_model.all_texts())
    rows = tiny_model.write_triplets(tmp_path / "rows.jsonl", 300)
    build_version([rows], storage, "tiny", IngestOptions(group="group"), fractions=(0.5, 0.1, 0.4))
    downloads: list[str] = []
    download = LocalStorage.download

    def counted(self: LocalStorage, key: str, *arguments: Any, **options: Any) -> None:
        downloads.append(key)
        download(self, key, *arguments, **options)

    monkeypatch.setattr(LocalStorage, "download", counted)
    said: list[str] = []
    nights = []
    for run_id in ("first", "second"):
        config = Config.model_validate(tiny_model.recipe(model, storage.uri))
        _, plan = survey(config, run_id)
        as_best_model(storage, run_id, model)
        downloads.clear()
        date = datetime.date(2026, 3, 14)
        nights.append(module._train_and_gate(storage, config, plan, date, 0.0, "me", said.append))
        tables = [key for key in downloads if key.endswith(".parquet") and "/comparison/" in key]
        assert len(tables) == len(set(tables)) == 2 * len(nights[-1].metrics)
        assert read_night(storage, "tiny", run_id) == nights[-1]
        version = register(storage, "tiny", plan.lineage, "me")
        serve(storage, version, read_champion(storage, "tiny"), "by hand", "for the test", "me")
    first, second = nights
    # First no row differs from the base model; then the weights are those of the champion.
    assert [night.outcome for night in nights] == ["undecided", "refused"]
    assert (list(first.metrics), first.champion_before, first.champion) == (["base", "candidate"], None, None)
    assert (list(second.metrics), second.champion_before) == (["base", "candidate", "champion-1"], 1)
    assert second.champion == 1
    assert second.index_impact is not None
    assert second.index_impact.overlap_at_10 == 1.0
    assert [text for text in said if text.startswith("comparison")] == [
        "comparison: base, candidate",
        "comparison: base, candidate, champion-1",
    ]
    again = module._train_and_gate(storage, config, plan, date, 0.0, "me", said.append)
    assert (again.outcome, again.champion, again.metrics) == (
        "promoted",
        2,
        {},
    )  # it is the champion already, so nothing is compared
