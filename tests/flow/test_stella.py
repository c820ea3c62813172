"""The published stella recipe on a tiny model with its files, without their code; models with code of their own."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest

from support import tiny_model
from support.commands import check, run_command
from support.workers import commits, make_plan, model_folder, training_log, weights, worker_of
from tercet.artifacts.best import best_commit, publish_best
from tercet.config.examples import example_path
from tercet.config.losses import TripletLossConfig
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError
from tercet.model.encoder import load_model
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage

RECIPE = example_path("stella_triplet")
TEXTS = tiny_model.all_texts()[:6]
SWITCHED_OFF = {"use_memory_efficient_attention": False, "unpad_inputs": False}


@pytest.fixture(scope="module")
def plan(tiny_new_dir: Path, store: Path) -> TrainPlan:
    """The plan of the recipe, with only places and devices changed."""
    places = (
        f"storage.uri={store}",
        "dataset.name=tiny",
        f"model.name_or_path={tiny_new_dir}",
        "model.revision=null",
    )
    return make_plan(RECIPE, "stella", (*places, "workers.use_gpu=false"))


@pytest.fixture(scope="module")
def trained(
    plan: TrainPlan, tmp_path_factory: pytest.TempPathFactory, store: Path, environment: dict[str, str]
) -> Path:
    path = tmp_path_factory.mktemp("stella-plan") / "plan.json"
    path.write_text(plan.model_dump_json())
    check(run_command(worker_of(path), environment, path.parent))
    return store


def test_the_recipe_is_the_published_one(plan: TrainPlan) -> None:
    assert plan.config.loss == TripletLossConfig(name="TripletLoss", distance_metric="euclidean", triplet_margin=5.0)
    training = plan.config.training
    assert (training.num_epochs, training.global_batch_size, training.learning_rate) == (3, 16, 2e-5)
    assert (training.lr_scheduler, training.warmup_ratio, training.weight_decay) == ("cosine", 0.1, 0)
    assert (plan.metric, plan.num_steps, plan.evaluation_steps) == ("triplet_accuracy", 36, (0, 12, 24, 36))
    assert (plan.config.model.trust_remote_code, plan.config.model.config_kwargs) == (False, {})


def test_every_epoch_is_measured_and_kept(trained: Path) -> None:
    kept = commits(trained, "stella")
    assert [(commit.step, commit.epoch) for commit in kept] == [(36, 3.0), (24, 2.0), (12, 1.0)]
    assert all("triplet_accuracy" in commit.metrics for commit in kept)
    rates = [
        entry["learning_rate"] for entry in training_log(trained, "stella")["log_history"] if "learning_rate" in entry
    ]
    assert max(rates) <= 2e-5


def test_the_whole_model_is_trained(trained: Path, tiny_new_dir: Path) -> None:
    """Its weights keep the names of the original."""
    before, after = weights(tiny_new_dir), weights(model_folder(trained, commits(trained, "stella")[0]))
    assert before.keys() == after.keys()
    assert after["2_Dense/linear.weight"].shape == (1024, 32)
    # The loss depends on differences of embeddings, in which the last bias cancels out.
    still = {name for name in before if bool((before[name] == after[name]).all())}
    assert still <= {"2_Dense/linear.bias"}


def test_the_published_folder_loads_without_any_code(
    trained: Path, plan: TrainPlan, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A process without tercet gives the embeddings of the trained model."""
    best = best_commit(commits(trained, "stella"), plan.metric)
    assert best is not None
    publish_best(open_storage(str(trained)), "stella", best, "# a card")
    folder = trained / "runs/stella/best"
    assert not [*folder.rglob("*.py")]
    script = f"""
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(folder)!r}, device="cpu")
print(type(model[0].auto_model).__name__, model[1].pooling_mode, model[0].auto_model.config.rope_parameters)
numpy.save({str(tmp_path / "embeddings.npy")!r}, model.encode({TEXTS!r}))
"""
    done = check(run_command([environment["PYTHON"], "-c", "import numpy" + script], environment, tmp_path))
    scaling = {"rope_type": "linear", "rope_theta": 320000.0, "factor": 2 ** (2 / 16)}
    name, mode, parameters = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert (name, mode, ast.literal_eval(parameters)) == ("GteModel", "mean", scaling)
    loaded = load_model(ModelConfig(name_or_path=str(folder)), "cpu").encode(TEXTS)
    assert abs(np.load(tmp_path / "embeddings.npy") - loaded).max() < 1e-6


def test_a_model_that_saves_wrongly_ends_the_run_before_its_first_step(
    tiny_stella_dir: Path, store: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    folder = tmp_path / "wrong_code"
    shutil.copytree(tiny_stella_dir, folder)
    saves_wrongly = """
    def save_pretrained(self, *args, **kwargs):
        state = self.state_dict()
        state["norms.0.bias"], state["norms.1.bias"] = state["norms.1.bias"], state["norms.0.bias"]
        super().save_pretrained(*args, **{**kwargs, "state_dict": state})
"""
    with (folder / "modeling.py").open("a") as code:
        code.write(saves_wrongly)
    switches = (f"model.config_kwargs.{name}=false" for name in SWITCHED_OFF)
    own_code = (f"model.name_or_path={folder}", "model.revision=null", "model.trust_remote_code=true", *switches)
    places = (f"storage.uri={store}", "dataset.name=tiny", *own_code)
    path = tmp_path / "plan.json"
    path.write_text(make_plan(RECIPE, "wrong", (*places, "workers.use_gpu=false")).model_dump_json())
    done = check(run_command(worker_of(path), environment, tmp_path), ConfigError.exit_code)
    assert "the model changes when it is saved and loaded again: 0.model.norms.0.bias has other values" in done.stdout
    assert "step 1/" not in done.stdout
    assert commits(store, "wrong") == []


def test_custom_code_needs_trust(tiny_stella_dir: Path) -> None:
    with pytest.raises(ConfigError, match="contains custom code") as caught:
        load_model(ModelConfig(name_or_path=str(tiny_stella_dir), config_kwargs=SWITCHED_OFF))
    assert "model.trust_remote_code: true" in caught.value.hint


def test_an_impossible_fast_path_is_named(tiny_stella_dir: Path) -> None:
    with pytest.raises(ConfigError, match="needs xformers") as caught:
        load_model(ModelConfig(name_or_path=str(tiny_stella_dir), trust_remote_code=True))
    assert "model.config_kwargs" in caught.value.hint


@pytest.mark.parametrize(
    ("claim", "message"), [({"pooling": "cls"}, "has mean"), ({"dense_features": 768}, "has 1024")]
)
def test_an_architecture_that_differs_from_the_recipe_is_refused(
    tiny_stella_dir: Path, claim: dict[str, object], message: str
) -> None:
    known = {"name_or_path": str(tiny_stella_dir), "trust_remote_code": True, "config_kwargs": SWITCHED_OFF}
    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig.model_validate({**known, **claim}))
