"""`tercet models`: what it prints, and what it stores about a user's decision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import builders
from support.published import decision, finished_run
from tercet.artifacts.champion import history, read_champion
from tercet.artifacts.registry import promote, register, resolve
from tercet.cli.main import main
from tercet.config.recipe import Config
from tercet.data.append import append
from tercet.data.build import build_version
from tercet.storage.documents import seal
from tercet.storage.local import LocalStorage

RUN = "20260314-made-1"


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


def models(storage: LocalStorage, *arguments: str) -> int:
    return main(["models", *arguments, "--storage", storage.uri])


def gated(storage: LocalStorage, run_id: str, sentence: str) -> None:
    promote(storage, "faq", finished_run(storage, run_id), lambda _: decision(sentence=sentence), "night")


def test_nothing_yet(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(storage, "list") == 0
    assert capsys.readouterr().out == f"no models in {storage.uri}\n"
    assert models(storage, "show", "faq") == 5
    assert "model faq has no champion" in capsys.readouterr().err
    assert models(storage, "rollback", "faq", "--reason", "x") == 2
    assert "never had another champion" in capsys.readouterr().err


def test_list_and_show(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    gated(storage, "r1", "Promote: the first.")
    gated(storage, "r2", "Promote: much better.")
    register(storage, "mails", finished_run(storage, "r3"), "me")
    assert models(storage, "list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("faq  2 versions  generation 2: version 2  20")
    assert first.endswith("promoted by the gate, night")
    assert second == "mails  1 version  no champion"
    assert models(storage, "show", "faq") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"faq: version 2 serves, {storage.uri}/runs/r2/best\n  generation 2: version 2")
    assert "    Promote: much better.\n  generation 1: version 1" in shown
    assert "run r1  on poems 0123456789abcdef" in shown
    assert models(storage, "show", "mails") == 0
    assert capsys.readouterr().out.startswith("mails has no champion\n  version 1  20")
    assert models(storage, "show", "faq", "--json") == 0
    documents = json.loads(capsys.readouterr().out)
    assert [champion["version"] for champion in documents["champions"]] == [2, 1]
    assert [version["lineage"]["run_id"] for version in documents["versions"]] == ["r1", "r2"]


def test_promotion_by_hand_does_not_ask_the_gate(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    gated(storage, "r1", "Promote: the first.")
    register(storage, "faq", finished_run(storage, "r2"), "me")
    assert models(storage, "promote", "faq", "--version", "2", "--reason", " the test split is outdated ") == 0
    assert capsys.readouterr().out == f"faq: version 2 serves instead of version 1, {storage.uri}/runs/r2/best\n"
    champion = read_champion(storage, "faq")
    assert champion is not None
    assert (champion.kind, champion.reason, champion.decision) == ("by hand", "the test split is outdated", None)
    assert "@" in champion.who
    assert models(storage, "list") == 0
    assert "promoted by hand, without the gate" in capsys.readouterr().out


def test_promotion_by_hand_of_a_run(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"name": "made", "dataset": {"name": "poems"}, "loss": {"name": "TripletLoss"}}
    config = Config.model_validate({**recipe, "model": {"name_or_path": "m"}, "training": {"global_batch_size": 10}})
    manifest = builders.manifest()
    plan = builders.plan_of(config, manifest, run_id=RUN, model=None)
    storage.put(f"runs/{RUN}/plan.json", seal(plan))
    assert models(storage, "promote", "faq", "--run", RUN, "--reason", "first") == 5
    assert "has no best model" in capsys.readouterr().err
    finished_run(storage, RUN)
    assert models(storage, "promote", "faq", "--run", RUN, "--reason", "first") == 0
    assert capsys.readouterr().out == f"faq: version 1 serves, {storage.uri}/runs/{RUN}/best\n"
    assert models(storage, "show", "faq", "--json") == 0
    lineage = json.loads(capsys.readouterr().out)["versions"][0]["lineage"]
    assert lineage["recipe_hash"] == config.experiment_hash()
    assert lineage["dataset_versions"] == {"poems": manifest.version}
    assert models(storage, "promote", "faq", "--run", "none", "--reason", "x") == 2
    assert "run none does not exist" in capsys.readouterr().err


def test_rollback(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        gated(storage, f"r{number}", "Promote.")
    assert models(storage, "rollback", "faq", "--reason", "answers in French") == 0
    assert capsys.readouterr().out.startswith("faq: version 2 serves instead of version 3, ")
    assert models(storage, "rollback", "faq", "--to", "1", "--reason", "still") == 0
    assert [(champion.version, champion.kind) for champion in history(storage, "faq")][:2] == [
        (1, "rollback"),
        (2, "rollback"),
    ]
    register(storage, "faq", finished_run(storage, "r4"), "me")
    for number in ("1", "4", "9"):
        assert models(storage, "rollback", "faq", "--to", number, "--reason", "x") == 2
        assert f"version {number} of faq is not an earlier champion" in capsys.readouterr().err
    assert models(storage, "show", "faq") == 0
    assert "restored by rollback" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["promote", "faq", "--version", "1"],
        ["promote", "faq", "--version", "1", "--reason", " "],
        ["promote", "faq", "--reason", "x"],
        ["promote", "faq", "--version", "1", "--run", "r1", "--reason", "x"],
        ["rollback", "faq"],
        ["rollback", "faq", "--reason", ""],
    ],
    ids=str,
)
def test_a_version_and_a_reason_are_required(storage: LocalStorage, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        models(storage, *arguments)
    assert caught.value.code == 2
    assert storage.list("") == []


def test_lineage_leads_to_the_source_files(
    storage: LocalStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    texts = ({name: f"{name} {number}" for name in ("anchor", "positive", "negative")} for number in range(90))
    rows = "".join(json.dumps(row) + "\n" for row in texts)
    (tmp_path / "old.jsonl").write_text(rows)
    (tmp_path / "new.jsonl").write_text(rows.replace('": "', '": "other '))
    build_version([tmp_path / "old.jsonl"], storage, "poems")
    manifest = append([tmp_path / "new.jsonl"], storage, "poems").manifest
    plan = builders.plan_of(builders.config(), manifest, run_id=RUN)
    storage.put(f"runs/{RUN}/plan.json", seal(plan))
    gated(storage, RUN, "Promote: it is better.")
    assert models(storage, "lineage", "faq") == 0
    shown = capsys.readouterr().out
    version = resolve(storage, "faq")[1]
    expected = [
        "generation 1: version 1",
        f"sha256 {version.commit.files['model.safetensors'].sha256}",
        str(version.decision),
        f"run      {RUN}, recipe 370c47fc, from the base model",
        f"data     poems {manifest.version}",
        *(f"sha256 {shard.sha256}  {manifest.key_of(shard)}" for shard in manifest.splits["train"]),
        *(f"sha256 {source.sha256}  {source.name}" for source in manifest.sources),
    ]
    assert [text for text in expected if text not in shown] == []
    assert len(manifest.splits["train"]) == 2
    assert [Path(source.name).name for source in manifest.sources] == ["old.jsonl", "new.jsonl"]
    assert models(storage, "lineage", "faq", "--version", "2") == 5
