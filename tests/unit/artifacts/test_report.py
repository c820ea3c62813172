"""The report on the screen, the verdict, and the stored document."""

from __future__ import annotations

import json

import pytest

from support import builders
from tercet.artifacts.report import RunReport, losses, verdict
from tercet.cli.screens import next_commands, screen
from tercet.storage.documents import seal, unseal

SCREEN = """\
Run 20260314-made-0a1b2c3d-4e5f6a7b  finished

  data     poems 4e5f6a7b8c9d0e1f: train 1,105  eval 20  test 30 rows
  trained  20 steps on 2 workers

                               eval                         test
                    baseline     best    change  baseline     best    change
  ndcg@10             0.4000   0.7000   +0.3000    0.5000   0.7500   +0.2500
  loss                2.0000   1.5000   -0.5000
  best: step 10 of 20 (epoch 1), by ndcg@10 on eval

  On the test split the best model is better than the baseline: ndcg@10 0.5000 → 0.7500 (+0.2500).

  seconds  train 61  test 5

  run      /store/runs/r
  model    /store/runs/r/best

Next:
  look at the report     /store/runs/r/report.html"""


def test_the_screen_of_a_finished_run() -> None:
    shown = screen(builders.report(), [("look at the report", "/store/runs/r/report.html")])
    assert "\n".join(line.rstrip() for line in shown.splitlines()) == SCREEN


def test_the_screen_says_how_fast_it_was() -> None:
    shown = screen(builders.report(throughput=builders.throughput()), []).splitlines()
    assert "  speed    16.0 rows/s  100 tokens/s  25 % of the peak of H100 SXM in bf16" in shown
    assert "  waited   data 8.0 %, ranks 8.0 %, storage 20.0 %" in shown


def test_the_screen_names_every_dataset_of_a_mix() -> None:
    shares = ("poems 4e5f6a7b8c9d0e1f: 1,105 train rows, weight 1", "docs 0123456789abcdef: 50 train rows, weight 0.5")
    shown = screen(builders.report(mix=shares), []).splitlines()
    assert shown[3:5] == [f"  mix      {share}" for share in shares]
    assert shown[2].startswith("  data     poems 4e5f6a7b8c9d0e1f: ")


def test_the_screen_of_a_failed_run() -> None:
    failed = builders.report(
        status="failed", failed_stage="train", error="no weight moved", metrics=None, best_uri=None, num_workers=1
    )
    shown = screen(failed, [])
    assert "failed in stage `train`: no weight moved" in shown
    assert "on 1 worker\n" in shown
    assert "on 2 workers, in 3 attempts\n" in screen(builders.report(num_attempts=3), [])
    assert "model  " not in shown
    assert "Next:" not in shown


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(0.5, 0.75, "is better than"), (0.75, 0.5, "is NOT better than"), (0.5, 0.5, "is NOT better than")],
)
def test_the_verdict(before: float, after: float, words: str) -> None:
    report = builders.report(metrics=builders.metrics(before, after))
    assert words in verdict(report)
    assert f"{before:.4f} → {after:.4f} ({after - before:+.4f})" in verdict(report)
    assert report.gain == after - before


def test_the_verdict_is_about_the_test_split() -> None:
    assert "NOT better" in verdict(builders.report(metrics=builders.metrics(0.9, 0.8)))  # although eval went up


@pytest.mark.parametrize("report", [builders.report(), builders.report(status="failed", error="x", metrics=None)])
def test_a_report_survives_storage(report: RunReport) -> None:
    assert unseal(RunReport, seal(report), "report.json") == report
    assert json.loads(seal(report))["run_id"] == report.run_id


def test_losses_are_those_of_training() -> None:
    assert losses(builders.LOG_HISTORY) == [(1, 2.5), (10, 1.25)]


def test_the_next_commands_fit_where_the_run_is_stored() -> None:
    local, remote = (
        builders.report(run_uri="/store/runs/r"),
        builders.report(run_uri="s3://b/runs/r", best_uri="s3://b/runs/r/best"),
    )
    assert dict(next_commands(local, "demo.yaml"))["look at the report"] == "/store/runs/r/report.html"
    assert (
        dict(next_commands(remote, "demo.yaml"))["load the model"] == "aws s3 cp --recursive s3://b/runs/r/best ./model"
    )
