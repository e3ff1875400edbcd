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
from gs2d.fit import comparison, default_n_gaussians, default_portrait, fit_config, fit_image, metrics, save_results
from gs2d.gaussians import load_scene
from gs2d.init_levels import InitLevel
from gs2d.loss import L1SSIMLoss
from gs2d.renderer import Blend, render
from gs2d.train import TrainConfig, train
from gs2d.ground_truth import GroundTruth

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
    assert fit_config(60, 80).n_iterations == fit.STEPS_FOR_A_PHOTO and fit_config(60, 80).densify.max_gaussians == 60 * 80 // 40


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
    kept = load_scene(folder / "scene.json")
    assert (kept.height, kept.width, kept.blend, kept.background) == (20, 26, "weighted", (0.0, 0.0, 0.0))
    with torch.no_grad():
        assert torch.equal(render(kept.scene, 20, 26, kept.blend), result.image)
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
    assert [ax.get_title() for ax in axes][::2] == ["target", "error (root mean square)"]
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
