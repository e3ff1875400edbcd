"""fit_image: the recipe as a configuration, the plan of growth, time budgets, transparency, odd pictures, clear errors."""
import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import smooth_picture as small
from gs2d import fit
from gs2d import train as training
from gs2d.densify import ErrorGrowth
from gs2d.fit import default_n_gaussians, default_portrait, fit_config, fit_image, photo_target
from gs2d.gaussians import PARAMETER_NAMES, Blend, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel
from gs2d.io.pictures import straight_alpha
from gs2d.loss import L1SSIMLoss, l1_loss, l2_loss
from gs2d.renderer import render
from gs2d.train import TrainConfig, Trainer, train


@pytest.fixture(scope="module")
def result():
    return fit_image(small(), n_gaussians=40, steps=40, progress=False, device="cpu")


def test_default_number_follows_the_pixels():
    assert default_n_gaussians(600, 512) == 600 * 512 // 40
    assert default_n_gaussians(1, 1) == 1 and default_n_gaussians(2, 3) == 6
    assert default_n_gaussians(10, 10) == fit.FEWEST
    assert default_n_gaussians(10_000, 10_000) == fit.MOST
    assert default_n_gaussians(600, 512, "draft") * 4 == default_n_gaussians(600, 512, fit.Quality.BEST) == 600 * 512 // 20


@pytest.mark.parametrize("n, steps", [(1, 40), (2, 40), (7, 40), (100, 100), (1000, 2000), (12_345, 1500), (50, 1), (50, 2), (50, 3), (50, 31)])
def test_the_plan_of_growth_reaches_the_number(n, steps):
    config = fit_config(100, 200, n, steps)
    growth = config.densify
    numbers = [n if growth is None else growth.n_start(config.n_gaussians)]
    for step in range(1, steps + 1):
        for _ in range(growth.rounds_due(step, (step - 1) / steps, step / steps) if growth else 0):
            numbers.append(min(numbers[-1] + math.ceil(growth.growth * numbers[-1]), growth.max_gaussians))
    assert numbers[-1] == n == max(numbers)
    assert numbers[0] == (math.ceil(fit.START_SHARE * n) if steps > 1 else n)  # a single step has no round
    if steps >= 40:
        assert all(later <= 1.2 * earlier + 1 for earlier, later in zip(numbers, numbers[1:]))  # no jump


def test_config_of_the_recipe():
    config = fit_config(60, 80, n_gaussians=50, steps=100, seed=3)
    assert (config.blend, config.init_level, type(config.densify)) == (None, InitLevel.CONTENT, ErrorGrowth)
    assert (config.height, config.width, config.n_iterations, config.seed) == (60, 80, 100, 3)
    assert fit_config(60, 80, 200).lr_scale["means"] == pytest.approx(fit_config(60, 80, 50).lr_scale["means"] / 2)
    for quality in fit.Quality:
        config = fit_config(60, 80, quality=quality)
        assert config.n_iterations == fit.STEPS_FOR_A_PHOTO[quality]
        assert config.n_gaussians == config.densify.max_gaussians == 60 * 80 // fit.PIXELS_PER_GAUSSIAN[quality]
        asked = fit_config(60, 80, 70, 90, quality=quality)  # what is asked for wins
        assert (asked.n_gaussians, asked.densify.max_gaussians, asked.n_iterations) == (70, 70, 90)
    assert fit_config(60, 80) == fit_config(60, 80, quality="good")


@pytest.mark.parametrize("steps", [None, 1, 40])
def test_the_config_says_the_number_that_was_asked_for(steps):
    assert fit_config(60, 80, n_gaussians=100, steps=steps).n_gaussians == 100
    assert fit_config(60, 80, n_gaussians=100, seconds=3).n_gaussians == 100


def test_the_config_is_a_value_that_survives_a_file():
    for config in (fit_config(60, 80, 50, 100, loss="l1_ssim", blend="over"), fit_config(60, 80, seconds=2.5)):
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_fit_image_is_the_config_and_train(result):
    truth = GroundTruth.from_image(small())
    same = train(fit_config(20, 26, 40, 40, device="cpu"), ground_truth=truth, progress=False)
    assert torch.equal(same.image, result.image) and len(result.scene) == 40


def test_same_seed_same_bytes_other_seed_other_bytes(result):
    again, other = (fit_image(small(), n_gaussians=40, steps=40, seed=seed, progress=False, device="cpu") for seed in (0, 1))
    assert torch.equal(again.scene.means, result.scene.means)
    assert not torch.equal(other.scene.means, result.scene.means)


def test_the_recipe_beats_the_naive_fit():
    picture = torch.from_numpy(np.asarray(Image.open(default_portrait()).resize((80, 94)), dtype=np.float32) / 255)
    ours = fit_image(picture, steps=120, progress=False, device="cpu")
    naive = train(TrainConfig(n_gaussians=len(ours.scene), n_iterations=120, device="cpu"), ground_truth=ours.ground_truth, progress=False)
    assert ours.psnr > naive.psnr + 1


@pytest.mark.parametrize("blend", list(Blend))
def test_every_blend_improves(blend):
    result = fit_image(small(), n_gaussians=30, steps=40, blend=blend, progress=False, device="cpu")
    assert result.scene.blend is blend and result.psnr > result.history[0].psnr


def test_a_ground_truth_is_taken_as_it_is():
    truth = GroundTruth.random(20, 24, 32, seed=1, blend=Blend.ADDITIVE, background=(0.2, 0.4, 0.6))
    result = fit_image(truth, 30, 60, max_side=5, background=(1, 1, 1), progress=False, device="cpu")
    assert result.ground_truth is truth and result.image.shape == (24, 32, 3)  # not shrunk to 5 pixels
    assert (result.scene.blend, result.scene.background) == (Blend.ADDITIVE, (0.2, 0.4, 0.6)) and result.psnr > 25
    other = fit_image(truth, 30, 20, blend="over", progress=False, device="cpu")  # what is asked for wins
    assert other.scene.blend is Blend.OVER and other.scene.background == truth.background


def test_a_ground_truth_with_its_target_psnr():
    truth = GroundTruth.random(4, 24, 32, seed=1, blend=Blend.ADDITIVE, background=(0.2, 0.4, 0.6))
    result = fit_image(truth, steps=40, target_psnr=22, progress=False, device="cpu")
    assert result.psnr >= 22 and result.scene.blend is Blend.ADDITIVE and result.ground_truth is truth


@pytest.mark.parametrize("picture", [
    torch.zeros(12, 9, 3), torch.full((12, 9, 3), 0.5), torch.ones(12, 9), torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)),
    torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(0)), torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0)),
    torch.rand(40, 1, 3, generator=torch.Generator().manual_seed(0)), (torch.arange(14)[:, None] + torch.arange(14)).remainder(2).float(),
], ids=["black", "grey", "white", "noise", "one pixel", "a row", "a column", "checkerboard"])
def test_odd_pictures_stay_finite(picture, tmp_path):
    result = fit_image(picture, steps=30, progress=False, device="cpu")
    assert all(getattr(result.scene, name).isfinite().all() for name in ("means", "log_scales", "rotations", "opacity_logits", "colors"))
    assert result.image.isfinite().all()
    assert len(list(result.save(tmp_path).iterdir())) == 6


@pytest.mark.parametrize("picture, options", [
    (torch.eye(48), dict(n_gaussians=10)),  # one-pixel detail
    (torch.nn.functional.pad(torch.ones(1, 1), (20, 27, 31, 32)), {}),  # black with one white pixel
    (torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(0)), dict(n_gaussians=200)),  # more Gaussians than pixels
    (torch.rand(1, 1), dict(n_gaussians=50)),
    (torch.rand(16, 4096, 3, generator=torch.Generator().manual_seed(0)), dict(max_side=None, steps=8)),
    (torch.arange(40)[:, None].add(torch.arange(40)).remainder(2).float(), dict(n_gaussians=400)),
], ids=["diagonal", "one white pixel", "more Gaussians than pixels", "50 for one pixel", "16×4096", "checkerboard"])
@pytest.mark.parametrize("loss", [l2_loss, L1SSIMLoss()], ids=["l2", "l1_ssim"])
def test_extreme_pictures_stay_finite(picture, options, loss):
    result = fit_image(picture, loss=loss, progress=False, device="cpu", **{"steps": 40} | options)
    assert all(getattr(result.scene, name).isfinite().all() for name in PARAMETER_NAMES)
    assert result.image.isfinite().all() and all(math.isfinite(record.loss) for record in result.history)


@pytest.mark.parametrize("side, start", [(2048, InitLevel.CONTENT), (4096, InitLevel.RANDOM)])  # CONTENT at 4096 takes 20 s
def test_large_pictures_stay_finite(side, start):
    tile = np.asarray(Image.open(default_portrait()))
    truth = photo_target(np.tile(tile, (7, 8, 1))[:side, :side], max_side=None)
    config = replace(fit_config(side, side, 20_000, 2, device="cpu"), init_level=start)
    result = train(config, ground_truth=truth, progress=False)
    assert result.image.shape == (side, side, 3) and result.image.isfinite().all()
    assert result.history[1].loss < result.history[0].loss


# --- a time budget ---


@pytest.fixture
def clock(monkeypatch):
    """Every step seems to take so many milliseconds: a number, or a function of the steps that the trainer has done.

    A step looks at the clock three times: before it starts, before it grows, and when it is done.
    """
    def start(ms):
        now, step = [0.0], Trainer.step

        def ticking(trainer):
            took = ms(trainer.steps_done) if callable(ms) else ms
            looks = iter([now[0], *[now[0] + took / 1000] * 2])
            monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=looks.__next__))
            now[0] += took / 1000
            return step(trainer)

        monkeypatch.setattr(Trainer, "step", ticking)

    return start


@pytest.mark.parametrize("seconds, steps", [(1.0, 101), (0.5, 51), (0.0525, 7), (0.001, 2)])
def test_seconds_are_kept(seconds, steps, clock):
    clock(10.0)  # the first one is not on the clock
    result = fit_image(small(), n_gaussians=40, seconds=seconds, progress=False, device="cpu")
    assert len(result.history) in (steps, steps + 1) and not result.interrupted  # a hundred times 0.01 may be just below 1
    rates = [record.lr for record in result.history]
    assert rates[0] == rates[1] == fit.LEARNING_RATE and all(later <= earlier for earlier, later in zip(rates, rates[1:]))
    if steps > 50:
        assert rates[-1] < 2.5 / steps * rates[0]  # a straight line from the middle to 0 ends at 2 / steps
        numbers = [record.n_gaussians for record in result.history]
        assert numbers[-1] == max(numbers) == 40 and numbers == sorted(numbers) and len(set(numbers)) > 5
        assert numbers[int(0.55 * steps)] == 40  # growth ends half-way through the time


def test_a_slower_second_half_still_anneals(clock):
    clock(lambda done: 5.0 if done < 80 else 20.0)
    result = fit_image(small(), n_gaussians=40, seconds=1.0, progress=False, device="cpu")
    assert abs(len(result.history) - (81 + 30)) <= 1  # 79 steps of 5 ms, and 605 ms that are left for steps of 20
    assert result.history[-1].lr < 0.05 * fit.LEARNING_RATE and len(result.scene) == 40


@pytest.mark.parametrize("slow", [0.1, 0.4, 0.9])
def test_rounds_that_one_slow_step_missed_are_made_up_for(slow, clock):
    clock(lambda done: 1000 * slow if done == 10 else 10.0)  # at the eleventh step the run leaps by this share
    result = fit_image(small(), n_gaussians=400, seconds=1.0, progress=False, device="cpu")
    numbers = [record.n_gaussians for record in result.history]
    growth = result.config.densify
    passed = int(min(1.0, (0.09 + slow) / growth.stop_fraction) * growth.rounds + 1e-9)
    grown = 80
    for _ in range(passed):
        grown = min(400, grown + math.ceil(growth.growth * grown))
    assert abs(numbers[10] - grown) <= passed  # each round rounds up, all of them together only once
    assert numbers[-1] == 400 and abs(len(numbers) - (102 - 100 * slow)) <= 2


def test_a_timed_run_that_never_grows(clock):
    clock(10.0)
    result = fit_image(small(), n_gaussians=1, seconds=0.1, progress=False, device="cpu")
    assert len(result.scene) == 1 and len(result.history) in (11, 12)  # ten times 0.01 may be a rounding below 0.1


# --- a loss of one's own ---


@pytest.mark.parametrize("budget", [dict(steps=61), dict(seconds=0.6)])
def test_the_squared_error_leads_while_the_fit_grows(budget, clock):
    clock(10.0)
    squared, own = (fit_image(small(), n_gaussians=40, loss=loss, progress=False, device="cpu", **budget) for loss in (l2_loss, L1SSIMLoss()))
    assert len(own.history) == len(squared.history) >= 61 and own.config.loss == L1SSIMLoss()
    same = [mine.loss == theirs.loss for mine, theirs in zip(own.history, squared.history)]
    assert same.index(False) == sum(same) and abs(sum(same) - 30.5) <= 2  # the first half, and not a step beyond
    assert own.history[sum(same) - 1].n_gaussians == 40 and own.ssim > squared.ssim


@pytest.mark.parametrize("name, loss", [("l2", l2_loss), ("l1", l1_loss), ("l1_ssim", L1SSIMLoss())])
def test_a_loss_may_be_named(name, loss):
    assert fit_config(60, 80, loss=name) == fit_config(60, 80, loss=loss)
    assert TrainConfig(loss=name, growing_loss=name) == TrainConfig(loss=loss, growing_loss=loss)
    named, called = (fit_image(small(), 12, 6, loss=each, progress=False, device="cpu") for each in (name, loss))
    assert torch.equal(named.image, called.image)


# --- Ctrl-C ---


@pytest.mark.parametrize("options", [dict(steps=40), dict(seconds=1000.0), dict(steps=1000, target_psnr=40)], ids=["steps", "seconds", "target"])
def test_ctrl_c_gives_what_was_reached(options, monkeypatch):
    step = Trainer.step

    def interrupted(trainer):
        if trainer.steps_done == 7:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = fit_image(small(), progress=False, device="cpu", **options)  # with a target: in the first short fit
    assert result.interrupted and len(result.history) == 7 and math.isfinite(result.psnr)


# --- transparency ---


def see_through(height=24, width=32):
    "RGBA: a soft disc, red to the left and green to the right; invisible pixels are blue."
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    covered = ((0.8 - x.hypot(y)) * 4).clamp(0, 1)
    color = torch.stack([(1 - x) / 2, (1 + x) / 2, (covered == 0).float()], -1)
    return torch.cat([color, covered[..., None]], -1)


def test_alpha_target_is_what_one_sees():
    picture = see_through()
    truth = photo_target(picture, alpha=True)
    covered = picture[..., 3:]
    torch.testing.assert_close(truth.image, torch.cat([picture[..., :3] * covered, covered], -1), rtol=0, atol=1e-6)
    seen = covered[..., 0] > 0.01  # colours of what nobody can see are lost, on purpose
    torch.testing.assert_close(straight_alpha(truth.image)[seen], picture[seen], rtol=0, atol=1e-4)
    assert (straight_alpha(truth.image)[covered[..., 0] == 0] == 0).all()
    assert photo_target(picture).image.shape[-1] == 3


@pytest.mark.parametrize("blend", list(Blend))
def test_transparency_is_fitted(blend, tmp_path):
    result = fit_image(see_through(), n_gaussians=60, steps=150, blend=blend, alpha=True, progress=False, device="cpu")
    assert result.scene.colors.shape == (60, 4) and result.image.shape[-1] == 4 and result.psnr > 25
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(render(Gaussians2D.load(tmp_path / "scene.json"), 24, 32), result.image)
    for name in ("render.png", "target.png"):
        picture = Image.open(tmp_path / name)
        assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] < 40 and picture.getpixel((16, 12))[3] > 215


def test_an_opaque_picture_fits_with_alpha(tmp_path):
    Image.fromarray((small() * 255).byte().numpy()).save(tmp_path / "opaque.png")
    with open(tmp_path / "opaque.png", "rb") as file:
        truth = photo_target(file, alpha=True)
    assert truth.image.shape == (20, 26, 4) and (truth.image[..., 3] == 1).all()
    assert fit_image(tmp_path / "opaque.png", 20, 20, alpha=True, loss=L1SSIMLoss(), progress=False, device="cpu").psnr > 15


# --- arguments ---


def test_max_side_and_background():
    clear = torch.zeros(30, 40, 4)
    result = fit_image(clear, n_gaussians=4, steps=2, max_side=20, background=(1, 0, 0), progress=False, device="cpu")
    assert result.ground_truth.image.shape == (15, 20, 3)
    assert torch.allclose(result.ground_truth.image, torch.tensor([1.0, 0, 0]).expand(15, 20, 3), atol=1e-6)
    assert result.ground_truth.background == (1, 0, 0)


@pytest.mark.parametrize("arguments, said", [
    (dict(n_gaussians=0), "n_gaussians: expected a whole number of at least 1, got 0"),
    (dict(n_gaussians=-3), "n_gaussians: expected .* got -3"),
    (dict(n_gaussians=2.5), "n_gaussians: expected .* got 2.5"),
    (dict(n_gaussians=True), "n_gaussians: expected a whole number, got True"), (dict(steps=False), "steps: expected .* got False"),
    (dict(seed=True), "seed: expected .* got True"), (dict(max_side=True), "max_side: expected .* got True"),
    (dict(n_gaussians=np.True_), "n_gaussians: expected a whole number"), (dict(seed=2**63), "seed: expected"), (dict(seed=1.0), "seed: expected"),
    (dict(loss="l3"), "loss: expected .* got 'l3'"), (dict(steps=0), "steps: expected .* got 0"),
    (dict(max_side=0), "max_side: expected .* got 0"),
    (dict(seed=-1), "seed: expected .* got -1"),
    (dict(blend="multiply"), "blend: expected one of .* got 'multiply'"),
    (dict(blend="multiply", alpha=True), "blend: expected one of .* got 'multiply'"),
    (dict(device="toaster"), "device: expected .* got 'toaster'"),
    (dict(background=(0, 0, 2)), "background: expected"),
    (dict(quality="superb"), "quality: expected one of draft, good, best, got 'superb'"),
    (dict(seconds=0), "seconds: expected .* got 0"), (dict(seconds=-1.0), "seconds: expected"), (dict(seconds=math.nan), "seconds: expected"),
    (dict(seconds=True), "seconds: expected"), (dict(seconds=math.inf), "seconds: expected"),
    (dict(seconds=1, steps=5), "expected only one of seconds, steps, got seconds=1 and steps=5"),
    (dict(target_psnr=30, n_gaussians=5), "expected only one of target_psnr, n_gaussians"),
    (dict(target_psnr=30, seconds=5), "expected only one of target_psnr, .*seconds"),
    (dict(target_psnr=0), "target_psnr: expected .* got 0"), (dict(target_psnr=101), "target_psnr: expected .* got 101"),
    (dict(target_psnr=math.nan), "target_psnr: expected"),
])
def test_bad_arguments(arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        fit_image(small(), progress=False, **arguments)


def test_numpy_integers_are_integers():
    whole = dict(n_gaussians=np.int64(12), steps=np.int32(6), seed=np.uint8(3))
    config = fit_config(np.int64(20), np.int64(26), **whole)
    assert config == fit_config(20, 26, 12, 6, 3) and all(type(getattr(config, name)) is int for name in ("n_gaussians", "n_iterations", "seed", "height"))
    same = [fit_image(small(), max_side=side, progress=False, device="cpu", **kinds)
            for side, kinds in ((np.int16(16), whole), (16, {name: int(value) for name, value in whole.items()}))]
    assert torch.equal(same[0].image, same[1].image) and same[0].image.shape == (12, 16, 3)


@pytest.mark.parametrize("name", ["n_gaussians", "steps", "seed"])
@pytest.mark.parametrize("value", [True, np.bool_(True)], ids=["bool", "numpy"])
def test_a_boolean_is_no_number(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a whole number"):
        fit_config(20, 26, **{name: value})


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        fit_image("nowhere.png")


def test_portrait_is_a_picture():
    assert Image.open(default_portrait()).size == (512, 600)
    assert default_portrait().is_relative_to(matplotlib.get_data_path())
