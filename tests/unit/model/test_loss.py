"""Each loss of a recipe has the value and gradients of the same loss made by sentence-transformers."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from support.tiny_model import HIDDEN, PARTNERS, all_texts, tiny_bert, tiny_stella, tiny_tokenizer, triplets
from tercet.config.losses import UNSUPPORTED_LOSSES, Loss, LossConfig
from tercet.errors import ConfigError
from tercet.model.loss import load_guide, make_loss

LOSSES: dict[str, type[Loss]] = {
    get_args(loss.model_fields["name"].annotation)[0]: loss for loss in get_args(get_args(LossConfig)[0])
}

# Every parameter of every loss, none at its default. `gather_across_devices` has a test of its own.
RANKING = {"scale": 7.0, "similarity_fct": "dot_score"}
DIRECTIONS = {
    "directions": ("query_to_doc", "doc_to_query"),
    "partition_mode": "per_direction",
    "hardness_mode": "all_negatives",
    "hardness_strength": 0.5,
}
GUIDED = {
    "temperature": 0.2,
    "margin_strategy": "relative",
    "margin": 0.001,
    "contrast_anchors": False,
    "contrast_positives": False,
}
CACHED = {"mini_batch_size": 3, "mini_batch_num_tokens": 11}
OTHER: dict[str, dict[str, Any]] = {
    "TripletLoss": {"distance_metric": "cosine", "triplet_margin": 0.5},
    "MultipleNegativesRankingLoss": {**RANKING, **DIRECTIONS},
    "CachedMultipleNegativesRankingLoss": {**RANKING, **DIRECTIONS, **CACHED},
    "MultipleNegativesSymmetricRankingLoss": {**RANKING},
    "CachedMultipleNegativesSymmetricRankingLoss": {**RANKING, **CACHED},
    "MegaBatchMarginLoss": {
        "positive_margin": 0.9,
        "negative_margin": -0.1,
        "use_mini_batched_version": False,
        **CACHED,
    },
    "GISTEmbedLoss": {**GUIDED},
    "CachedGISTEmbedLoss": {**GUIDED, **CACHED},
    "AnglELoss": {"scale": 7.0},
}
NUM_NEGATIVES = {"TripletLoss": 1, "MegaBatchMarginLoss": 0, "GISTEmbedLoss": 1}  # elsewhere 2

# As sentence-transformers expects it.
NATIVE = {"cosine": TripletDistanceMetric.COSINE, "dot_score": util.dot_score}
MATRYOSHKA = {"dims": [16, 32, 8], "weights": [0.5, 1.0, 0.25]}

Gradients = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("loss") / "model", all_texts())


@pytest.fixture(scope="module")
def guide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another vocabulary: other weights, and texts must be tokenized again."""
    return tiny_bert(tmp_path_factory.mktemp("loss") / "guide", [*all_texts(), "another"])


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    """Its weights are three times as large as BERT's initial ones, which give all texts nearly the same embedding."""
    model = SentenceTransformer(str(folder), device="cpu").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def guide(guide_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(guide_folder), device="cpu").requires_grad_(False).eval()


def config(name: str, **parameters: Any) -> Any:
    guide = {"guide": "another/model"} if "GIST" in name else {}
    return TypeAdapter(LossConfig).validate_python({"name": name, **guide, **parameters})


def features(model: SentenceTransformer, num_negatives: int, num_rows: int = 8) -> list[dict[str, torch.Tensor]]:
    """Return one batch: a dict per column, as the collator makes it."""
    rows = triplets(num_rows)
    columns = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    columns.append(PARTNERS[:num_rows])
    return [model.preprocess(texts) for texts in columns[: 2 + num_negatives]]


def run(loss: torch.nn.Module, model: SentenceTransformer, num_negatives: int) -> tuple[float, Gradients]:
    """Return the loss of one batch, and the gradient of every weight that has one."""
    model.zero_grad(set_to_none=True)
    value = loss(features(model, num_negatives), None)
    value.backward()
    gradients = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    assert sum(float(gradient.abs().sum()) for gradient in gradients.values()) > 1e-3, "nothing to compare"
    return float(value.detach()), gradients


def assert_same(one: tuple[float, Gradients], other: tuple[float, Gradients], tolerance: float) -> None:
    """Compare to `tolerance`, relative to the loss and to the largest gradient where those are above 1."""
    assert one[0] == pytest.approx(other[0], abs=tolerance, rel=tolerance)
    assert one[1].keys() == other[1].keys()
    scale = max(1.0, max(float(gradient.abs().max()) for gradient in other[1].values()))
    largest = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1])
    assert largest < tolerance * scale


def librarys_own(
    name: str, model: SentenceTransformer, guide: SentenceTransformer, parameters: dict[str, Any]
) -> torch.nn.Module:
    native = {key: NATIVE.get(value, value) if isinstance(value, str) else value for key, value in parameters.items()}
    if "GIST" in name:
        native["guide"] = guide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the symmetric losses
        loss: torch.nn.Module = getattr(losses, name)(model, **native)
    return loss


def test_every_loss_of_the_library_is_known() -> None:
    """A new release has new losses: each goes into the union, or into UNSUPPORTED_LOSSES with a reason."""
    classes = {name for name in dir(losses) if inspect.isclass(getattr(losses, name))}
    found = {name for name in classes if issubclass(getattr(losses, name), torch.nn.Module)}
    assert found == set(LOSSES) | set(UNSUPPORTED_LOSSES)
    assert all(reason.startswith("it ") for reason in UNSUPPORTED_LOSSES.values())


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_of_the_library_is_known(name: str) -> None:
    theirs = set(inspect.signature(getattr(losses, name).__init__).parameters)
    ours = set(LOSSES[name].model_fields)
    assert theirs - {"self", "model", "show_progress_bar"} == ours - {"name", "matryoshka", "guide_revision"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_are_the_librarys(name: str) -> None:
    theirs = inspect.signature(getattr(losses, name).__init__).parameters
    for key, field in LOSSES[name].model_fields.items():
        if key in ("name", "matryoshka", "guide", "guide_revision"):
            continue
        default = getattr(util, field.default) if key == "similarity_fct" else field.default
        if key == "distance_metric":
            assert (default, theirs[key].default) == ("euclidean", TripletDistanceMetric.EUCLIDEAN)
        elif key == "gather_across_devices":
            assert (default, theirs[key].default) == (True, False)
        else:
            assert default == theirs[key].default, key


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_has_another_value_for_every_parameter(name: str) -> None:
    fields = {key: field for key, field in LOSSES[name].model_fields.items() if key in OTHER[name]}
    left = {"name", "matryoshka", "guide", "guide_revision", "gather_across_devices"}
    assert set(fields) == set(OTHER[name]) == set(LOSSES[name].model_fields) - left
    assert all(field.default != OTHER[name][key] for key, field in fields.items())


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_arrives(name: str, model: SentenceTransformer, guide: SentenceTransformer) -> None:
    loss = make_loss(config(name, **OTHER[name]), model, guide)
    assert loss.model is model
    assert getattr(loss, "guide", guide) is guide
    attributes = {"use_mini_batched_version": "uses_gradient_cache"}
    for key, value in OTHER[name].items():
        native = NATIVE.get(value, value) if isinstance(value, str) else value
        assert getattr(loss, attributes.get(key, key)) == native, key


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "manhattan"])
def test_every_distance_arrives(distance: str, model: SentenceTransformer) -> None:
    loss = make_loss(config("TripletLoss", distance_metric=distance), model)
    assert loss.get_config_dict()["distance_metric"] == f"TripletDistanceMetric.{distance.upper()}"


@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"])
def test_every_similarity_arrives(similarity: str, model: SentenceTransformer) -> None:
    loss = make_loss(config("MultipleNegativesRankingLoss", similarity_fct=similarity), model)
    assert loss.get_config_dict()["similarity_fct"] == similarity
    run(loss, model, num_negatives=1)


@pytest.mark.parametrize("parameters", ["default", "other"])
@pytest.mark.parametrize("matryoshka", [None, MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_librarys_own(
    name: str, matryoshka: Any, parameters: str, model: SentenceTransformer, guide: SentenceTransformer
) -> None:
    chosen = OTHER[name] if parameters == "other" else {}
    num_negatives = NUM_NEGATIVES.get(name, 2)
    ours = make_loss(config(name, **chosen, matryoshka=matryoshka), model, guide)
    theirs = librarys_own(name, model, guide, chosen)
    if matryoshka:
        theirs = losses.MatryoshkaLoss(model, theirs, matryoshka["dims"], matryoshka["weights"])
    assert_same(run(ours, model, num_negatives), run(theirs, model, num_negatives), 1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_other_parameters_make_another_loss(name: str, model: SentenceTransformer, guide: SentenceTransformer) -> None:
    """Otherwise the comparisons in this file would prove nothing."""
    num_negatives = NUM_NEGATIVES.get(name, 2)
    variants = [{}, OTHER[name], {"matryoshka": MATRYOSHKA}]
    values = [run(make_loss(config(name, **v), model, guide), model, num_negatives)[0] for v in variants]
    assert min(abs(values[0] - other) for other in values[1:]) > 1e-3


def test_a_matryoshka_sums_over_the_first_components(model: SentenceTransformer) -> None:
    inner = losses.MultipleNegativesRankingLoss(model)
    with torch.no_grad():
        whole = [model(column)["sentence_embedding"] for column in features(model, 2)]
        expected = [inner.compute_loss_from_embeddings([e[:, :dim] for e in whole], None) for dim in MATRYOSHKA["dims"]]
    ours = make_loss(config("MultipleNegativesRankingLoss", matryoshka=MATRYOSHKA), model)
    weighted = sum(weight * float(value) for weight, value in zip(MATRYOSHKA["weights"], expected, strict=True))
    assert run(ours, model, 2)[0] == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize(("dims_per_step", "native"), [(None, -1), (2, 2)])
def test_the_parameters_of_a_matryoshka_arrive(
    dims_per_step: int | None, native: int, model: SentenceTransformer
) -> None:
    section = {"dims": [8, 32, 16], "dims_per_step": dims_per_step}
    loss = make_loss(config("TripletLoss", matryoshka={**section, "weights": [1, 2, 3]}), model)
    assert (loss.matryoshka_dims, loss.matryoshka_weights, loss.n_dims_per_step) == ((32, 16, 8), (2, 3, 1), native)
    assert make_loss(config("TripletLoss", matryoshka=section), model).matryoshka_weights == (1, 1, 1)


def test_a_matryoshka_wider_than_the_model(model: SentenceTransformer) -> None:
    with pytest.raises(ConfigError) as caught:
        make_loss(config("TripletLoss", matryoshka={"dims": [64, 33, 32]}), model)
    assert caught.value.message == (
        f"loss.matryoshka.dims: 64, 33 is wider than the model's embeddings, which have {HIDDEN} components"
    )
    assert caught.value.hint == f"choose widths of at most {HIDDEN}"


@pytest.mark.parametrize("matryoshka", [None, MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("chunks", [{"mini_batch_size": 3}, {"mini_batch_size": 5, "mini_batch_num_tokens": 12}])
@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("Cached") or name.startswith("Mega")])
def test_gradient_caching_changes_nothing(
    name: str, chunks: dict[str, int], matryoshka: Any, model: SentenceTransformer, guide: SentenceTransformer
) -> None:
    cached = config(name, **chunks, matryoshka=matryoshka)
    off = {"use_mini_batched_version": False} if name.startswith("Mega") else {}
    plain = config(name.removeprefix("Cached"), **off, matryoshka=matryoshka)
    assert (cached.is_cached, plain.is_cached) == (True, False)
    num_negatives = 0 if name.startswith("Mega") else 1
    found = [run(make_loss(loss, model, guide), model, num_negatives) for loss in (cached, plain)]
    assert_same(found[0], found[1], 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_config_knows_cached_losses(name: str, model: SentenceTransformer, guide: SentenceTransformer) -> None:
    for made in (config(name), config(name, **OTHER[name]), config(name, matryoshka={"dims": [32]})):
        assert uses_gradient_cache(make_loss(made, model, guide)) == made.is_cached


@pytest.mark.parametrize("name", LOSSES)
def test_the_columns_are_those_that_the_library_accepts(
    name: str, model: SentenceTransformer, guide: SentenceTransformer
) -> None:
    loss = make_loss(config(name), model, guide)
    for num_negatives, columns in enumerate([(), ("negative",), ("negative_1", "negative_2")]):
        problem = config(name).column_problem(("anchor", "positive", *columns))
        if problem is None:
            run(loss, model, num_negatives)
        else:
            with pytest.raises(ValueError, match=r"expect|Expect|unpack|requires"):
                run(loss, model, num_negatives)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "Ranking" in name or name in ("AnglELoss", "CachedGISTEmbedLoss")]
)
def test_no_negative_is_ignored(name: str, model: SentenceTransformer, guide: SentenceTransformer) -> None:
    loss = make_loss(config(name), model, guide)
    least = LOSSES[name].num_negatives[0]
    values = [run(loss, model, num_negatives)[0] for num_negatives in range(least, 3)]
    assert len({round(value, 4) for value in values}) == len(values)


@pytest.mark.parametrize("name", [name for name in LOSSES if config(name).crosses_ranks])
def test_embeddings_are_gathered_only_in_a_process_group(
    name: str, model: SentenceTransformer, guide: SentenceTransformer, tmp_path: Path
) -> None:
    assert not make_loss(config(name), model, guide).gather_across_devices
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert make_loss(config(name), model, guide).gather_across_devices
        assert not make_loss(config(name, gather_across_devices=False), model, guide).gather_across_devices
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_a_guide_is_loaded_frozen(
    name: str, model: SentenceTransformer, guide: SentenceTransformer, guide_folder: Path
) -> None:
    loss = make_loss(config(name, guide=str(guide_folder)), model)
    assert not loss.guide.training
    assert not any(weight.requires_grad for weight in loss.guide.parameters())
    assert any(weight.requires_grad for weight in loss.model.parameters())
    assert_same(run(loss, model, 1), run(make_loss(config(name), model, guide), model, 1), 1e-7)
    assert all(weight.grad is None for weight in loss.guide.parameters())


def test_a_guide_decides(model: SentenceTransformer, guide: SentenceTransformer) -> None:
    blind = copy.deepcopy(guide)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in blind.parameters():
            weight.copy_(torch.randn_like(weight))
    values = [run(make_loss(config("GISTEmbedLoss"), model, found), model, 1)[0] for found in (guide, blind)]
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("name", [name for name in LOSSES if "GIST" not in name])
def test_other_losses_have_no_guide(name: str) -> None:
    assert load_guide(config(name)) is None


@pytest.mark.parametrize(
    ("guide", "message", "hint"),
    [
        ("/not/there", "loss.guide: there is no folder /not/there", "check the path"),
        ("package:not_there_at_all", "loss.guide: the Python package 'not_there_at_all' is not installed", "pip insta"),
    ],
)
def test_a_guide_that_cannot_be_loaded(guide: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_guide(config("GISTEmbedLoss", guide=guide))
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)


def test_a_guide_with_its_own_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_guide(config("GISTEmbedLoss", guide=str(tiny_stella(tmp_path / "stella"))))
    assert caught.value.message.startswith(f"loss.guide={tmp_path}")
    assert caught.value.hint == "choose another guide"


def test_a_loss_that_cannot_be_used_with_the_model_is_refused() -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(all_texts()), embedding_dim=8)], device="cpu")
    with pytest.raises(
        ConfigError, match=r"loss\.name=CachedMultipleNegativesRankingLoss cannot be used with this model"
    ):
        make_loss(config("CachedMultipleNegativesRankingLoss"), static)
    assert run(make_loss(config("MultipleNegativesRankingLoss"), static), static, 1)
