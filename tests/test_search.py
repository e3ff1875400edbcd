"""The search for the fewest Gaussians that reach a score: short, close, and it ends when it is interrupted."""
import math
from dataclasses import dataclass

import pytest
import torch

from conftest import smooth_picture as small
from gs2d import search
from gs2d.fit import fit_config, fit_image
from gs2d.ground_truth import GroundTruth
from gs2d.search import fewest_gaussians
from gs2d.train import Trainer, train


@dataclass(frozen=True)
class Fit:
    n: int
    steps: int
    psnr: float
    interrupted: bool = False


def fake_fits(psnr_of, interrupt_at=None):
    "(fit, what it was asked for): N Gaussians reach psnr_of(N) in a whole fit of 1000 steps, 1 dB less in a short one."
    asked = []

    def fit(n, steps):
        asked.append((n, steps))
        return Fit(n, steps, psnr_of(n) - (steps < 1000), len(asked) - 1 == interrupt_at)

    return fit, asked


@pytest.mark.parametrize("slope", [1.8, 2.6, 3.5, 5.0])
@pytest.mark.parametrize("enough", [300, 4_000, 60_000])
def test_the_search_is_short_and_close(slope, enough):
    fit, asked = fake_fits(lambda n: 32.0 + slope * math.log2(n / enough) + 0.03 * math.sin(n))
    result = fewest_gaussians(fit, 32.0, 1000, 512 * 768 // 40, 512 * 768)
    assert 32 <= result.psnr <= 32.2 and result.n <= 1.1 * enough
    assert sum(steps == 1000 for _, steps in asked) <= 5


def test_a_step_in_the_curve_ends_the_search_at_the_fewest():
    fit, _ = fake_fits(lambda n: 50.0 if n >= 37 else 20.0)
    assert fewest_gaussians(fit, 32.0, 1000, 40, 1600).n == 37


def test_short_fits_come_first_and_none_asks_for_more_than_there_may_be():
    fit, asked = fake_fits(lambda n: 3 * math.log2(n))
    with pytest.raises(ValueError, match=r"target_psnr: expected at most 26.9 dB, which 500 Gaussians reach here, got 60"):
        fewest_gaussians(fit, 60, 1000, 100, 500)
    assert [steps for _, steps in asked][: search.SCOUTS] == [125] * search.SCOUTS and max(n for n, _ in asked) == 500
    fit, asked = fake_fits(lambda n: 3 * math.log2(n))
    fewest_gaussians(fit, 20, 300, 100, 500)
    assert asked[0] == (100, 100)  # at least 100 steps


@pytest.mark.parametrize("interrupt_at", range(6))
def test_an_interrupted_fit_ends_the_search(interrupt_at):
    psnr_of = lambda n: 50.0 if n >= 37 else 20.0
    fit, asked = fake_fits(psnr_of, interrupt_at)
    told = []
    result = fewest_gaussians(fit, 32.0, 1000, 40, 1600, told.append)
    assert result.interrupted and len(asked) == interrupt_at + 1 == len(told) + 1
    good = [n for n, steps in asked[:-1] if steps == 1000 and n >= 37]
    assert result.n == (min(good) if good else asked[-1][0])  # the best so far, or else what there is


# --- at work ---


def test_target_is_reached_with_few():
    truth = GroundTruth.from_image(small())
    target = 34.0
    result = fit_image(truth, steps=100, target_psnr=target, progress=False, device="cpu")
    assert target <= result.psnr
    fewer = int(0.85 * len(result.scene))  # 10 % are promised, the rest is the luck of one run
    assert train(fit_config(20, 26, fewer, 100, device="cpu"), ground_truth=truth, progress=False).psnr < target
    again = fit_image(small(), steps=100, target_psnr=target, progress=False, device="cpu")
    assert torch.equal(again.image, result.image)  # the same call, the same bytes


def test_a_flat_picture_needs_one_gaussian():
    result = fit_image(torch.full((12, 12, 3), 0.5), steps=30, target_psnr=25, progress=False, device="cpu")
    assert len(result.scene) == 1 and result.psnr >= 25


def test_a_target_that_nothing_reaches():
    with pytest.raises(ValueError, match=r"target_psnr: expected at most .* dB, which .* Gaussians reach here, got 99"):
        fit_image(small(6, 6), steps=5, target_psnr=99, progress=False, device="cpu")


def test_the_search_says_what_it_does(capsys):
    fit_image(small(), steps=30, target_psnr=20, device="cpu")
    err = capsys.readouterr().err
    assert err.count("a short fit with") == search.SCOUTS and "a whole fit with" in err and " dB" in err


@pytest.mark.parametrize("scout", range(search.SCOUTS))
def test_ctrl_c_during_each_of_the_short_fits(scout, monkeypatch):
    step, fits = Trainer.step, []

    def interrupted(trainer):
        if trainer.steps_done == 0:
            fits.append(trainer)
        if len(fits) == scout + 1 and trainer.steps_done == 3:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = fit_image(small(), steps=200, target_psnr=35, progress=False, device="cpu")
    assert result.interrupted and len(result.history) == 3 and len(fits) == scout + 1
