"""What is said about fits: the work of a step, rows, tables, files and figures."""
import pytest
import torch
from PIL import Image

from conftest import smooth_picture as small
from gs2d.fit import default_portrait, fit_image
from gs2d.gaussians import gaussian_weights
from gs2d.ground_truth import GroundTruth
from gs2d.loss import ms_ssim
from gs2d.measure import BENCH_COLUMNS, NUMBERS_EACH, bench, bench_csv, bench_table, mean_row, rate_quality, visited_pairs
from gs2d.renderer import pixel_centers, project
from gs2d.train import Trainer


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


def test_a_mean_with_a_missing_number_is_missing():
    rows = [dict.fromkeys(BENCH_COLUMNS, 2) | dict(ms_ssim=None), dict.fromkeys(BENCH_COLUMNS, 4)]
    mean = mean_row(rows, "both")
    assert mean["picture"] == "both" and mean["psnr"] == 3 and mean["ms_ssim"] is None
    assert bench_table([mean]).splitlines()[1].split().count("-") == 1


@pytest.mark.parametrize("stop_at, finished", [(3, 0), (9, 1)])
def test_an_interrupt_ends_the_whole_benchmark(stop_at, finished, monkeypatch):
    step, taken = Trainer.step, []

    def interrupted(trainer):
        taken.append(1)
        if len(taken) == stop_at:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    rows = bench([default_portrait(), default_portrait()], (5,), steps=6, max_side=20, device="cpu")
    for _ in range(finished):
        assert next(rows)["steps"] == 6
    with pytest.raises(KeyboardInterrupt):
        next(rows)


def test_rate_quality_draws_every_curve():
    ax = rate_quality({"ours": [(200, 31.0), (100, 30.0)], "theirs": [(150, 29.0)]}).axes[0]
    assert [line.get_label() for line in ax.lines] == ["ours", "theirs"]
    assert list(ax.lines[0].get_xdata()) == [100, 200]


def test_rate_quality_counts_numbers_stored_and_writes_steps_beside_points():
    ax = rate_quality({"ours": [(100, 30.0, 1_200)], "theirs": [(90, 29.0)]}, stored=True).axes[0]
    assert [list(line.get_xdata()) for line in ax.lines] == [[900], [720]]  # nine numbers each, and eight
    assert ax.get_xlabel() == "numbers stored" and [text.get_text() for text in ax.texts] == ["1,200"]


def test_nine_numbers_are_what_a_gaussian_stores():
    scene = GroundTruth.random(3, 8, 8).scene
    assert sum(parameter[0].numel() for parameter in scene.parameters()) == NUMBERS_EACH
