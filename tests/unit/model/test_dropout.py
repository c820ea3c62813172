"""Dropout that draws 16 random bits per element."""

from __future__ import annotations

import copy

import pytest
import torch

from tercet.model.dropout import draw_kept, use_fast_cpu_dropout


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.001, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_requested_share_is_dropped(dropout: float, dtype: torch.dtype) -> None:
    """At each of the four positions that share one random number of 64 bits."""
    torch.manual_seed(0)
    kept = draw_kept(torch.empty(1000, 1999, dtype=dtype), dropout)
    assert kept.dtype == dtype
    assert kept.unique().tolist() == [0.0, torch.tensor(1 / (1 - dropout), dtype=dtype).item()]
    for place in range(4):
        left_out = (kept.flatten()[place::4] == 0).double()
        deviation = (dropout * (1 - dropout) / left_out.numel()) ** 0.5
        assert abs(left_out.mean().item() - dropout) < 5 * deviation + 2**-16


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    dropped = (draw_kept(torch.empty(400_000), 0.1) == 0).double()
    for distance in (1, 2, 3, 4, 8):
        both = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert abs(both - 0.01) < 0.001


def test_all_or_none() -> None:
    assert (draw_kept(torch.empty(99), 1.0) == 0).all()
    assert (draw_kept(torch.empty(99), 0.0) == 1).all()


def test_a_seed_gives_the_same_mask() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(draw_kept(torch.empty(7, 11), 0.3))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], draw_kept(torch.empty(7, 11), 0.3))


def test_modules() -> None:
    """They drop in training only, scale up the rest, and have its gradient. A copy draws its own mask."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.25))
    use_fast_cpu_dropout(model)
    x = torch.ones(2000, 4, requires_grad=True)
    out = model[1](x)
    assert set(out.detach().unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied[1](x), x)
    assert model[1](x).min() == 0
