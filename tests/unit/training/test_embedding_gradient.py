"""The sparse gradient of the word embeddings equals that of autograd and DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from sentence_transformers import SentenceTransformer

from support import tiny_model
from support.tiny_families import FAMILIES, tiny_encoder
from tercet.training.embedding_gradient import embedding_gradient

VOCABULARY, WIDTH = 50, 4
# Rows of each rank's micro-batches: few, none in common, one rank with more, most of the vocabulary.
CASES = {
    "few": [[[1, 2, 2], [3]], [[2, 7], [9, 9]]],
    "apart": [[[1, 2]], [[3, 4]]],
    "uneven": [[[5]], [[5, 6, 7, 8, 9, 10, 11]]],
    "most": [[list(range(40))], [list(range(10, 50))]],
}


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCABULARY, WIDTH, padding_idx=9)
        self.top = torch.nn.Linear(WIDTH, 1)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words


Encoder.__module__ = "transformers.models.test"  # where an architecture is not a model's own code


class Words(torch.nn.Sequential):
    """The parts of a SentenceTransformer that `embedding_gradient` reads."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Module())
        self[0].model = Encoder()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self[0].model.top(self[0].model.words(tokens).tanh()).square().sum()


def gradients(rank: int, case: str, ours: bool) -> dict[str, torch.Tensor]:
    """Return gradients after a step on other rows, an evaluation, and a step."""
    torch.manual_seed(0)
    model = Words()
    embedding = embedding_gradient(model) if ours else None
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for micro_batches in ([[9, 20], [21 + rank]], CASES[case][rank]):
        model.zero_grad()
        model.eval()
        model(torch.arange(VOCABULARY))
        model.train()
        *first, last = micro_batches
        with wrapped.no_sync():
            for tokens in first:
                wrapped(torch.tensor(tokens)).backward()
        wrapped(torch.tensor(last)).backward()
        if embedding is not None:
            embedding.average()
            touched = torch.cat(embedding._touched).unique()
            # Neither of an evaluation nor of the step before: rows would be sent for nothing, more in each step.
            assert case == "most" or len(touched) < 10
    return {name: weight.grad for name, weight in model.named_parameters()}


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {case: (gradients(rank, case, True), gradients(rank, case, False)) for case in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The gradients of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_average(found: list[dict[str, Any]], case: str) -> None:
    """It is averaged over both ranks and all micro-batches, with the same bits on both ranks."""
    for ours, theirs in (ranks[case] for ranks in found):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert float(expected.abs().max()) > 1e-3
            torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-7)
    left, right = (ranks[case][0]["0.model.words.weight"] for ranks in found)
    assert left.equal(right)


@pytest.fixture
def several_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes this process look like one of several ranks."""

    def set_up(world_size: int = 2, backend: str = "gloo", ranks_here: int = 2) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))

    return set_up


@pytest.mark.parametrize(
    ("ranks", "device", "pays"),
    [
        ((2, "gloo", 2), "cpu", True),
        ((1, "gloo", 1), "cpu", True),
        ((8, "nccl", 8), "meta", False),  # any device that is no CPU
        ((1, "nccl", 1), "meta", False),
        ((16, "nccl", 8), "meta", False),  # the host would wait in each step
    ],
)
def test_it_is_used_on_cpus(
    several_ranks: Callable[..., None], ranks: tuple[int, str, int], device: str, pays: bool
) -> None:
    several_ranks(*ranks)
    assert (embedding_gradient(Words().to(device)) is not None) == pays


def test_a_single_process_steps_as_with_autograd() -> None:
    """Adam's moments still move rows that no longer have a gradient."""
    weights = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = Words()
        embedding = embedding_gradient(model) if ours else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(5):
            for micro_batch in ([step, 9, 30], [step + 1, step, step + 1]):
                model(torch.tensor([micro_batch])).backward()
            if embedding is not None:
                embedding.average()
                assert torch.cat(embedding._touched).unique().tolist() == sorted({step, step + 1, 9, 30})
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected)


@pytest.mark.parametrize("family", [*FAMILIES, "electra"])
def test_every_family_is_supported(tmp_path: Path, several_ranks: Callable[..., None], family: str) -> None:
    model = SentenceTransformer(str(tiny_encoder(tmp_path, family, tiny_model.all_texts())), device="cpu")
    several_ranks()
    assert embedding_gradient(model) is not None
    (ignored,) = model._ddp_params_and_buffers_to_ignore
    assert model.get_parameter(ignored).shape[0] >= len(model.tokenizer)


def _frozen(model: Any) -> None:
    model[0].model.get_input_embeddings().weight.requires_grad_(False)


def _tied(model: Any) -> None:
    model[0].again = torch.nn.Linear(32, 8, bias=False)
    model[0].again.weight = model[0].model.get_input_embeddings().weight


def _own_code(model: Any) -> None:
    kind = type(model[0].model)
    model[0].model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.someone"})


def _scaled(model: Any) -> None:
    embedding = model[0].model.get_input_embeddings()
    embedding.__class__ = type("ScaledEmbedding", (torch.nn.Embedding,), {})


def _by_frequency(model: Any) -> None:
    model[0].model.get_input_embeddings().scale_grad_by_freq = True


@pytest.mark.parametrize("change", [_frozen, _tied, _own_code, _scaled, _by_frequency])
def test_cases_that_are_left_to_the_library(
    tmp_path: Path, several_ranks: Callable[..., None], change: Callable[[Any], None]
) -> None:
    model = SentenceTransformer(str(tiny_encoder(tmp_path, "bert", tiny_model.all_texts())), device="cpu")
    change(model)
    several_ranks()
    assert embedding_gradient(model) is None
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
