"""One whole `tercet train` on two local Ray workers, and everything that it stores and prints."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support import tiny_model
from support.commands import PROGRAMS, check, run_command, tercet
from support.forks import Forked

RUN_ID = "whole-run"


@dataclass(frozen=True)
class Finished:
    """A finished run: its recipe, its folder in storage, and its screen output."""

    recipe: Path
    store: Path
    folder: Path
    screen: str

    def document(self, name: str) -> Any:
        """Return the fields of a document, without its seal."""
        document = json.loads((self.folder / name).read_text(encoding="utf-8"))
        document.pop("sha256")
        return document


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> Finished:
    folder = tmp_path_factory.mktemp("whole-run")
    recipe = tiny_model.write_recipe(folder / "recipe.yaml", tiny_model_dir, store, workers={"num_workers": 2})
    done = check(run_command(tercet("train", recipe, "--run-id", RUN_ID), environment, folder))
    return Finished(recipe, store, store / "runs" / RUN_ID, done.stdout)


def without_rays_own(screen: str) -> str:
    """Remove the lines of Ray's controller if it printed a traceback of its own, as it does on a busy machine when its
    autoscaler answers late. Lines of workers stay."""
    if "autoscaling_coordinator_client.py" not in screen:
        return screen
    return "\n".join(line for line in screen.splitlines() if "(TrainController pid=" not in line)


def test_the_screen_tells_the_story_in_order(finished: Finished) -> None:
    steps = ["step 0/33  eval", "step 11/33  eval", "step 33/33  eval", f"Run {RUN_ID}  finished", "On the test split"]
    places = [finished.screen.find(step) for step in steps]
    assert -1 not in places, finished.screen
    assert places == sorted(places), finished.screen
    assert "the best model is better than the baseline: ndcg@10" in finished.screen
    ours = without_rays_own(finished.screen)
    assert "Traceback" not in ours, ours
    assert "Warning" not in ours, ours
    assert "core_worker.cc" not in finished.screen, finished.screen


def test_the_tuned_model_is_better_on_the_test_split(finished: Finished) -> None:
    metrics = finished.document("metrics.json")
    for name in ("ndcg@10", "mrr@10", "triplet_accuracy"):
        assert metrics["best_test"][name] > metrics["baseline_test"][name] + 0.2, name
    assert metrics["baseline_eval"]["loss"] > 1.5 * metrics["best_eval"]["loss"]


def test_best_is_the_best_evaluation(finished: Finished) -> None:
    metrics = finished.document("metrics.json")
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 11, 22, 33]
    best = max(metrics["evaluations"][1:], key=lambda entry: entry["ndcg@10"])
    assert metrics["best_step"] == best["step"] == finished.document("best/COMMIT")["step"]
    assert metrics["best_eval"] == {name: best[name] for name in ("loss", "ndcg@10", "mrr@10", "triplet_accuracy")}


@pytest.mark.parametrize("split", ["eval", "test"])
@pytest.mark.parametrize("which", ["baseline", "best"])
def test_the_metrics_are_those_of_the_stored_model(
    finished: Finished, tiny_model_dir: Path, split: str, which: str
) -> None:
    """Measured again without tercet: rows from Parquet, evaluators of sentence-transformers."""
    reported = finished.document("metrics.json")[f"{which}_{split}"]
    measured = _measure(finished.folder / "best" if which == "best" else tiny_model_dir, finished.store, split)
    assert {name: reported[name] for name in measured} == pytest.approx(measured, abs=1e-5)


def _measure(model_dir: Path, store: Path, split: str) -> dict[str, float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, TripletEvaluator

    (version,) = (store / "datasets/tiny/versions").iterdir()
    shards = json.loads((version / "manifest.json").read_text())["splits"]
    rows = {
        name: [row for s in shards[name] for row in pq.read_table(version / s["path"]).to_pylist()] for name in shards
    }
    positives = sorted({row["positive"] for part in rows.values() for row in part})
    relevant: dict[str, set[str]] = {row["anchor"]: set() for row in rows[split]}
    for part in rows.values():
        for row in part:
            if row["anchor"] in relevant:
                relevant[row["anchor"]].add(row["positive"])
    model = SentenceTransformer(str(model_dir), device="cpu")
    retrieval = InformationRetrievalEvaluator(
        queries={anchor: anchor for anchor in relevant},
        corpus={text: text for text in positives},
        relevant_docs=relevant,
        ndcg_at_k=[10],
        mrr_at_k=[10],
        write_csv=False,
    )(model)
    columns = ([row[name] for row in rows[split]] for name in ("anchor", "positive", "negative"))
    triplet = TripletEvaluator(*columns, write_csv=False)(model)
    return {
        "ndcg@10": retrieval["cosine_ndcg@10"],
        "mrr@10": retrieval["cosine_mrr@10"],
        "triplet_accuracy": triplet["cosine_accuracy"],
    }


def test_commit_lists_every_file_with_its_sha256(finished: Finished) -> None:
    folders = [finished.folder / "best", *(finished.store / commit["folder"] for commit in _commits(finished))]
    assert len(folders) == 4
    for folder, commit in zip(folders, [finished.document("best/COMMIT"), *_commits(finished)], strict=True):
        on_disk = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        listed = {name: record["sha256"] for name, record in commit["files"].items()}
        extra = {"COMMIT"} if folder.name == "best" else {"rank-0.json", "rank-1.json"}
        assert set(on_disk) - set(listed) == extra
        assert listed == {name: hashlib.sha256(on_disk[name].read_bytes()).hexdigest() for name in listed}


def _commits(finished: Finished) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(finished.folder.glob("checkpoints/*/COMMIT"))]


def test_the_published_folder_holds_no_training_state(finished: Finished) -> None:
    names = {path.name for path in (finished.folder / "best").rglob("*")}
    assert {"model.safetensors", "modules.json", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if name.startswith(("optimizer", "scheduler", "rng_state", "training_args"))}


def test_the_model_card_parses_and_holds_the_test_metrics(finished: Finished) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished.folder / "best" / "README.md")
    metrics = finished.document("metrics.json")
    values = {
        (result.dataset_split, result.metric_name): result.metric_value for result in card.data.eval_results or []
    }
    for name in ("ndcg@10", "mrr@10", "triplet_accuracy"):
        assert values["test", name] == metrics["best_test"][name]
        assert values["eval", name] == metrics["best_eval"][name]
    assert card.data.to_dict()["model-index"]
    assert card.data.library_name == "sentence-transformers"
    assert f"Run `{RUN_ID}`" in card.text.replace("\n", " ")


def test_events_record_each_stage_in_order(finished: Finished) -> None:
    events = [json.loads(line) for line in (finished.folder / "events.jsonl").read_text().splitlines()]
    stages = ["start", "train", "test", "publish"]
    expected = [f"{stage} {what}" for stage in stages for what in ("started", "finished")]
    assert [event["event"] for event in events] == [*expected, "run finished"]
    times = [event["unix_seconds"] for event in events]
    assert times == sorted(times)
    assert (events[1]["use_gpu"], events[1]["reason"]) == (False, "workers.use_gpu is false")
    assert "the workers use CPUs: workers.use_gpu is false" in finished.screen


def test_plan_report_and_page_are_valid(finished: Finished) -> None:
    from tercet.artifacts.report import RunReport
    from tercet.planning.survey import read_plan
    from tercet.storage import open_storage

    plan = read_plan(open_storage(str(finished.store)), RUN_ID)
    report = RunReport.model_validate(finished.document("report.json"))
    assert (plan.num_steps, plan.config.workers.num_workers, report.status) == (33, 2, "finished")
    assert report.metrics is not None
    assert report.metrics.model_dump(mode="json") == finished.document("metrics.json")
    assert set(report.seconds) == {"start", "train", "test", "publish"}

    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    parser = _Tags()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not re.search(r"""(?:src|href)=["']https?:""", page), "the page must stand alone"
    assert RUN_ID in page
    assert f"{report.metrics.best_test['ndcg@10']:.4f}" in page


class _Tags(HTMLParser):
    """Collects open tags, except those that need no closing tag."""

    void = (
        "meta",
        "link",
        "br",
        "hr",
        "img",
        "line",
        "path",
        "circle",
        "rect",
        "polyline",
        "td",
        "th",
        "tr",
        "p",
        "li",
    )

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_same_command_again_returns_the_result_at_once(finished: Finished, environment: dict[str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    without_ray = environment | {"RAY_ADDRESS": "127.0.0.1:1"}  # nothing listens there
    done = check(run_command(tercet("train", finished.recipe, "--run-id", RUN_ID), without_ray, finished.recipe.parent))
    assert done.stdout.strip() == finished.screen[finished.screen.index(f"Run {RUN_ID}") :].strip()
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_another_recipe_under_its_run_id_is_refused(finished: Finished, environment: dict[str, str]) -> None:
    command = tercet("train", finished.recipe, "--run-id", RUN_ID, "--set", "training.learning_rate=1e-30")
    done = check(run_command(command, environment, finished.recipe.parent), code=2)
    assert "exists with another recipe" in done.stdout


def test_runs_list_and_show(finished: Finished, environment: dict[str, str]) -> None:
    value = finished.document("metrics.json")["best_test"]["ndcg@10"]
    listing = check(run_command(tercet("runs", "list", "--storage", finished.store), environment, finished.store))
    assert f"{RUN_ID}  finished  test ndcg@10 {value:.4f}" in listing.stdout
    show = ("runs", "show", RUN_ID, "--storage", finished.store)
    screen = check(run_command(tercet(*show), environment, finished.store)).stdout
    assert "On the test split the best model is better than the baseline" in screen
    document = check(run_command(tercet(*show, "--json"), environment, finished.store)).stdout
    assert json.loads(document) == finished.document("report.json")


@pytest.fixture(scope="module")
def failures(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs that their learning rate makes fail: the first on Ray, the others with the worker in the driver."""
    folder = tmp_path_factory.mktemp("failures")
    done = {}
    for run_id, learning_rate in (("frozen", 1e-60), ("unmoved", 1e-30), ("bursting", 1e20)):
        training = {"learning_rate": learning_rate, "num_epochs": 1, "max_grad_norm": 0.0}
        recipe = tiny_model.write_recipe(folder / f"{run_id}.yaml", tiny_model_dir, store, training=training)
        command: list[str] | Forked = tercet("train", recipe, "--run-id", run_id)
        if run_id != "frozen":
            command = Forked((str(PROGRAMS / "train_without_ray.py"), "train", str(recipe), "--run-id", run_id))
        done[run_id] = run_command(command, environment, folder)
    return done


@pytest.mark.parametrize(
    ("run_id", "stage", "message"),
    [
        ("frozen", "train", "no weight moved in the first 5 steps"),
        ("unmoved", "train", "no weight moved in the first 5 steps"),  # but biases of 0 did, by 1e-30
        ("bursting", "train", "the (loss|gradient|norm of all gradients|weight).* is (nan|inf)"),
    ],
)
def test_a_run_that_cannot_succeed_fails_with_a_report(
    failures: dict[str, subprocess.CompletedProcess[str]], store: Path, run_id: str, stage: str, message: str
) -> None:
    done = check(failures[run_id], code=6)
    assert re.search(f"tercet: .*{message}", done.stdout), done.stdout
    assert "Traceback" not in without_rays_own(done.stdout)
    report = json.loads((store / "runs" / run_id / "report.json").read_text())
    assert (report["status"], report["failed_stage"], report["metrics"]) == ("failed", stage, None)
    assert re.search(message, report["error"])
    assert (store / "runs" / run_id / "report.html").is_file()
    assert not (store / "runs" / run_id / "best").exists()
