from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine import native
from engine.sampler import Candidates, Noise
from engine.sampler import draw as draw_reference
from tests.native import needs_native

pytestmark = needs_native


@pytest.fixture(params=native.isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use(request.param)
    yield
    native.use(native.isas()[0])


def draw(candidates: Candidates, noise: Noise) -> int:
    from engine.native.draw import draw as kernel

    return kernel(candidates, noise)


def scores_of(count: int, spread: float, seed: int) -> torch.Tensor:
    return spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 40.0])
@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 500, 5003])
def test_the_tokens_of_the_definition(count: int, spread: float) -> None:
    drawn = set()
    for seed in range(60):
        scores = scores_of(count, spread, seed)
        candidates = Candidates(scores, likely=int(scores.argmax()))
        noise = Noise(seed << 31 | seed, seed % 5, 1000 + seed)
        drawn.add(draw(candidates, noise))
        assert draw(candidates, noise) == draw_reference(candidates, noise)
    assert count == 1 or len(drawn) > 1


def test_listed_tokens() -> None:
    for seed in range(200):
        scores = scores_of(17, 1.0, seed)
        ids = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:17]
        candidates = Candidates(scores, ids)
        noise = Noise(seed, 0, seed)
        assert draw(candidates, noise) == draw_reference(candidates, noise)


def test_what_may_not_be_drawn() -> None:
    scores = torch.tensor([-torch.inf, 1.0, 0.9, torch.nan, 0.1, torch.inf])
    for seed in range(100):
        for ids in (None, torch.tensor([9, 4, 7, 3, 1, 2])):
            candidates = Candidates(scores, ids, least=0.5, likely=1)
            token = draw(candidates, Noise(seed, 0, 0))
            assert token in ((1, 2) if ids is None else (4, 7))
            assert token == draw_reference(
                Candidates(scores.nan_to_num(nan=0.0, posinf=0.0), ids, least=0.5),
                Noise(seed, 0, 0),
            )


def test_the_share_of_each_token_is_its_probability() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = [draw(Candidates(scores), Noise(seed, 0, 7)) for seed in range(20_000)]
    shares = np.bincount(draws, minlength=4) / len(draws)
    wanted = scores.softmax(0).numpy()
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / len(draws))


@pytest.mark.parametrize("ids", [None, torch.arange(4)])
def test_all_banned(ids: torch.Tensor | None) -> None:
    candidates = Candidates(torch.full((4,), -torch.inf), ids)
    assert draw(candidates, Noise(0, 0, 0)) == draw_reference(candidates, Noise(0, 0, 0)) == -1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (Candidates(torch.ones(4).double()), "float32"),
        (Candidates(torch.ones(8)[::2]), "contiguous"),
        (Candidates(torch.ones(4), torch.ones(3).long()), "ids must be"),
        (Candidates(torch.ones(4), likely=4), "4 is not one of 4"),
    ],
)
def test_what_it_does_not_do_is_refused(candidates: Candidates, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(candidates, Noise(0, 0, 0))
