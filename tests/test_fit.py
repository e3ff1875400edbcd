"""fit_image and what it writes: the plan, the recipe on small pictures, files that load again."""
import csv
import json
import math
import os
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from gs2d import fit
from gs2d.densify import DensifyStrategy
from gs2d.fit import (
    bench, bench_csv, bench_table, comparison, default_n_gaussians, default_portrait, fit_config, fit_image, metrics, ms_ssim, photo_target,
    rate_quality, reach_psnr, save_results, straight_alpha, visited_pairs)
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D, gaussian_weights
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel
from gs2d.io.scenes import read_scene
from gs2d.loss import L1SSIMLoss, l2_loss
from gs2d.renderer import Blend, pixel_centers, project, render
from gs2d.train import TrainConfig, Trainer, train

NAMES = ["comparison.png", "history.csv", "metrics.json", "render.png", "scene.json", "target.png"]


def small(height=20, width=26, seed=0):
    "A smooth random picture."
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0).contiguous()


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
    numbers, step = [config.n_gaussians], 0
    for step in range(1, steps + 1):
        if config.densify is not None and config.densify.is_due(step, steps):
            grown = numbers[-1] + math.ceil(config.densify.growth * numbers[-1])
            numbers.append(min(grown, config.densify.max_gaussians))
    assert numbers[-1] == n == max(numbers)
    assert numbers[0] == (math.ceil(fit.START_SHARE * n) if steps > 1 else n)  # a single step has no round
    if steps >= 40:
        assert all(later <= 1.2 * earlier + 1 for earlier, later in zip(numbers, numbers[1:]))  # no jump


def test_config_of_the_recipe():
    config = fit_config(60, 80, n_gaussians=50, steps=100, seed=3)
    assert (config.blend, config.init_level, config.densify.strategy) == (Blend.WEIGHTED, InitLevel.CONTENT, DensifyStrategy.ERROR)
    assert (config.height, config.width, config.n_iterations, config.seed) == (60, 80, 100, 3)
    assert fit_config(60, 80, 200).lr_scale["means"] == pytest.approx(fit_config(60, 80, 50).lr_scale["means"] / 2)
    for quality in fit.Quality:
        config = fit_config(60, 80, quality=quality)
        assert config.n_iterations == fit.STEPS_FOR_A_PHOTO[quality]
        assert config.densify.max_gaussians == 60 * 80 // fit.PIXELS_PER_GAUSSIAN[quality]
        asked = fit_config(60, 80, 70, 90, quality=quality)  # what is asked for wins
        assert (asked.densify.max_gaussians, asked.n_iterations) == (70, 90)
    assert fit_config(60, 80) == fit_config(60, 80, quality="good")


def test_fit_image_is_the_config_and_train(result):
    truth = GroundTruth.from_image(small())
    same = train(fit_config(20, 26, 40, 40, device="cpu"), truth, progress=False)
    assert torch.equal(same.image, result.image) and len(result.scene) == 40


def test_same_seed_same_bytes_other_seed_other_bytes(result):
    again, other = (fit_image(small(), n_gaussians=40, steps=40, seed=seed, progress=False, device="cpu") for seed in (0, 1))
    assert torch.equal(again.scene.means, result.scene.means)
    assert not torch.equal(other.scene.means, result.scene.means)


def test_the_recipe_beats_the_naive_fit():
    picture = torch.from_numpy(np.asarray(Image.open(default_portrait()).resize((80, 94)), dtype=np.float32) / 255)
    ours = fit_image(picture, steps=120, progress=False, device="cpu")
    naive = train(TrainConfig(n_gaussians=len(ours.scene), n_iterations=120, device="cpu"), ours.ground_truth, progress=False)
    assert ours.psnr > naive.psnr + 1


@pytest.mark.parametrize("blend", list(Blend))
def test_every_blend_improves(blend):
    result = fit_image(small(), n_gaussians=30, steps=40, blend=blend, progress=False, device="cpu")
    assert result.config.blend is blend and result.psnr > result.history[0].psnr


@pytest.mark.parametrize("picture", [
    torch.zeros(12, 9, 3), torch.full((12, 9, 3), 0.5), torch.ones(12, 9), torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)),
    torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(0)), torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0)),
    torch.rand(40, 1, 3, generator=torch.Generator().manual_seed(0)), (torch.arange(14)[:, None] + torch.arange(14)).remainder(2).float(),
], ids=["black", "grey", "white", "noise", "one pixel", "a row", "a column", "checkerboard"])
def test_odd_pictures_stay_finite(picture, tmp_path):
    result = fit_image(picture, steps=30, progress=False, device="cpu")
    assert all(getattr(result.scene, name).isfinite().all() for name in ("means", "log_scales", "rotations", "opacity_logits", "colors"))
    assert result.image.isfinite().all()
    save_results(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


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
    result = train(config, truth, progress=False)
    assert result.image.shape == (side, side, 3) and result.image.isfinite().all()
    assert result.history[1].loss < result.history[0].loss


# --- a time budget ---


def slow_steps(monkeypatch, ms):
    "Every step seems to take this long, so that the clock of a TimedTrainer is known."
    real = Trainer.step

    def step(self):
        record = real(self)._replace(step_ms=ms)
        self.history[-1] = record
        return record

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("seconds, steps", [(1.0, 101), (0.5, 51), (0.0525, 7), (0.001, 2)])
def test_seconds_are_kept(seconds, steps, monkeypatch):
    slow_steps(monkeypatch, 10.0)  # the first one is not on the clock
    result = fit_image(small(), n_gaussians=40, seconds=seconds, progress=False, device="cpu")
    assert len(result.history) == result.config.n_iterations == steps
    rates = [record.lr for record in result.history]
    assert rates[0] == fit.LEARNING_RATE and all(later <= earlier + 1e-12 for earlier, later in zip(rates, rates[1:]))
    if steps > 50:
        assert rates[-1] < 2.5 / steps * rates[0]  # a straight line from the middle to 0 ends at 2 / steps
        numbers = [record.n_gaussians for record in result.history]
        assert numbers[-1] == max(numbers) == 40 and numbers == sorted(numbers) or len(set(numbers)) > 5
        assert numbers[int(0.55 * steps)] == 40  # growth ends half-way through the time


def test_a_slower_second_half_still_anneals(monkeypatch):
    real = Trainer.step

    def step(self):
        record = real(self)._replace(step_ms=5.0 if self.steps_done < 80 else 20.0)
        self.history[-1] = record
        return record

    monkeypatch.setattr(Trainer, "step", step)
    result = fit_image(small(), n_gaussians=40, seconds=1.0, progress=False, device="cpu")
    assert len(result.history) < 200 and result.history[-1].lr < 0.05 * fit.LEARNING_RATE and len(result.scene) == 40


def test_a_timed_run_that_never_grows(monkeypatch):
    slow_steps(monkeypatch, 10.0)
    result = fit_image(small(), n_gaussians=1, seconds=0.1, progress=False, device="cpu")
    assert len(result.scene) == 1 and len(result.history) in (11, 12)  # ten times 0.01 may be a rounding below 0.1


# --- a loss of one's own ---


@pytest.mark.parametrize("budget", [dict(steps=61), dict(seconds=0.6)])
def test_the_squared_error_leads_while_the_fit_grows(budget, monkeypatch):
    slow_steps(monkeypatch, 10.0)
    squared, own = (fit_image(small(), n_gaussians=40, loss=loss, progress=False, device="cpu", **budget) for loss in (l2_loss, L1SSIMLoss()))
    assert len(own.history) == len(squared.history) == 61 and own.config.loss == L1SSIMLoss()
    same = [mine.loss == theirs.loss for mine, theirs in zip(own.history, squared.history)]
    assert same.index(False) == sum(same) and abs(sum(same) - 30.5) <= 2  # the first half, and not a step beyond
    assert own.history[sum(same) - 1].n_gaussians == 40 and own.ssim > squared.ssim


# --- a target ---


def configure_small(n, steps):
    return fit_config(20, 26, n, steps, device="cpu")


def test_target_is_reached_with_few():
    truth = GroundTruth.from_image(small())
    target = 34.0
    result = reach_psnr(truth, target, configure_small, 100, progress=False)
    assert target <= result.psnr
    fewer = int(0.85 * len(result.scene))  # 10 % are promised, the rest is the luck of one run
    assert train(configure_small(fewer, 100), truth, progress=False).psnr < target
    again = fit_image(small(), steps=100, target_psnr=target, progress=False, device="cpu")
    assert torch.equal(again.image, result.image)  # the same call, the same bytes


def fake_fits(monkeypatch, psnr_of):
    "Training that takes no time: N Gaussians reach psnr_of(N) in a whole fit, 1 dB less in a short one."
    asked = []

    def run(trainer, progress):
        config = trainer.config
        n = config.densify.max_gaussians if config.densify else config.n_gaussians
        asked.append((n, config.n_iterations))

        class Result:
            psnr, scene, history = psnr_of(n) - (config.n_iterations < 1000), range(n), range(config.n_iterations)

        Result.config = config
        return Result

    monkeypatch.setattr(fit, "run", run)
    monkeypatch.setattr(fit, "fit_trainer", lambda truth, config: type("T", (), {"config": config}))
    return asked


@pytest.mark.parametrize("slope", [1.8, 2.6, 3.5, 5.0])
@pytest.mark.parametrize("enough", [300, 4_000, 60_000])
def test_the_search_is_short_and_close(slope, enough, monkeypatch):
    truth = GroundTruth.from_image(torch.zeros(512, 768, 3))
    asked = fake_fits(monkeypatch, lambda n: 32.0 + slope * math.log2(n / enough) + 0.03 * math.sin(n))
    result = reach_psnr(truth, 32.0, lambda n, steps: fit_config(512, 768, n, steps), 1000, progress=False)
    assert 32 <= result.psnr <= 32.2 and len(result.scene) <= 1.1 * enough
    assert sum(steps == 1000 for _, steps in asked) <= 5


def test_a_step_in_the_curve_ends_the_search_at_the_fewest(monkeypatch):
    truth = GroundTruth.from_image(torch.zeros(40, 40, 3))
    fake_fits(monkeypatch, lambda n: 50.0 if n >= 37 else 20.0)
    result = reach_psnr(truth, 32.0, lambda n, steps: fit_config(40, 40, n, steps), 1000, progress=False)
    assert len(result.scene) == 37


def test_a_flat_picture_needs_one_gaussian():
    result = fit_image(torch.full((12, 12, 3), 0.5), steps=30, target_psnr=25, progress=False, device="cpu")
    assert len(result.scene) == 1 and result.psnr >= 25


def test_a_target_that_nothing_reaches():
    with pytest.raises(ValueError, match=r"target_psnr: expected at most .* dB, which .* Gaussians reach here, got 99"):
        fit_image(small(6, 6), steps=5, target_psnr=99, progress=False, device="cpu")


def test_the_search_says_what_it_does(capsys):
    fit_image(small(), steps=30, target_psnr=20, device="cpu")
    err = capsys.readouterr().err
    assert err.count("a short fit with") == fit.SCOUTS and "a whole fit with" in err and " dB" in err


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
    save_results(result, tmp_path)
    kept = Gaussians2D.load(tmp_path / "scene.json")
    with torch.no_grad():
        assert torch.equal(render(kept, 24, 32, kept.blend, kept.background), result.image)
    for name in ("render.png", "target.png"):
        picture = Image.open(tmp_path / name)
        assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] < 40 and picture.getpixel((16, 12))[3] > 215


def test_an_opaque_picture_fits_with_alpha(tmp_path):
    Image.fromarray((small() * 255).byte().numpy()).save(tmp_path / "opaque.png")
    with open(tmp_path / "opaque.png", "rb") as file:
        truth = photo_target(file, alpha=True)
    assert truth.image.shape == (20, 26, 4) and (truth.image[..., 3] == 1).all()
    assert fit_image(tmp_path / "opaque.png", 20, 20, alpha=True, loss=L1SSIMLoss(), progress=False, device="cpu").psnr > 15


# --- scores and benchmarks ---


def test_ms_ssim_agrees_with_pytorch_msssim():
    from pytorch_msssim import ms_ssim as peer

    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 40, generator=generator), (192, 256), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    for amount in (0.01, 0.1, 0.5):
        image = (target + amount * torch.randn(target.shape, generator=generator)).clamp(0, 1)
        planes = [picture.permute(2, 0, 1)[None].double() for picture in (image, target)]
        assert ms_ssim(image, target) == pytest.approx(peer(*planes, data_range=1.0).item(), abs=1e-6)  # two orders of summing
    assert ms_ssim(target, target) == 1
    assert ms_ssim(target[:175], target[:175]) is None


@pytest.mark.parametrize("seed", range(3))
def test_visited_pairs_are_those_within_the_cutoff(seed):
    scene = GroundTruth.random(30, 40, 50, seed=seed).scene
    scene.means.data[:3] *= 3  # partly or wholly outside
    screen = project(scene.double(), 40, 50)
    inside = gaussian_weights(screen.means, screen.conics, pixel_centers(40, 50, torch.float64).reshape(-1, 2)) > 0
    assert visited_pairs(scene, 40, 50) == int(inside.sum())


def test_bench_rows(tmp_path):
    for k in range(2):
        Image.fromarray((small(seed=k) * 255).byte().numpy()).save(tmp_path / f"p{k}.png")
    rows = list(bench(sorted(tmp_path.iterdir()), (5, 9), steps=6, device="cpu"))
    assert [(row["picture"], row["n_gaussians"]) for row in rows] == [("p0", 5), ("p1", 5), ("mean", 5), ("p0", 9), ("p1", 9), ("mean", 9)]
    assert rows[2]["psnr"] == pytest.approx((rows[0]["psnr"] + rows[1]["psnr"]) / 2) and rows[0]["ms_ssim"] is None is rows[2]["ms_ssim"]
    same = fit_image(tmp_path / "p0.png", 5, 6, progress=False, device="cpu")
    assert rows[0]["psnr"] == same.psnr and rows[0]["pairs"] == visited_pairs(same.scene, 20, 26)
    lines = bench_csv(rows).decode().splitlines()
    assert lines[0] == "picture,n_gaussians,psnr,ssim,ms_ssim,seconds,steps,pairs,seed" and len(lines) == 7
    assert float(lines[1].split(",")[2]) == rows[0]["psnr"]
    assert len({len(line) for line in bench_table(rows).splitlines()}) == 1


def test_an_interrupt_ends_the_whole_benchmark(monkeypatch):
    real = Trainer.step

    def step(self):
        if self.steps_done == 3:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        list(bench([default_portrait(), default_portrait()], (5,), steps=6, max_side=20, device="cpu"))


def test_rate_quality_draws_every_curve():
    ax = rate_quality({"ours": [(200, 31.0), (100, 30.0)], "theirs": [(150, 29.0)]}).axes[0]
    assert [line.get_label() for line in ax.lines] == ["ours", "theirs"]
    assert list(ax.lines[0].get_xdata()) == [100, 200]


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
    (dict(steps=0), "steps: expected .* got 0"),
    (dict(max_side=0), "max_side: expected .* got 0"),
    (dict(seed=-1), "seed: expected .* got -1"),
    (dict(blend="multiply"), "blend: expected one of .* got 'multiply'"),
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
    with pytest.raises(ValueError, match=said):
        fit_image(small(), progress=False, **arguments)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        fit_image("nowhere.png")


def test_six_files_that_read_back(result, tmp_path):
    folder = tmp_path / "new" / "deep"
    assert save_results(result, folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == NAMES  # and no temporary file
    kept = read_scene(folder / "scene.json")
    assert (kept.height, kept.width, kept.blend, kept.background) == (20, 26, "weighted", (0.0, 0.0, 0.0))
    with torch.no_grad():
        assert torch.equal(render(Gaussians2D.from_record(kept), 20, 26, kept.blend), result.image)
    for name in ("render.png", "target.png"):
        assert Image.open(folder / name).size == (26, 20)
    rows = list(csv.reader((folder / "history.csv").open()))
    assert rows[0] == ["step", "loss", "psnr", "lr", "n_gaussians", "step_ms"]
    assert [[float(value) for value in row] for row in rows[1:]] == [list(map(float, record)) for record in result.history]


def test_metrics(result, tmp_path):
    save_results(result, tmp_path)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read == json.loads(json.dumps(metrics(result)))
    assert {"psnr", "ssim", "loss", "n_gaussians", "steps", "seconds", "steps_per_sec", "device", "seed", "version"} <= set(read)
    assert (read["psnr"], read["n_gaussians"], read["steps"], read["device"]) == (result.psnr, 40, 40, "cpu")
    assert read["loss"] == pytest.approx((result.image - result.ground_truth.image).square().mean().item(), rel=1e-5)


def test_an_infinite_score_is_still_valid_json(result, tmp_path):
    truth = replace(result.ground_truth, image=result.image.clamp(0, 1))
    save_results(replace(result, ground_truth=truth), tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)["psnr"] is None


def test_saving_again_replaces(result, tmp_path):
    save_results(result, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_results(result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_file_that_cannot_be_written_leaves_the_old_one(result, tmp_path, monkeypatch):
    save_results(result, tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_results(result, tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize("size, panels", [((40, 20), (1, 4)), ((20, 30), (2, 2)), ((8, 64), (4, 1)), ((1, 200), (4, 1))])
def test_comparison_suits_the_proportions(size, panels):
    result = fit_image(small(*size), n_gaussians=6, steps=2, progress=False, device="cpu")
    figure = comparison(result)
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes][::2] == ["target", "error (mean absolute)"]
    assert axes[0].get_subplotspec().get_geometry()[:2] == panels
    assert max(figure.get_size_inches() * figure.dpi) < 2000


def test_a_loss_of_ones_own(result):
    other = fit_image(small(), n_gaussians=40, steps=40, loss=L1SSIMLoss(), progress=False, device="cpu")
    assert metrics(other)["loss"] == pytest.approx(L1SSIMLoss()(other.image, other.ground_truth.image).item())


def test_portrait_is_a_picture():
    assert Image.open(default_portrait()).size == (512, 600)
    assert default_portrait().is_relative_to(matplotlib.get_data_path())


def test_saving_needs_no_pyplot(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    save_results(result, tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0
