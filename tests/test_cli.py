"""The gs2d command: what it writes, what it says, and one clear line for everything that can go wrong."""
import ast
import dataclasses
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import gs2d.cli
import gs2d.fit
import gs2d.io.containers
import gs2d.show.film
from gs2d import __version__
from gs2d.cli import main
from gs2d.commands import fits, shared
from gs2d.densify import DensifyConfig, ErrorGrowth
from gs2d.gaussians import Domain2D, Gaussians2D
from gs2d.io.containers import read_frames
from gs2d.io.runs import RunFolder
from gs2d.loss import L1SSIMLoss, l1_loss, l2_loss
from gs2d.train import TrainConfig, Trainer

COMMANDS = ["fit", "bench", "train", "render", "info", "convert", "view"]
SIX = ["comparison.png", "history.csv", "metrics.json", "render.png", "scene.json", "target.png"]
COMPLETE = sorted([*SIX, "run.json"])
STOPPED = sorted([*COMPLETE, "checkpoint.safetensors"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test runs in an empty folder of its own."
    monkeypatch.chdir(tmp_path)


def gs2d_(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeds(*arguments):
    done = gs2d_(*arguments)
    assert done.exit_code == 0, done.output
    return done


def fails(*arguments):
    "The one line on stderr of a command that must fail with status 2."
    done = gs2d_(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    lines = [line for line in done.stderr.splitlines() if "error" in line or not line.startswith("gs2d: ")]
    assert len(lines) == 1 and lines[0].startswith("gs2d: error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def picture(path="photo.png", size=(20, 16)):
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    return Path(path)


def scene(path="scene.json", n=3, domain=Domain2D((-5, 5), (-2.5, 2.5)), height=None, width=None, **look):
    values = torch.rand(n, 9, generator=torch.Generator().manual_seed(0))
    made = Gaussians2D.from_values(values[:, :2], 0.5 + values[:, 2:4], values[:, 4], values[:, 5], values[:, 6:], domain, **look)
    made.save(path, height, width)
    return Path(path)


QUICK = ("--steps", 3, "--n-gaussians", 6, "--device", "cpu", "-q")


# --- what works ---


def test_version_and_help():
    assert succeeds("--version").stdout == f"gs2d {__version__}\n"
    for arguments in ((), ("--help",)):
        assert all(command in succeeds(*arguments).stdout for command in COMMANDS)
    for command in COMMANDS:
        assert "--help" in succeeds(command, "--help").stdout


def test_fit_writes_six_files_and_says_where(tmp_path):
    done = succeeds("fit", picture(), *QUICK, "--out", "a/b")
    assert sorted(path.name for path in Path("a/b").iterdir()) == COMPLETE
    assert json.loads(Path("a/b/run.json").read_text())["state"] == "complete"
    assert "PSNR " in done.stdout and "SSIM " in done.stdout and "results in a/b" in done.stdout
    about = json.loads(Path("a/b/metrics.json").read_text())
    assert (about["steps"], about["n_gaussians"], about["version"], about["device"]) == (3, 6, __version__, "cpu")


def test_fit_without_a_photo_takes_the_portrait():
    succeeds("fit", *QUICK, "--max-side", 30, "--out", "out")
    assert Image.open("out/target.png").size == (26, 30)


def test_fit_options_arrive():
    succeeds("fit", picture(), *QUICK, "--blend", "over", "--seed", 5, "--loss", "l1_ssim", "--background", "white", "--out", "out")
    about, kept = (json.loads(Path("out", name).read_text()) for name in ("metrics.json", "scene.json"))
    assert (about["blend"], about["seed"], kept["blend"], kept["background"]) == ("over", 5, "over", [1, 1, 1])


def test_fit_in_seconds():
    done = succeeds("fit", picture(), "--n-gaussians", 6, "--seconds", 0.05, "--device", "cpu", "--out", "out")
    about = json.loads(Path("out/metrics.json").read_text())
    assert "0.05 s" in done.stderr and about["steps"] >= 2 and about["n_gaussians"] <= 6


def test_fit_to_a_target():
    done = succeeds("fit", picture(), "--target-psnr", 30, "--steps", 40, "--device", "cpu", "--out", "out")
    about = json.loads(Path("out/metrics.json").read_text())
    assert about["psnr"] >= 30 and f"{about['n_gaussians']} Gaussians" in done.stdout and "a whole fit with" in done.stderr


def test_fit_with_a_preset():
    succeeds("fit", picture(), "--quality", "draft", "--device", "cpu", "-q", "--out", "out")
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 300


def test_fit_and_render_with_transparency():
    Image.linear_gradient("L").resize((20, 16)).convert("LA").save("soft.png")
    clear = Image.new("RGBA", (20, 16), (255, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 10, 16))
    clear.save("half.png")
    succeeds("fit", "half.png", "--alpha", "--steps", 60, "--n-gaussians", 20, "--device", "cpu", "-q", "--out", "out")
    succeeds("render", "out/scene.json", "--out", "again.png")
    corner = lambda name, x: Image.open(name).getpixel((x, 8))
    for name in ("out/render.png", "again.png"):
        assert Image.open(name).mode == "RGBA" and corner(name, 2)[3] > 200 > 60 > corner(name, 17)[3]
    succeeds("render", "out/scene.json", "--background", "white", "--out", "white.png")
    assert Image.open("white.png").mode == "RGB" and min(corner("white.png", 17)) > 200 and corner("white.png", 2)[1] < 60


def test_bench_measures_a_folder():
    Path("pictures").mkdir()
    for name in ("b.png", "a.jpg"):
        picture(Path("pictures", name))
    Path("pictures/notes.txt").write_text("not a picture")
    done = succeeds("bench", "pictures", "--n-gaussians", 4, "--n-gaussians", 8, "--steps", 5, "--device", "cpu", "--out", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["bench.csv", "bench.png"]
    rows = [line.split(",") for line in Path("out/bench.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["picture", "a", "b", "mean", "a", "b", "mean"] and rows[3][1] == "4.0"
    assert len(done.stdout.splitlines()) == 8 and "results in out" in done.stdout


def test_bench_of_nothing():
    Path("empty").mkdir()
    assert "expected pictures" in fails("bench", "empty")
    assert "expected a folder" in fails("bench", "missing")
    assert not Path("gs2d-out").exists()


def test_runs_within_one_second_get_folders_of_their_own(monkeypatch):
    class Stopped:
        @staticmethod
        def now():
            import datetime
            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(shared, "datetime", Stopped)
    for _ in range(3):
        succeeds("fit", picture(), *QUICK)
    assert sorted(path.name for path in Path("gs2d-out").iterdir()) == [f"2026-01-02_03-04-05{k}" for k in ("", "-2", "-3")]


def test_progress_goes_to_stderr_and_quiet_is_quiet():
    loud, quiet = gs2d_("fit", picture(), *QUICK[:-1], "--out", "a"), gs2d_("fit", picture(), *QUICK, "--out", "b")
    assert "PSNR" in loud.stderr and "100%" in loud.stderr and "%|" not in loud.stdout
    assert [line for line in quiet.stderr.splitlines() if "compiling" not in line] == []  # the kernels announce their first use


def test_fit_and_train_are_filmed():
    for command in (["fit", picture(), "--steps", 3, "--video", "fit.webm"],
                    ["train", "--steps", 3, "--n-gaussians", 3, "--height", 24, "--width", 32, "--video", "train.gif"]):
        assert command[-1] in succeeds(*command, "--quiet").stdout
        assert len(list(read_frames(command[-1]))) >= 2


def test_a_replay_plays_in_the_browser_and_holds_where_the_run_arrived():
    for command in (["fit", picture(), "--steps", 9, "--video", "fit.gif"], ["train", "--steps", 9, "--n-gaussians", 3, "--height", 24, "--width", 32]):
        said = succeeds(*command, "-q", "--out", "out", "--overwrite", "--replay", "run.html").stdout
        assert "the replay in run.html" in said and ("--video" not in command or "the video in fit.gif, the replay" in said)
        page = Path("run.html").read_text()
        assert [moment["step"] for moment in json.loads(re.search(r'id="gs2d-page">(.*?)</script>', page)[1])["moments"]] == list(range(10))
        assert len(Gaussians2D.load("run.html")) == len(Gaussians2D.load("out/scene.json"))
        Path("run.html").unlink()


@pytest.mark.parametrize("name, expected", [("run.webm", "expected a path that ends in .html"), ("no/run.html", "folder"), ("taken.html", "--overwrite")])
def test_a_replay_that_cannot_be_written_is_refused_before_training(name, expected, no_steps):
    Path("taken.html").write_text("mine")
    assert expected in fails("fit", picture(), *QUICK, "--replay", name) and Path("taken.html").read_text() == "mine"


@pytest.mark.parametrize("starts", [True, False])
def test_view_opens_a_page_in_the_browser(monkeypatch, starts):
    opened = []
    monkeypatch.setattr("tempfile.tempdir", str(Path.cwd()))
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or starts)
    said = succeeds("view", scene("small.json", height=20, width=40)).stdout
    path = Path(said.split(",")[0])
    assert opened == [path.as_uri()] and len(Gaussians2D.load(path)) == 3 and ("no browser could be started" in said) != starts
    path.write_text(path.read_text().replace("<script type=\"module\">", "<script type=\"module\">alert(1);"))
    again = Path(succeeds("view", path).stdout.split(",")[0])
    assert opened[1:] == [again.as_uri()] and again != path and "alert(1)" not in again.read_text()  # the numbers of a page, not its script
    picture("seen.png")
    succeeds("view", "small.json", "--target", "seen.png", "--out", "page.html", "--no-browser")
    assert "data:image/png" in Path("page.html").read_text() and len(opened) == 2
    assert "--overwrite" in fails("view", "small.json", "--out", "page.html") and "ends in .html" in fails("view", "small.json", "--out", "page.htm.gz")
    assert "nowhere.json" in fails("view", "nowhere.json")


def test_a_video_that_cannot_be_written_is_refused_before_training():
    for name in ("film.avi", "nowhere/film.webm"):
        assert name in fails("fit", picture(), "--steps", 3, "--video", name)


def test_train_on_a_synthetic_scene():
    succeeds("train", "--n-gaussians", 4, "--height", 12, "--width", 16, "--steps", 3, "--device", "cpu", "-q", "--out", "out",
             "--init-level", "noisy", "--lr-scale", "means=0.5", "--lr-scale", "colors=0", "--l1-weight", 1, "--ssim-weight", 0,
             "--densify-every-n-steps", 2, "--densify-max-gaussians", 9)
    assert sorted(path.name for path in Path("out").iterdir()) == COMPLETE
    assert Image.open("out/render.png").size == (16, 12)


def test_options_of_train_make_a_config():
    made = fits._train_config(dict(lr=0.5, lr_scale=["means=0.5"], l1_weight=0.7, densify_clone_shift=0.1, compile="false", quiet=True, out=None))
    growth = DensifyConfig(clone_shift=0.1)
    assert made == TrainConfig(lr=0.5, lr_scale={"means": 0.5}, loss=L1SSIMLoss(l1_weight=0.7), densify=growth, compile=False)
    assert fits._train_config({}) == TrainConfig()
    assert fits._train_config(dict(densify=False, densify_clone_shift=0.1)).densify is None
    assert fits._train_config(dict(densify=True)).densify == fits._train_config(dict(densify_strategy="gradient")).densify == DensifyConfig()
    assert fits._train_config(dict(seconds=2.0, growing_loss="l2")) == TrainConfig(seconds=2.0, growing_loss=l2_loss)


@pytest.mark.parametrize("name, loss", [("l1", l1_loss), ("l2", l2_loss), ("l1_ssim", L1SSIMLoss()), ("l1_loss", l1_loss), ("l2_loss", l2_loss)])
def test_a_loss_has_one_name_in_every_command(name, loss):
    assert fits._train_config(dict(loss=name)).loss == loss
    succeeds("train", "--loss", name, "--n-gaussians", 3, "--height", 12, "--width", 12, "--steps", 2, "--device", "cpu", "-q")
    if not name.endswith("_loss"):
        Path("pictures").mkdir()
        succeeds("fit", picture("pictures/one.png"), *QUICK, "--loss", name)
        succeeds("bench", "pictures", "--n-gaussians", 3, "--steps", 2, "--device", "cpu", "--loss", name)


def test_growth_by_error_has_options_of_its_own():
    made = fits._train_config(dict(densify_strategy="error", densify_rounds=3, densify_growth=0.1, densify_start_share=0.5))
    assert made.densify == ErrorGrowth(rounds=3, growth=0.1, start_share=0.5)
    succeeds("train", "--n-gaussians", 8, "--height", 12, "--width", 16, "--steps", 8, "--device", "cpu", "-q", "--out", "out",
             "--densify-strategy", "error", "--densify-rounds", 2, "--densify-start-share", 0.5, "--densify-max-gaussians", 8)
    rows = Path("out/history.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[4]) for row in rows] == [4, 6, 6, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("options, expected", [
    (["--densify-start-share", 0.1], "--densify-start-share: expected it with --densify-strategy error, got it with gradient"),
    (["--densify-rounds", 3, "--densify-strategy", "gradient"], "--densify-rounds: expected it with --densify-strategy error"),
    (["--densify-every-n-steps", 3, "--densify-strategy", "error"], "--densify-every-n-steps: expected it with --densify-strategy gradient, got it with error"),
])
def test_an_option_of_the_other_strategy_is_refused(options, expected):
    assert expected in fails("train", *options)


def test_every_field_is_an_option_with_its_default_in_the_help():
    text = " ".join(succeeds("train", "--help").stdout.split("Options:")[1].split())
    for kind, prefix in ((TrainConfig, "--"), (DensifyConfig, "--densify-"), (ErrorGrowth, "--densify-")):
        for field in dataclasses.fields(kind):
            option = prefix + field.name.replace("_", "-")
            said = re.search(rf"{option}(?![\w-])[^\[]*\[([^\]]*)\]", text)
            assert said, option
            if isinstance(field.default, (int, float, str)):
                default = getattr(field.default, "value", field.default)
                assert said[1] == (default if isinstance(default, str) else f"{default:g}"), option
    taken = {name for name in re.findall(r"--densify-([\w-]+)", text)} - {"strategy"}
    assert taken == {field.name.replace("_", "-") for kind in (DensifyConfig, ErrorGrowth) for field in dataclasses.fields(kind)}


def test_defaults_in_the_help_of_fit_are_those_of_the_library():
    from gs2d.fit import MAX_SIDE, PIXELS_PER_GAUSSIAN, STEPS_FOR_A_PHOTO, Quality

    text = " ".join(succeeds("fit", "--help").stdout.split())
    assert f"[default: {MAX_SIDE}]" in text and "[default: good]" in text
    for quality in Quality:
        said = re.search(rf"{quality.value} \(([\d,]+)[^)]*?(\d+)[^)\d]*\)", text)
        assert said and (int(said[1].replace(",", "")), int(said[2])) == (STEPS_FOR_A_PHOTO[quality], PIXELS_PER_GAUSSIAN[quality])


@pytest.mark.parametrize("arguments, size", [
    (["--width", 40], (40, 20)), (["--height", 30], (60, 30)), (["--width", 7, "--height", 9], (7, 9)), ([], (24, 12)),
])
def test_render_keeps_the_proportions(arguments, size):
    succeeds("render", scene(height=12, width=24), *arguments, "--out", "picture.png")
    assert Image.open("picture.png").size == size


def test_render_without_a_stored_size():
    succeeds("render", scene(domain=Domain2D((0, 1), (0, 2))))
    assert Image.open("scene.png").size == (256, 512)


def test_render_takes_blend_and_background_from_the_file_or_the_options():
    scene(blend="additive", background=(0, 0, 1.0))
    corner = lambda *options: (succeeds("render", "scene.json", "--width", 30, "--overwrite", *options), Image.open("scene.png").getpixel((0, 0)))[1]
    assert corner() == (0, 0, 255)
    assert corner("--background", "#ff8000") == (255, 128, 0)
    assert corner("--background", "1,1,1", "--blend", "over") == (255, 255, 255)


def test_info_says_what_is_in_the_file():
    text = succeeds("info", scene(n=7, height=12, width=24, blend="over")).stdout
    for expected in ("7", "24×12 pixels", "over", "x -5 to 5", "pixels"):
        assert expected in text
    assert "of any size" in succeeds("info", scene(n=0)).stdout


# --- what goes wrong ---


def png_that_claims(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_pictures_that_cannot_be_read():
    whole = picture("whole.png", (200, 200)).read_bytes()
    Path("half.png").write_bytes(whole[: len(whole) // 2])
    Path("notes.png").write_text("not a picture")
    Path("empty.png").write_bytes(b"")
    Path("bomb.png").write_bytes(png_that_claims(40_000, 30_000))
    Path("folder.png").mkdir()
    for name, expected in [("missing.png", "missing.png"), ("half.png", "truncated"), ("notes.png", "picture"), ("empty.png", "picture"),
                           ("bomb.png", "pixels"), ("folder.png", "folder")]:
        assert expected in fails("fit", name, *QUICK)
    assert not Path("gs2d-out").exists()


@pytest.mark.parametrize("options, expected", [
    (["--steps", 0], "steps: expected"), (["--steps", -1], "steps: expected"), (["--steps", "many"], "--steps"),
    (["--n-gaussians", 0], "n_gaussians: expected"), (["--n-gaussians", -2], "n_gaussians: expected"),
    (["--max-side", 0], "max_side: expected"), (["--seed", -1], "seed: expected"),
    (["--device", "toaster"], "device: expected"), (["--device", "cuda:99"], "device: expected"),
    (["--blend", "multiply"], "blend: expected"), (["--loss", "l3"], "--loss: expected"), (["--background", "1,2"], "background: expected"),
    (["--background", "plaid"], "--background: expected"), (["--quality", "superb"], "quality: expected"),
    (["--seconds", 0], "seconds: expected"), (["--seconds", 3, "--steps", 3], "--seconds: expected it without --steps"),
    (["--target-psnr", 30, "--n-gaussians", 4], "--target-psnr: expected it without --n-gaussians"), (["--target-psnr", -1], "target_psnr: expected"),
    (["--target-psnr", 99, "--steps", 2], "target_psnr: expected at most"), (["--video", "a.webm", "--alpha"], "--video: expected it without --alpha"), (["--nonsense"], "--nonsense"), (["--out"], "--out"),
])
def test_options_of_fit_that_make_no_sense(options, expected):
    assert expected in fails("fit", picture(), *options)
    assert not Path("gs2d-out").exists()  # nothing is left of a run that could not start


@pytest.mark.parametrize("options, expected", [
    (["--height", 0], "height: expected"), (["--width", -4], "width: expected"), (["--lr", 0], "lr: expected"), (["--lr", "nan"], "lr: expected"),
    (["--lr-scale", "means"], "--lr-scale: expected"), (["--lr-scale", "mean=1"], "lr_scale: expected"), (["--lr-scale", "means=-1"], "lr_scale"),
    (["--lr-schedule", "linear"], "lr_schedule: expected"), (["--init-level", "content,"], "init_level: expected"),
    (["--densify-max-gaussians", 0], "max_gaussians: expected"), (["--densify-strategy", "both"], "strategy"), (["--compile", "maybe"], "compile: expected"),
    (["--l1-weight", 0, "--ssim-weight", 0], "weight"), (["--loss", "l2", "--l1-weight", 1], "--loss: expected"), (["--loss", "x"], "loss: expected"),
    (["--growing-loss", "x"], "loss: expected"), (["--seconds", 0], "seconds: expected"), (["--seconds", 3, "--steps", 3], "--seconds: expected it without"),
])
def test_options_of_train_that_make_no_sense(options, expected):
    assert expected in fails("train", *options)
    assert not Path("gs2d-out").exists()


def test_commands_that_do_not_exist():
    assert "frobnicate" in fails("frobnicate")
    assert "--frobnicate" in fails("--frobnicate")
    assert "SCENE" in fails("render")


@pytest.fixture
def no_steps(monkeypatch):
    "Every command that trains takes its steps here: one that gets that far fails in a way that no test takes for an answer."
    def must_not_train(trainer):
        raise AssertionError("training started although the results could not have been written")

    monkeypatch.setattr(Trainer, "step", must_not_train)


COMMANDS_THAT_TRAIN = [
    ["fit", "photo.png", "--steps", 3, "-q"], ["fit", "photo.png", "--seconds", 0.1, "-q"],
    ["fit", "photo.png", "--target-psnr", 20, "--steps", 3, "-q"], ["fit", "photo.png", "--steps", 3, "-q", "--video", "film.gif"],
    ["train", "--steps", 3, "--height", 12, "--width", 12, "-q"], ["bench", ".", "--steps", 3]]


@pytest.mark.parametrize("command", COMMANDS_THAT_TRAIN, ids=lambda command: " ".join(map(str, command[:3])))
@pytest.mark.parametrize("out", ["file", "file/inside", "file/much/deeper"])
def test_an_unwritable_folder_is_found_before_training(command, out, no_steps):
    picture()
    Path("file").write_text("in the way")
    assert "--out: expected a folder that can be written to" in fails(*command, "--device", "cpu", "--out", out)


@pytest.mark.parametrize("command", COMMANDS_THAT_TRAIN, ids=lambda command: " ".join(map(str, command[:3])))
def test_with_a_folder_the_same_commands_train(command, no_steps):
    picture()
    assert isinstance(gs2d_(*command, "--device", "cpu").exception, AssertionError)  # so the tests around this one can fail


def test_a_folder_without_permission_is_found_before_training(monkeypatch, no_steps):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shared.tempfile, "TemporaryFile", refused)
    assert "Permission denied" in fails("fit", picture(), *QUICK, "--out", "out")


def test_a_file_named_like_the_default_folder():
    Path("gs2d-out").write_text("in the way")
    assert "gs2d-out" in fails("fit", picture(), *QUICK)


def test_disk_full_while_saving(monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in fails("fit", picture(), *QUICK, "--out", "out")
    assert not Path("out").exists()  # nothing in it, so it is gone again


def test_a_run_that_diverges_is_one_line():
    done = gs2d_("train", "--n-gaussians", 3, "--height", 8, "--width", 8, "--steps", 50, "--lr", 1e30, "--device", "cpu", "-q", "--out", "out")
    assert done.exit_code == 2 and re.fullmatch("gs2d: error: .*finite.*; what there was is saved\n", done.stderr), done.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == COMPLETE
    assert json.loads(Path("out/run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("suffix, said", [
    (".json", ""), (".safetensors", ""), (".ply", ": viewers of 3D Gaussian Splatting draw it with the over blend"), (".svg", ": an approximation, made of gradients"), (".glsl", "")])
def test_convert_writes_the_format_and_says_what_is_lost(suffix, said):
    said_all = succeeds("convert", scene("from.json", height=20, width=40), f"to{suffix}").stdout
    assert said_all == f"to{suffix}, 3 Gaussians, {Path(f'to{suffix}').stat().st_size:,} bytes{said}\n"
    if suffix in (".json", ".safetensors", ".ply"):
        for command in ("info", "render"):
            succeeds(command, f"to{suffix}")
        assert Image.open("to.png").size == (40, 20)
        back = succeeds("convert", f"to{suffix}", "back.json")
        assert back.stderr == "" and Path("back.json").read_bytes() == Path("from.json").read_bytes()


@pytest.mark.parametrize("source, out, expected", [
    ("scene.json", "x.npz", "not written"), ("scene.json", "x.obj", "suffix .json"), ("scene.json", "x.pt", "pickle"), ("scene.json", "no/x.ply", "folder"), ("scene.json", "scene.json", "reads"),
    ("nowhere.json", "x.ply", "nowhere.json"), ("x.svg", "x.ply", "not read back"), ("model.pth.tar", "x.ply", "weights_only"), (".", "x.ply", "suffix"), ("text.ply", "x.json", "PLY file")])
def test_what_cannot_be_converted(source, out, expected):
    scene(), Path("text.ply").write_text("hello")
    before = sorted(Path().iterdir())
    assert expected in fails("convert", source, out)
    assert sorted(Path().iterdir()) == before


def broken_scene(change):
    document = json.loads(scene().read_text())
    change(document)
    Path("broken.json").write_text(json.dumps(document))
    return "broken.json"


@pytest.mark.parametrize("command", ["info", "render"])
def test_scene_files_that_cannot_be_read(command):
    Path("text.json").write_text("hello")
    Path("list.json").write_text("[1, 2]")
    Path("bytes.json").write_bytes(bytes(range(256)))
    for name in ("text.json", "list.json", "bytes.json", "missing.json", "."):
        assert name in fails(command, name)
    for change, expected in [
        (lambda d: d["centers"][1].__setitem__(0, float("nan")), "centers"), (lambda d: d["sigmas"][0].__setitem__(1, float("inf")), "sigmas"),
        (lambda d: d["colors"].pop(), "colors"), (lambda d: d["thetas"].append(0.0), "thetas"), (lambda d: d["centers"][0].append(1.0), "centers"),
        (lambda d: d.pop("centers"), "centers"), (lambda d: d.update(N=-1), "N"), (lambda d: d.update(version=99), "version"),
        (lambda d: d.update(x_dim=[5, -5]), "x_dim"), (lambda d: d["sigmas"][0].__setitem__(0, -1.0), "scales"), (lambda d: d.update(blend="x"), "blend"),
    ]:
        line = fails(command, broken_scene(change))
        assert expected in line and "broken.json" in line


@pytest.mark.parametrize("options, expected", [
    (["--width", 0], "--width: expected"), (["--height", -3], "--height: expected"), (["--width", 10**6], "pixels"),
    (["--width", 8, "--out", "picture.xyz"], "picture.xyz"), (["--width", 8, "--out", "no/such/folder.png"], "folder"),
    (["--width", 8, "--blend", "multiply"], "blend: expected"), (["--width", 8, "--device", "toaster"], "device: expected"),
    (["--width", 8, "--background", "0,0"], "background"),
])
def test_options_of_render_that_make_no_sense(options, expected):
    assert expected in fails("render", scene(), *options)
    assert not Path("scene.png").exists()


# --- nothing is replaced unasked, and nothing is lost ---


@pytest.mark.parametrize("command, what", [
    (["render", "scene.json"], "scene.png"), (["convert", "scene.json", "scene.ply"], "scene.ply"), (["render", "scene.json", "--out", "photo.png"], "photo.png"),
    (["fit", "photo.png", *QUICK, "--out", "."], "target.png"), (["fit", "other.png", *QUICK, "--out", "."], "target.png"),
    (["fit", "photo.png", *QUICK, "--video", "film.gif", "--out", "new"], "film.gif"), (["train", *QUICK[:-1], "--out", "."], "target.png"),
    (["fit", "photo.png", *QUICK, "--video", "frames/", "--out", "new"], "frames"), (["bench", "pictures", "--out", "pictures"], "bench.csv"),
])
def test_what_is_there_is_replaced_only_on_request(command, what):
    picture(), picture("other.png"), picture("target.png"), picture("scene.png"), scene()
    Path("film.gif").write_bytes(b"a film"), Path("scene.ply").write_text("mine")
    for folder in ("frames", "pictures"):
        Path(folder).mkdir()
    picture("frames/frame_00000.png"), picture("pictures/a.png"), Path("pictures/bench.csv").write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    line = fails(*command)
    assert what in line and "--overwrite" in line, line
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    if "bench" not in command:
        succeeds(*command, "--overwrite")
        assert {path for path in before if not path.exists() or path.read_bytes() != before[path]}


@pytest.mark.parametrize("command", [
    ["fit", "target.png", *QUICK, "--out", "."], ["fit", "./folder/../target.png", *QUICK, "--out", "."], ["fit", "link.png", *QUICK, "--out", "."],
    ["fit", "film.gif", *QUICK, "--video", "film.gif", "--out", "new"], ["render", "x.png.json", "--out", "x.png.json"],
    ["convert", "x.png.json", "x.png.json"], ["convert", "x.png.json", "link.json"],
    ["bench", "pictures", "--out", "pictures", "--n-gaussians", 3, "--steps", 2],
])
def test_an_input_is_never_replaced(command):
    picture("target.png"), picture("film.gif"), scene("x.png.json"), Path("folder").mkdir(), Path("pictures").mkdir()
    os.symlink("target.png", "link.png"), os.symlink("x.png.json", "link.json")
    picture("pictures/bench.png")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert "which is what the command reads" in fails(*command, "--overwrite")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_second_benchmark_beside_the_pictures_does_not_measure_its_own_figure():
    Path("pictures").mkdir()
    picture("pictures/a.png"), picture("pictures/._a.png")
    for more in ([], ["--overwrite"]):
        succeeds("bench", "pictures", "--out", "pictures", "--n-gaussians", 3, "--steps", 2, *more)
        assert [line.split(",")[0] for line in Path("pictures/bench.csv").read_text().splitlines()] == ["picture", "a", "mean"]


def test_a_damaged_picture_does_not_end_a_benchmark():
    Path("pictures").mkdir()
    picture("pictures/a.png"), Path("pictures/b.png").write_bytes(b"not a picture"), picture("pictures/c.png")
    done = gs2d_("bench", "pictures", "--out", "out", "--n-gaussians", 3, "--steps", 2)
    assert done.exit_code == 1 and "1 of 3 fits failed" in done.stderr, done.output
    assert [line.split(",")[0] for line in Path("out/bench.csv").read_text().splitlines()] == ["picture", "a", "b", "c", "mean"]
    assert "not a picture" in Path("out/bench.csv").read_text()


def test_a_video_that_fails_on_the_way_does_not_cost_the_fit(monkeypatch):
    write, written = gs2d.show.film.FrameWriter.write, []

    def full_after_two(self, *arguments):
        written.append(1)
        if len(written) > 2:
            self.discard()
            raise OSError(errno.ENOSPC, "No space left on device", self.shown)
        return write(self, *arguments)

    monkeypatch.setattr("gs2d.show.film.FrameWriter.write", full_after_two)
    done = gs2d_("fit", picture(), *QUICK[:-1], "--steps", 9, "--video", "film.gif", "--out", "out")
    assert done.exit_code == 2 and "the video could not be written (film.gif: No space left on device); what there was is saved" in done.stderr, done.output
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 9 and not Path("film.gif").exists()


def test_a_video_without_its_encoder_is_refused_before_training(monkeypatch, no_steps):
    monkeypatch.setitem(gs2d.io.containers.CODECS, ".mp4", gs2d.io.containers.CODECS[".mp4"]._replace(encoder="no_such_encoder"))
    assert "expected a PyAV with no_such_encoder" in fails("fit", picture(), *QUICK, "--video", "film.mp4")


def test_what_the_memory_cannot_hold_is_refused_before_any_work(no_steps):
    for command in (["fit", picture(), "--n-gaussians", 10**9], ["train", "--n-gaussians", 10**9, "--height", 48, "--width", 64]):
        line = fails(*command, "--device", "cpu", "-q")
        assert "1,000,000,000 Gaussians on" in line and "would fit" in line, line
    assert not Path("gs2d-out").exists()


@pytest.mark.parametrize("text", ["5,5,5", "nan,0,0", "1,1", "-0.1,0,0", "1,2", "", "inf,0,0", "0,0,0,0"])
@pytest.mark.parametrize("command", ["fit", "render"])
def test_a_background_is_three_numbers_from_0_to_1_or_a_name(command, text):
    line = fails(command, picture() if command == "fit" else scene(), "--background", text)
    assert "--background: expected three numbers from 0 to 1" in line and repr(text) in line


def test_folders_made_for_a_run_that_could_not_start_are_gone():
    assert "steps: expected" in fails("fit", picture(), "--steps", 0, "--out", "a/b/c")
    assert not Path("a").exists()
    Path("mine").mkdir()
    assert "steps: expected" in fails("fit", picture(), "--steps", 0, "--out", "mine")
    assert list(Path("mine").iterdir()) == []


def test_no_temporary_name_in_an_error(monkeypatch):
    Path("out").mkdir()
    Path("out/scene.json").mkdir()
    line = fails("fit", picture(), *QUICK, "--out", "out", "--overwrite")
    assert "scene.json" in line and ".results-" not in line and ".tmp" not in line


def test_how_often_checkpoints_are_kept_is_a_time():
    for text in ("soon", "-3s", "1d", "nan"):
        assert "--checkpoint-every: expected a time such as 30s" in fails("fit", picture(), *QUICK, "--checkpoint-every", text)


def test_resuming_what_cannot_be_resumed():
    Path("empty").mkdir()
    assert "expected the folder of a run" in fails("fit", "--resume", "empty")
    succeeds("fit", picture(), *QUICK, "--out", "out")
    assert "which is complete" in fails("fit", "--resume", "out")
    assert "expected it without --steps" in fails("fit", "--resume", "out", "--steps", 3)
    RunFolder("out").write("stopped")
    assert "expected a run of gs2d train, got one of gs2d fit" in fails("train", "--resume", "out")
    Path("out/checkpoint.safetensors").write_bytes(b"damaged")
    assert "expected a checkpoint" in fails("fit", "--resume", "out")


def test_a_known_scene_is_resumed_too(ctrl_c):
    command = ["train", "--steps", 9, "--height", 12, "--width", 12, "--n-gaussians", 4, "--device", "cpu", "-q", "--densify-every-n-steps", 2]
    succeeds(*command, "--out", "straight")
    ctrl_c(5)
    assert gs2d_(*command, "--out", "out").exit_code == 130
    succeeds("train", "--resume", "out")
    assert Path("out/scene.json").read_bytes() == Path("straight/scene.json").read_bytes()
    assert sorted(path.name for path in Path("out").iterdir()) == COMPLETE


# --- as a process ---


def test_python_m_gs2d_is_the_command():
    environment = {**os.environ, "PYTHONPATH": str(Path(gs2d.cli.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "gs2d", "--version"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"gs2d {__version__}\n"), done.stderr


def test_ctrl_c_saves_what_there_is():
    picture()
    command = [sys.executable, "-m", "gs2d", "fit", "photo.png", "--steps", "1000000", "--n-gaussians", "6", "--device", "cpu", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(gs2d.cli.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        seen = ""
        while "PSNR" not in seen:  # the progress bar: training runs
            part = process.stderr.read(1)
            assert part, seen
            seen += part
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stopped after" in err and "is saved" in err and "Traceback" not in err and "results in out" in out
    assert sorted(path.name for path in Path("out").iterdir()) == STOPPED
    assert 0 < json.loads(Path("out/metrics.json").read_text())["steps"] < 1_000_000


def test_ctrl_c_before_training_starts(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gs2d.ground_truth.GroundTruth.from_image", interrupted)
    done = gs2d_("fit", picture(), *QUICK)
    assert done.exit_code == 130 and done.stderr == "gs2d: stopped; nothing was written\n"


@pytest.fixture
def ctrl_c(monkeypatch):
    "Call it with a number n: Ctrl-C comes instead of the n-th step of the command, counted from 1 over all its fits."
    def at(n):
        step, taken = Trainer.step, []

        def interrupted(trainer):
            taken.append(1)
            if len(taken) == n:
                raise KeyboardInterrupt
            return step(trainer)

        monkeypatch.setattr(Trainer, "step", interrupted)

    return at


@pytest.mark.parametrize("command, said", [
    (["fit", "photo.png", "--steps", 9], "stopped after 4 of 9 steps; what there was is saved"),
    (["fit", "photo.png", "--seconds", 1000], "of 1000 s; what there was is saved"),
    (["fit", "photo.png", "--steps", 9, "--video", "film.gif"], "stopped after 4 of 9 steps; what there was is saved"),
    (["fit", "photo.png", "--steps", 9, "--target-psnr", 99], "stopped after 4 of 9 steps; what there was is saved"),
    (["train", "--steps", 9, "--height", 12, "--width", 12], "stopped after 4 of 9 steps; what there was is saved"),
])
def test_ctrl_c_is_exit_status_130(command, said, ctrl_c):
    picture()
    ctrl_c(5)
    done = gs2d_(*command, "--device", "cpu", "-q", "--out", "out")
    assert done.exit_code == 130 and said in done.stderr, done.output
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == (sorted([*COMPLETE, "fits"]) if "--target-psnr" in command else STOPPED)
    about = json.loads(Path("out/metrics.json").read_text())
    assert about["interrupted"] is True and about["steps"] == 4
    assert "--video" not in command or len(list(read_frames("film.gif"))) >= 2


def test_ctrl_c_in_a_search_keeps_the_best(monkeypatch):
    noise = torch.rand(16, 20, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((255 * noise).byte().numpy()).save("noise.png")
    monkeypatch.setattr("gs2d.search.SCOUT_LOSS", -3)  # the first whole fit has too many, so the search goes on
    run = gs2d.train.run

    def interrupted_after_a_good_one(trainer, *around, **options):
        result = run(trainer, *around, **options)
        if trainer.config.n_iterations == 120 and result.psnr >= 20:
            signal.raise_signal(signal.SIGINT)  # which comes after the last step, and still ends the search
        return result

    monkeypatch.setattr("gs2d.train.run", interrupted_after_a_good_one)
    done = gs2d_("fit", "noise.png", "--steps", 120, "--target-psnr", 20, "--device", "cpu", "--out", "out")
    assert done.exit_code == 130 and "stopped before the last fit; what there was is saved" in done.stderr, done.output
    about = json.loads(Path("out/metrics.json").read_text())
    assert about["psnr"] >= 20 and about["interrupted"] is True
    monkeypatch.setattr("gs2d.train.run", run)
    resumed = succeeds("fit", "--resume", "out")
    straight = succeeds("fit", "noise.png", "--steps", 120, "--target-psnr", 20, "--device", "cpu", "--out", "straight")
    assert Path("out/scene.json").read_bytes() == Path("straight/scene.json").read_bytes(), resumed.output + straight.output
    assert sorted(path.name for path in Path("out").iterdir()) == COMPLETE


@pytest.mark.parametrize("steps, kept", [(3, []), (10, ["a"]), (15, ["a", "b", "mean"])])
def test_ctrl_c_in_a_benchmark_says_what_is_written(steps, kept, ctrl_c):
    Path("pictures").mkdir()
    for name in "ab":
        picture(Path("pictures", f"{name}.png"))
    ctrl_c(steps)
    done = gs2d_("bench", "pictures", "--n-gaussians", 4, "--n-gaussians", 6, "--steps", 6, "--device", "cpu", "--out", "out")
    assert done.exit_code == 130, done.output
    if not kept:
        assert done.stderr.endswith("gs2d: stopped; nothing was written\n") and not Path("out").exists()
        return
    assert f"gs2d: stopped; {Path('out/bench.csv')} has the {len(kept)} rows that were finished\n" in done.stderr
    assert [path.name for path in Path("out").iterdir()] == ["bench.csv"]
    assert [line.split(",")[0] for line in Path("out/bench.csv").read_text().splitlines()] == ["picture", *kept]


def test_nothing_heavy_is_imported_for_help():
    light = {"io", "os", "re", "shutil", "hashlib", "interrupts", "runs", "sys", "tempfile", "collections", "contextlib", "datetime", "itertools", "pathlib", "typing", "typer", "checks", "commands", "shared", "fits", "scenes"}
    for module in (gs2d.cli, *(sys.modules[f"gs2d.commands.{name}"] for name in ("shared", "runs", "fits", "scenes"))):
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= light
            elif isinstance(node, ast.ImportFrom):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= light
