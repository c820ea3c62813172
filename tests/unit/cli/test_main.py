"""The command line: what it prints, and the exit code of each kind of error. Without Ray and torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import builders
from tercet import errors
from tercet.cli.main import main
from tercet.config.recipe import Config
from tercet.data.manifest import Manifest
from tercet.data.versions import publish, read_manifest
from tercet.pipeline import run
from tercet.planning import survey
from tercet.storage import open_storage
from tercet.storage.documents import seal

RECIPE = """\
name: made
storage: {uri: STORE}
dataset: {name: poems}
model: {name_or_path: someone/model}
loss: {name: TripletLoss}
training: {global_batch_size: 10, num_epochs: 2}
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path: Path, store: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("STORE", store))
    return str(path)


@pytest.fixture
def dataset(store: str) -> Manifest:
    return publish(open_storage(store), builders.manifest())


def rows(path: Path, number: int, bad: int = 0) -> str:
    lines = [json.dumps({"anchor": f"a {n}", "positive": f"p {n}", "negative": f"n {n}"}) for n in range(number)]
    path.write_text("\n".join([*lines, *(["{not json"] * bad)]) + "\n")
    return str(path)


ERRORS = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.TercetError)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_its_exit_code_and_no_traceback(
    error: type[errors.TercetError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error("what happened", hint="what to do")

    monkeypatch.setattr("tercet.cli.main._schema", fail)
    assert main(["schema"]) == error.exit_code > 0
    shown = capsys.readouterr()
    assert shown.err == "tercet: what happened\n  → what to do\n"
    assert shown.out == ""
    with pytest.raises(error):
        main(["schema", "--debug"])


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    errors_of_files = [PermissionError(13, "Permission denied", "rows.jsonl"), OSError("not of a file")]

    def fail(_: object) -> None:
        raise errors_of_files[0]

    monkeypatch.setattr("tercet.cli.main._schema", fail)
    assert main(["schema"]) == 1
    assert capsys.readouterr().err.startswith("tercet: rows.jsonl: Permission denied\n  → ")
    with pytest.raises(PermissionError):
        main(["schema", "--debug"])
    errors_of_files.pop(0)
    with pytest.raises(OSError, match="not of a file"):
        main(["schema"])


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "No such file", "shard")])
def test_an_error_of_a_worker_is_never_taken_for_one_of_the_terminal(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tercet.planning.survey.plan_of_file", lambda _: None)
    monkeypatch.setattr("tercet.training.worker.notice_of_sigterm", lambda: None)
    monkeypatch.setattr("tercet.training.worker.run_worker", fail)
    with pytest.raises(type(error)):
        main(["worker", str(tmp_path / "plan.json")])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tercet.cli.main._schema", interrupt)
    assert main(["schema"]) == 130
    assert "the same command resumes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["plan"], ["datasets"], ["shard", "x"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: tercet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        "shard",
        "datasets",
        "datasets list",
        "datasets show",
        "plan",
        "train",
        "submit",
        "runs",
        "runs list",
        "runs show",
    ],
)
def test_every_command_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: tercet {verb} ")


def test_shard_then_list_then_show(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = rows(tmp_path / "rows.jsonl", 200)
    shard = ["shard", source, "--to", store, "--name", "poems"]
    assert main(shard) == 0
    first = capsys.readouterr().out
    version = first.split()[1]
    assert first.startswith(f"poems {version}  published\n")
    assert "bad rows   none" in first

    assert main(shard) == 0
    assert capsys.readouterr().out.startswith(f"poems {version}  already published\n")
    assert main(["datasets", "list", "--storage", store]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["poems", version, "200", "rows"]
    assert line.endswith("latest")

    assert main(["datasets", "show", "poems", "--storage", store]) == 0
    shown = capsys.readouterr().out
    assert f"poems {version}" in shown
    assert f"source     {source}  200 rows" in shown


def test_append_adds_new_rows(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", rows(tmp_path / "rows.jsonl", 200), "--to", store, "--name", "poems"]) == 0
    capsys.readouterr()
    more = ["append", rows(tmp_path / "more.jsonl", 260), "--to", store, "--name", "poems"]
    assert main(more) == 0
    added = capsys.readouterr().out
    assert re.match(r"poems \w{16}  added train \d+, eval \d+, test \d+ rows; 200 rows already in the dataset\n", added)
    assert "not added  200 rows" in added
    assert main(more) == 0
    assert capsys.readouterr().out.endswith("nothing new; 1 file was read before\n")


def test_rollback_removes_bad_rows_that_were_added(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(store)
    assert main(["shard", rows(tmp_path / "rows.jsonl", 200), "--to", store, "--name", "poems"]) == 0
    first = read_manifest(storage, "poems").version
    assert main(["append", rows(tmp_path / "more.jsonl", 260), "--to", store, "--name", "poems"]) == 0
    second = read_manifest(storage, "poems").version
    rollback = ["datasets", "rollback", "poems", "--storage", store, "--to"]
    capsys.readouterr()
    assert main([*rollback, first]) == 0
    assert f"poems: {first} is the newest version again, instead of {second}" in capsys.readouterr().out
    assert read_manifest(storage, "poems").version == first
    assert main([*rollback, "deadbeef"]) == 3
    assert main(["append", str(tmp_path / "more.jsonl"), "--to", store, "--name", "poems"]) == 0
    assert read_manifest(storage, "poems").version == second


@pytest.mark.parametrize("margin", ["1.5", "-1"])
def test_mine_refuses_an_impossible_margin(recipe: str, capsys: pytest.CaptureFixture[str], margin: str) -> None:
    assert main(["mine", recipe, "--into", "x", "--relative-margin", margin]) == 2
    assert "relative_margin" in capsys.readouterr().err


def test_shard_of_pairs_under_other_names(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("q,a\n" + "".join(f"question {n},answer {n}\n" for n in range(100)))
    pairs = ["--pairs", "--anchor", "q", "--positive", "a"]
    assert main(["shard", str(tmp_path / "p.csv"), "--to", store, "--name", "p", *pairs]) == 0
    assert "negative" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        (["--negative", "wrong"], ["negative"]),
        (["--negative", "wrong", "--negative", "far"], ["negative_1", "negative_2"]),
        (["--negative", "far", "--negative", "far"], ["negative"]),
    ],
)
def test_shard_of_several_negatives(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], flags: list[str], columns: list[str]
) -> None:
    lines = [
        json.dumps({"anchor": f"a {n:03}", "positive": f"p {n:03}", "wrong": f"w {n:03}", "far": f"far {n:03}"})
        for n in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert main(["shard", str(tmp_path / "rows.jsonl"), "--to", store, "--name", "n", *flags]) == 0
    capsys.readouterr()
    assert main(["datasets", "show", "n", "--storage", store]) == 0
    averages = [line for line in capsys.readouterr().out.splitlines() if "characters on average" in line]
    width = {"wrong": "5.0", "far": "7.0"}
    shown = {column: width[flag] for column, flag in zip(columns, flags[1::2], strict=False)}
    assert [line.split()[:2] for line in averages] == [
        ["anchor", "5.0"],
        ["positive", "5.0"],
        *([column, chars] for column, chars in shown.items()),
    ]
    assert len({line.index("characters") for line in averages}) == 1
    assert read_manifest(open_storage(store), "n").columns == ("anchor", "positive", *columns)


@pytest.mark.parametrize(
    "bad", [{}, {"far": None}, {"far": ""}, {"far": " \u200b"}], ids=["none", "null", "empty", "blank"]
)
def test_a_row_must_have_every_negative(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], bad: dict[str, str | None]
) -> None:
    good = [{"anchor": f"a {n}", "positive": f"p {n}", "negative": f"n {n}", "far": f"far {n}"} for n in range(100)]
    lines = [*good, {"anchor": "a", "positive": "p", "negative": "n", **bad}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shard = ["shard", str(tmp_path / "rows.jsonl"), "--to", store, "--name", "n", "--negative", "negative"]
    assert main([*shard, "--negative", "far"]) == 0
    shown = capsys.readouterr()
    assert "bad rows   1 " in shown.out
    assert "negative_2" in shown.err
    assert sum(read_manifest(open_storage(store), "n").num_rows.values()) == 100


def test_pairs_have_no_negative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["shard", rows(tmp_path / "rows.jsonl", 9), "--name", "p", "--pairs", "--negative", "negative"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_shard_of_too_many_bad_rows(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    shard = ["shard", rows(tmp_path / "rows.jsonl", 90, bad=10), "--to", store, "--name", "poems"]
    assert main(shard) == 3
    assert "rows.jsonl:91" in capsys.readouterr().err
    assert main(["datasets", "list", "--storage", store]) == 0
    assert capsys.readouterr().out.startswith("no dataset in ")
    assert main([*shard, "--max-bad-rows", "0.2"]) == 0
    assert "bad rows   10 " in capsys.readouterr().out


def test_shard_of_a_missing_file(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(tmp_path / "none.jsonl"), "--to", store, "--name", "p"]) in (3, 5)
    assert "none.jsonl" in capsys.readouterr().err


def test_an_unknown_dataset_names_the_nearest_one(
    dataset: Manifest, store: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["datasets", "show", "poem", "--storage", store]) == 3
    assert "Did you mean 'poems'?" in capsys.readouterr().err
    assert main(["plan", recipe, "--set", "dataset.name=poem"]) == 3
    assert "Did you mean 'poems'?" in capsys.readouterr().err
    assert main(["plan", recipe, "--set", "dataset.version=deadbeef"]) == 3
    assert dataset.version in capsys.readouterr().err


def test_plan(dataset: Manifest, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--set", "training.warmup_ratio=0.1", "--run-id", "mine"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["run"] == "mine"
    assert shown["data"].startswith(f"poems {dataset.version}: train 105  eval 20  test 30 rows;")
    assert shown["steps"].startswith("20 = 2 epochs × 10; warm-up 2; 5 rows of each pass excluded")  # noqa: RUF001
    assert shown["evaluation"].startswith("by ndcg@10 after steps 0, 10, 20,")
    assert "mix" not in shown
    assert main(["plan", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 20


def test_plan_of_a_mix(dataset: Manifest, recipe: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = publish(open_storage(store), builders.mixed_manifest("faq"))
    ranking = ["--set", "loss={name: MultipleNegativesRankingLoss}"]
    assert main(["plan", recipe, *ranking, "--set", "mix=[{name: faq, weight: 0.5}]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("mix "))
    assert [line[13:] for line in lines[first : first + 2]] == [
        f"poems {dataset.version}: 105 train rows, weight 1, 10 steps an epoch",
        f"faq {mixed.version}: 50 train rows, weight 0.5, 2 steps an epoch",
    ]
    assert lines[first + 1].startswith(" ")
    assert main(["plan", recipe, "--set", "mix=[{name: fag}]"]) == 3
    assert "Did you mean 'faq'?" in capsys.readouterr().err


def test_plan_of_memory_and_parallelism(
    dataset: Manifest, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*overrides: str) -> dict[str, str]:
        assert main(["plan", recipe, *(word for text in overrides for word in ("--set", f"workers.{text}"))]) == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    assert shown()["memory"] == shown()["storage"] == "unknown until the model is on this machine"
    assert shown()["parallelism"].startswith("ddp  (auto: the memory that the model needs is unknown")
    monkeypatch.setattr(survey, "locate", lambda _: Path("somewhere"))
    monkeypatch.setattr(survey, "read_facts", lambda _: builders.FACTS)
    assert shown()["memory"] == (
        "weights 3.9 KiB + gradients 3.9 KiB + optimizer 7.8 KiB + activations 832.5 KiB = about 848.1 KiB a worker"
        "  (on CPUs)"
    )
    assert "warning" not in shown()
    tight = shown("memory_gib_per_worker=0.0001", "parallelism=zero3_offload")
    assert tight["parallelism"] == "zero3_offload  (as the recipe says)"
    assert tight["memory"].endswith(" a worker; host memory 23.4 KiB  (on CPUs)")
    assert tight["warning"].startswith("zero3_offload needs ")
    on_cpu = shown("use_gpu=false", "num_workers=2")
    monkeypatch.setattr(survey, "_bytes_per_worker", lambda num_workers: 6 * 2**30 // num_workers)
    assert shown("use_gpu=false", "num_workers=2").keys() == on_cpu.keys()
    fits = shown("use_gpu=false", "num_workers=2")["parallelism"]
    assert fits == "ddp  (auto: it fits into the 3.0 GiB of a worker, and no mode is faster)"
    monkeypatch.setattr(survey, "_bytes_per_worker", lambda _: None)
    assert "the memory of a worker is unknown" in shown("use_gpu=false")["parallelism"]
    assert dataset.num_rows


def test_plan_starts_and_writes_nothing(dataset: Manifest, recipe: str, store: str) -> None:
    before = open_storage(store).list("")
    assert main(["plan", recipe]) == 0
    assert open_storage(store).list("") == before
    assert dataset.num_rows


def test_a_plan_that_cannot_work(dataset: Manifest, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--set", "workers.num_workers=3", "--set", "training.max_train_rows=5"]) == 4
    shown = capsys.readouterr().err
    assert "cannot be shared by 3 workers" in shown
    assert "5 train rows of poems do not fill" in shown
    assert "Traceback" not in shown
    assert dataset.num_rows


@pytest.mark.parametrize("verb", ["plan", "train", "submit"])
def test_a_wrong_recipe(verb: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, recipe, "--set", "training.seeed=1"]) == 2
    assert "did you mean `seed`?" in capsys.readouterr().err
    assert main([verb, "no/such.yaml"]) == 2


def test_no_runs(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--storage", store]) == 0
    assert capsys.readouterr().out == f"no run in {store}\n"
    assert main(["runs", "show", "r1", "--storage", store]) == 2
    assert "run r1 does not exist" in capsys.readouterr().err


def test_runs(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(store)
    reports = {
        "r1": builders.report(run_id="r1"),
        "r2": builders.report(run_id="r2", status="failed", failed_stage="train", error="boom\nmore", metrics=None),
        "r3": None,
    }
    for run_id, report in reports.items():
        storage.put(f"runs/{run_id}/plan.json", b"{}")
        if report is not None:
            storage.put(f"runs/{run_id}/report.json", seal(report))
    assert main(["runs", "list", "--storage", store]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "r3  not finished",
        "r2  failed in train: boom",
        "r1  finished  test ndcg@10 0.7500 (+0.2500)",
    ]
    assert main(["runs", "show", "r1", "--storage", store]) == 0
    assert "is better than the baseline" in capsys.readouterr().out
    assert main(["runs", "show", "r1", "--json", "--storage", store]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == "r1"
    assert main(["runs", "show", "r3", "--storage", store]) == 2
    assert "run r3 has not finished" in capsys.readouterr().err


def test_train_prints_the_report_and_the_next_commands(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run", lambda *_: builders.report())
    assert main(["train", recipe]) == 0
    shown = capsys.readouterr().out
    assert "is better than the baseline" in shown
    assert shown.index("Next:") < shown.index("/store/runs/r/report.html")
    assert "SentenceTransformer" in shown


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Config.model_json_schema()


def test_a_reader_that_closes_early_is_no_error() -> None:
    code = "import sys; from tercet.cli.main import main; sys.exit(main(['schema']))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert b"Traceback" not in done.stderr
