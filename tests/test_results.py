"""What a run leaves behind: a TrainResult to look at, and six files that load again."""
import csv
import io
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from conftest import smooth_picture as small
from gs2d.fit import fit_image
from gs2d.gaussians import Blend, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import to_pil
from gs2d.results import metrics, save_results
from gs2d.io.scenes import read_scene
from gs2d.loss import L1SSIMLoss
from gs2d.renderer import render
from gs2d.results import comparison
from gs2d.train import StepRecord, TrainConfig, train

NAMES = ["comparison.png", "history.csv", "metrics.json", "render.png", "scene.json", "target.png"]


@pytest.fixture(scope="module")
def result():
    return fit_image(small(), n_gaussians=40, steps=40, progress=False, device="cpu")


# --- to look at ---


def test_a_result_renders_at_any_size(result):
    assert torch.equal(result.render(20, 26), result.image) and not result.image.requires_grad
    with torch.no_grad():
        assert torch.equal(result.render(7, 50), render(result.scene, 7, 50))


@pytest.mark.parametrize("blend", list(Blend))
def test_a_result_renders_as_its_scene_looks(blend):
    truth = GroundTruth.random(5, 16, 20, seed=2, blend=blend, background=(0.1, 0.5, 0.9))
    exact = train(TrainConfig(init_level="exact", n_gaussians=5, n_iterations=1, lr=1e-12, device="cpu"), ground_truth=truth, progress=False)
    assert (exact.render(16, 20) - truth.image).abs().max() < 1e-6 and exact.psnr > 100


def test_a_result_is_a_picture(result):
    picture = result.to_pil()
    assert picture.size == (26, 20) and picture.mode == "RGB" and picture.tobytes() == to_pil(result.image).tobytes()
    shown = Image.open(io.BytesIO(result._repr_png_()))
    assert shown.format == "PNG" and shown.tobytes() == picture.tobytes()
    assert "40 steps" in repr(result) and "interrupted" not in repr(result) and "interrupted" in repr(replace(result, interrupted=True))


# --- six files ---


def test_save_is_save_results(result, tmp_path):
    assert result.save(tmp_path / "a") == tmp_path / "a"
    assert save_results(result, tmp_path / "b", StepRecord._fields) == tmp_path / "b"
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("blend", list(Blend))
def test_a_saved_scene_renders_to_the_same_bytes(blend, tmp_path):
    result = fit_image(small(), 20, 30, blend=blend, background=(0.25, 0.5, 1.0), progress=False, device="cpu")
    result.save(tmp_path)
    kept = Gaussians2D.load(tmp_path / "scene.json")
    assert (kept.blend, kept.background) == (blend, (0.25, 0.5, 1.0))
    with torch.no_grad():
        assert torch.equal(render(kept, 20, 26), result.image)


def test_six_files_that_read_back(result, tmp_path):
    folder = tmp_path / "new" / "deep"
    assert result.save(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == NAMES  # and no temporary file
    kept = read_scene(folder / "scene.json")
    assert (kept.height, kept.width, kept.blend, kept.background) == (20, 26, "weighted", (0.0, 0.0, 0.0))
    with torch.no_grad():
        assert torch.equal(render(Gaussians2D.from_record(kept), 20, 26), result.image)
    for name in ("render.png", "target.png"):
        assert Image.open(folder / name).size == (26, 20)
    rows = list(csv.reader((folder / "history.csv").open()))
    assert rows[0] == ["step", "loss", "psnr", "lr", "n_gaussians", "step_ms"]
    assert [[float(value) for value in row] for row in rows[1:]] == [list(map(float, record)) for record in result.history]


def test_metrics(result, tmp_path):
    result.save(tmp_path)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read == json.loads(json.dumps(metrics(result)))
    assert {"psnr", "ssim", "loss", "n_gaussians", "steps", "seconds", "steps_per_sec", "device", "seed", "version", "interrupted", "blend"} <= set(read)
    assert (read["psnr"], read["n_gaussians"], read["steps"], read["device"]) == (result.psnr, 40, 40, "cpu")
    assert read["loss"] == pytest.approx((result.image - result.ground_truth.image).square().mean().item(), rel=1e-5)


def test_an_infinite_score_is_still_valid_json(result, tmp_path):
    truth = replace(result.ground_truth, image=result.image.clamp(0, 1))
    replace(result, ground_truth=truth).save(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)["psnr"] is None


def test_saving_again_replaces(result, tmp_path):
    result.save(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_file_that_cannot_be_written_leaves_the_old_one(result, tmp_path, monkeypatch):
    result.save(tmp_path)
    before = (tmp_path / "metrics.json").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize("size, panels", [((40, 20), (1, 4)), ((20, 30), (2, 2)), ((8, 64), (4, 1)), ((1, 200), (4, 1))])
def test_comparison_suits_the_proportions(size, panels):
    result = fit_image(small(*size), n_gaussians=6, steps=2, progress=False, device="cpu")
    figure = comparison(result.scene, result.image, result.ground_truth.image, "so good")
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["target", "so good", "error (mean absolute)", "outlines at 2σ"]
    assert axes[0].get_subplotspec().get_geometry()[:2] == panels
    assert max(figure.get_size_inches() * figure.dpi) < 2000


def test_a_loss_of_ones_own(result):
    other = fit_image(small(), n_gaussians=40, steps=40, loss=L1SSIMLoss(), progress=False, device="cpu")
    assert metrics(other)["loss"] == pytest.approx(L1SSIMLoss()(other.image, other.ground_truth.image).item())


def test_saving_needs_no_pyplot(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    result.save(tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 0
