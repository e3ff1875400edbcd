"""What is said about fits: the work of a step, rows, tables, files and figures."""
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import smooth_picture as small
from gs2d.fit import default_portrait, fit_image
from gs2d.gaussians import gaussian_weights
from gs2d.ground_truth import GroundTruth
from gs2d.loss import ms_ssim
from gs2d.measure import BENCH_COLUMNS, NUMBERS_EACH, bench, bench_csv, bench_pictures, bench_table, mean_row, rate_quality, visited_pairs
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
    assert lines[0] == "picture,n_gaussians,psnr,ssim,ms_ssim,seconds,steps,pairs,seed,error" and len(lines) == 7
    assert float(lines[1].split(",")[2]) == rows[0]["psnr"]
    assert len({len(line) for line in bench_table(rows).splitlines()}) == 1


def test_a_mean_with_a_missing_number_is_missing():
    rows = [dict.fromkeys(BENCH_COLUMNS, 2) | dict(ms_ssim=None, error=None), dict.fromkeys(BENCH_COLUMNS, 4) | dict(error=None)]
    mean = mean_row(rows, "both")
    assert mean["picture"] == "both" and mean["psnr"] == 3 and mean["ms_ssim"] is None
    assert bench_table([mean]).splitlines()[1].split().count("-") == 1


def folder_of_pictures(folder, *names):
    for k, name in enumerate(names):
        Image.fromarray((small(seed=k) * 255).byte().numpy()).save(folder / name)
    return folder


def test_a_damaged_picture_gets_a_row_with_the_reason_and_the_others_are_measured(tmp_path):
    folder_of_pictures(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    rows = list(bench(sorted(tmp_path.iterdir()), (5,), steps=4, device="cpu"))
    assert [row["picture"] for row in rows] == ["a", "b", "c", "mean"]
    assert "damaged" in rows[1]["error"] and rows[1]["psnr"] is None and rows[1]["n_gaussians"] == 5
    assert rows[3]["psnr"] == pytest.approx((rows[0]["psnr"] + rows[2]["psnr"]) / 2) and rows[3]["error"] == "of 2 of 3 pictures"
    table = bench_table(rows).splitlines()
    assert table[2].endswith(rows[1]["error"]) and table[2].split().count("-") == 7 and table[4].endswith("of 2 of 3 pictures")
    assert len({len(line) for line in (table[0], table[1], table[3])}) == 1
    assert bench_csv(rows).decode().splitlines()[2].startswith("b,5,,,,,,,,") and "damaged" in bench_csv(rows).decode()


@pytest.mark.parametrize("error", [MemoryError("n_gaussians: too many"), FloatingPointError("a loss of nan"), RuntimeError("can't allocate\nmemory")])
def test_a_fit_that_fails_does_not_end_the_benchmark(error, tmp_path, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer: (_ for _ in ()).throw(error) if trainer.target.mean() > 0.4 else step(trainer))
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "black").save(tmp_path / "b.png")
    rows = list(bench(sorted(tmp_path.iterdir()), (3,), steps=2, device="cpu"))
    assert [row["error"] for row in rows] == [" ".join(str(error).split()), None, "of 1 of 2 pictures"]


def test_where_no_picture_works_there_is_no_mean(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    row, mean = bench([tmp_path / "a.png"], (3,), steps=2, device="cpu")
    assert row["error"] and mean["psnr"] is None and mean["error"] == "of 0 of 1 pictures"
    assert len(bench_table([row, mean]).splitlines()) == 3


@pytest.mark.parametrize("options, message", [
    (dict(steps=0), "steps: expected"), (dict(quality="superb"), "quality: expected"), (dict(blend="x"), "blend: expected"), (dict(stepz=1), "stepz"),
])
def test_a_wrong_option_ends_the_benchmark_before_the_first_fit(options, message, tmp_path):
    folder_of_pictures(tmp_path, "a.png")
    with pytest.raises((ValueError, TypeError), match=message):
        next(bench([tmp_path / "a.png"], (3,), **options))


def test_a_second_benchmark_does_not_measure_the_figure_of_the_first(tmp_path):
    folder_of_pictures(tmp_path, "a.png", "bench.png", "._a.png", ".hidden.png")
    assert [path.name for path in bench_pictures(tmp_path)] == ["a.png", "bench.png"], "a photograph of a bench"
    (tmp_path / "bench.csv").write_text("seat,legs\n2,4\n")
    assert [path.name for path in bench_pictures(str(tmp_path))] == ["a.png", "bench.png"]
    (tmp_path / "bench.csv").write_bytes(bench_csv(list(bench([tmp_path / "a.png"], (3,), steps=2, device="cpu"))))
    assert bench_pictures(tmp_path) == [tmp_path / "a.png"]
    Path(tmp_path, "a.png").unlink()
    with pytest.raises(ValueError, match="only the figure of an earlier benchmark"):
        bench_pictures(tmp_path)


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
