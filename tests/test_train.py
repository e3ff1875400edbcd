"""The training loop: what it promises about bytes, checkpoints, errors, and what it learns."""
import dataclasses
import json
import math
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gs2d.densify import DensifyConfig, ErrorGrowth
from gs2d.gaussians import PARAMETER_NAMES, Blend, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel, initialize_scene
from gs2d.io.checkpoints import keep_checkpoints
from gs2d.kernels import devices, operators
from gs2d.kernels.devices import resolve_device
from gs2d.loss import L1SSIMLoss, l1_loss, l2_loss, psnr, ssim
from gs2d.renderer import render
from gs2d.train import (
    FINAL_LR_FRACTION, LRSchedule, StepRecord, TimingStats, TrainConfig, Trainer, learning_rate,
    make_trainer, run, show_progress, train)

SMALL = TrainConfig(n_gaussians=8, height=32, width=40, n_iterations=12, device="cpu")
# Rounds after 3, 6 and 9 steps, with thresholds low enough that every round clones or splits something.
GROWING = DensifyConfig(every_n_steps=3, grad_threshold=1e-6, max_gaussians=60, stop_fraction=1.0)
BY_ERROR = ErrorGrowth(rounds=4, max_gaussians=60, stop_fraction=1.0)
PHOTO = TrainConfig(  # the recipe for photographs, small
    n_gaussians=60, n_iterations=60, lr_schedule="cooldown", init_level="content", loss="l1_ssim", growing_loss="l2",
    densify=ErrorGrowth(max_gaussians=60, rounds=16, growth=0.12, start_share=0.2), device="cpu",
    lr_scale={"log_scales": 5.0, "rotations": 4.0, "colors": 2.0, "means": 8.0})


def change(config=SMALL, **fields):
    return dataclasses.replace(config, **fields)


def new_trainer(config=SMALL, n=8, level=InitLevel.RANDOM):
    truth = GroundTruth.random(n, config.height, config.width, seed=1, blend=config.blend or Blend.WEIGHTED)
    return Trainer(truth, initialize_scene(truth, level, seed=2), config)


def bytes_of(scene):
    return [getattr(scene, name).detach().numpy().tobytes() for name in PARAMETER_NAMES]


def numbers_of(history):
    "Everything in the records except the time."
    return [record[:-1] for record in history]


def photograph(height=48, width=64, **look):
    "Something to fit of which no scene is known: slopes, an edge and a texture."
    y, x = np.mgrid[:height, :width]
    image = np.stack([x / width, y / height, (x > width / 2) * 0.5 + 0.5 * np.sin(y / 3) ** 2], -1)
    return GroundTruth.from_image(image, **look)


class Clock:
    "Stands for time.perf_counter: it moves only when told to, or by `tick` whenever it is read."

    def __init__(self, monkeypatch, tick=0.0):
        self.now, self.tick = 100.0, tick
        monkeypatch.setattr(time, "perf_counter", self)

    def __call__(self):
        self.now += self.tick
        return self.now

    def costs(self, seconds, loss=l2_loss):
        "A loss that takes so many seconds."
        def timed(image, target):
            self.now += seconds() if callable(seconds) else seconds
            return loss(image, target)
        return timed


# ── schedules ──


def test_schedules_start_at_lr_and_end_where_they_say():
    ends = {LRSchedule.COSINE: 0.0, LRSchedule.EXPONENTIAL: FINAL_LR_FRACTION, LRSchedule.COOLDOWN: 0.0,
            LRSchedule.CONSTANT: 1.0}
    assert set(ends) == set(LRSchedule)
    for schedule, end in ends.items():
        rates = [learning_rate(0.5, schedule, step / 100) for step in range(101)]
        assert rates[0] == 0.5
        assert rates[-1] == pytest.approx(0.5 * end)
        assert rates == sorted(rates, reverse=True)
        assert learning_rate(0.5, schedule, 2.5) == rates[-1], "past the end the rate stays"


def test_cooldown_holds_for_half_of_the_steps_and_falls_in_a_straight_line():
    rates = [learning_rate(1.0, LRSchedule.COOLDOWN, step / 100) for step in range(101)]
    assert rates[:51] == [1.0] * 51
    assert rates[50:] == pytest.approx([1 - step / 50 for step in range(51)])


def test_cosine_is_half_way_down_in_the_middle_and_exponential_falls_by_equal_factors():
    assert learning_rate(1.0, LRSchedule.COSINE, 0.5) == pytest.approx(0.5)
    rates = [learning_rate(1.0, "exponential", step / 10) for step in range(11)]
    factors = [b / a for a, b in zip(rates, rates[1:])]
    assert factors == pytest.approx([FINAL_LR_FRACTION**0.1] * 10)


# ── configuration ──


def test_the_defaults_and_their_order():
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    assert names == ["n_gaussians", "height", "width", "n_iterations", "lr", "lr_schedule", "lr_scale", "init_level",
                     "blend", "loss", "densify", "seed", "device", "compile", "seconds", "growing_loss"]
    config = TrainConfig()
    assert (config.n_gaussians, config.height, config.width) == (100, 256, 256)
    assert (config.n_iterations, config.lr) == (1000, 1e-2)
    assert config.loss == L1SSIMLoss() and config.densify is None and config.lr_scale == {}
    assert config.blend is None and config.seconds is None and config.growing_loss is None
    assert hash(config) == hash(TrainConfig()) and config == TrainConfig()


def test_strings_stand_for_enum_members():
    config = TrainConfig(lr_schedule="exponential", init_level="noisy", blend="over", loss="l2_loss")
    assert config.lr_schedule is LRSchedule.EXPONENTIAL and config.init_level is InitLevel.NOISY
    assert config.blend is Blend.OVER and config.loss is l2_loss


def test_losses_have_names():
    for name, loss in {"l1": l1_loss, "l2": l2_loss, "l1_ssim": L1SSIMLoss()}.items():
        config = TrainConfig(loss=name, growing_loss=name)
        assert config.loss == config.growing_loss == loss
        assert config == TrainConfig(loss=loss, growing_loss=loss)


@pytest.mark.parametrize("fields, error, words", [
    (dict(n_gaussians=0), ValueError, ["n_gaussians", "at least 1", "0"]),
    (dict(height=2.5), TypeError, ["height", "whole number", "2.5"]),
    (dict(width=True), TypeError, ["width", "True"]),
    (dict(n_iterations=-3), ValueError, ["n_iterations", "-3"]),
    (dict(lr=0), ValueError, ["lr", "above 0"]),
    (dict(lr=math.nan), ValueError, ["lr", "finite", "nan"]),
    (dict(lr="fast"), TypeError, ["lr", "number", "fast"]),
    (dict(lr_schedule="linear"), ValueError, ["lr_schedule", "'cosine'", "'linear'"]),
    (dict(lr_scale={"means": -1.0}), ValueError, ["lr_scale['means']", "at least 0", "-1"]),
    (dict(lr_scale=[1.0]), TypeError, ["lr_scale", "dict"]),
    (dict(init_level="perfect"), ValueError, ["init_level", "'exact'", "'perfect'"]),
    (dict(blend="multiply"), ValueError, ["blend", "'weighted'", "'multiply'"]),
    (dict(loss="huber"), ValueError, ["loss", "'huber'"]),
    (dict(loss=3), ValueError, ["loss", "3"]),
    (dict(densify=True), TypeError, ["densify", "DensifyConfig", "True"]),
    (dict(seed=-1), ValueError, ["seed", "-1"]),
    (dict(seed=2**63), ValueError, ["seed", str(2**63)]),
    (dict(seed=True), TypeError, ["seed", "whole number", "True"]),
    (dict(n_gaussians=np.True_), TypeError, ["n_gaussians", "whole number", "True"]),
    (dict(n_iterations=np.float64(3)), TypeError, ["n_iterations", "whole number", "3"]),
    (dict(lr=True), TypeError, ["lr", "number", "True"]),
    (dict(seconds=0), ValueError, ["seconds", "above 0", "0"]),
    (dict(seconds=math.inf), ValueError, ["seconds", "finite", "inf"]),
    (dict(seconds=True), TypeError, ["seconds", "number", "True"]),
    (dict(growing_loss="huber"), ValueError, ["loss", "'huber'"]),
    (dict(densify={"strategy": "guess"}), ValueError, ["strategy", "'error'", "'guess'"]),
    (dict(device="abacus"), ValueError, ["device", '"cpu"', "'abacus'"]),
    (dict(device="meta"), ValueError, ["device", "'meta'"]),
    (dict(device="cuda:99"), ValueError, ["device", "available", "cuda:99"]),
    (dict(compile="yes"), ValueError, ["compile", "auto", "'yes'"]),
])
def test_a_bad_field_says_what_was_expected_and_what_came(fields, error, words):
    with pytest.raises(error) as caught:
        TrainConfig(**fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_names_in_lr_scale_are_those_of_the_scene():
    with pytest.raises(ValueError, match="lr_scale: expected one of 'means', .*got 'mean'"):
        new_trainer(change(lr_scale={"mean": 1.0}))
    trainer = new_trainer()
    with pytest.raises(ValueError, match="lr_scale: expected one of 'means', .*got 'mean'"):
        trainer.update(lr_scale={"mean": 1.0})
    assert trainer.config == SMALL


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_numbers_are_numbers(integer):
    values = dict(n_gaussians=8, height=32, width=40, n_iterations=12, seed=3)
    numbers = {name: integer(value) for name, value in values.items()}
    config = TrainConfig(**numbers, lr=np.float32(0.5), seconds=np.float64(2.5), device="cpu")
    assert config == change(seed=3, lr=0.5, seconds=2.5) and hash(config) == hash(change(seed=3, lr=0.5, seconds=2.5))
    assert all(type(getattr(config, name)) is int for name in numbers)
    assert type(config.lr) is type(config.seconds) is float
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", [
    TrainConfig(lr_scale={"colors": 2, "means": 0}, loss=L1SSIMLoss(0.8, 0.2), densify=GROWING, blend="additive",
                compile=False),
    TrainConfig(densify=BY_ERROR, growing_loss=L1SSIMLoss(0.5, 0.5), loss="l1", seconds=3, seed=2**63 - 1), PHOTO])
def test_config_goes_through_json_and_back(config):
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.densify == config.densify and type(again.densify) is type(config.densify)
    assert again.growing_loss == config.growing_loss and again.to_dict() == config.to_dict()
    assert TrainConfig.from_dict({}) == TrainConfig()
    for function in (l1_loss, l2_loss):
        assert TrainConfig.from_dict(TrainConfig(loss=function).to_dict()).loss is function


def test_a_loss_without_a_name_cannot_be_written_down():
    with pytest.raises(TypeError, match="loss: expected an L1SSIMLoss, l1_loss or l2_loss"):
        TrainConfig(loss=lambda image, target: (image - target).abs().max()).to_dict()
    with pytest.raises(ValueError, match="'lrr'"):
        TrainConfig.from_dict({"lrr": 1})


def test_config_does_not_share_its_dict_with_the_caller():
    scale = {"means": 1.0}
    config = TrainConfig(lr_scale=scale)
    scale["means"] = 7.0
    assert config.lr_scale == {"means": 1.0}


def test_auto_takes_the_device_with_kernels_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_told", set())
    monkeypatch.setattr(operators, "KERNELS", {"cpu": operators.KERNELS["cpu"]})
    monkeypatch.setattr(operators, "_registered", {})
    for _ in range(3):
        assert resolve_device("auto") == resolve_device() == torch.device("cpu")
        assert new_trainer(change(device="auto")).device == torch.device("cpu")
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert all(word in told.err for word in ("cpu", 'device="cuda"', "kernels"))
    resolve_device("cuda"), resolve_device("cpu")
    assert capsys.readouterr().err == "", "who names a device is told nothing"


def test_auto_takes_a_device_whose_kernels_somebody_registered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(operators, "_registered", {"cuda": operators.kernels_of("cpu"), "cpu": operators.Kernels()})
    assert resolve_device("auto").type == "cuda"


def test_a_longer_run_repeats_no_round_of_growth():
    trainer = new_trainer(change(densify=ErrorGrowth(rounds=3, max_gaussians=500, stop_fraction=0.5), n_iterations=20))
    list(trainer)
    grown = len(trainer.scene)
    trainer.update(n_iterations=60)
    list(trainer)
    assert len(trainer.scene) == grown and len(trainer.history) == 60


def test_auto_takes_the_best_device_there_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_told", set())
    monkeypatch.setattr(operators, "KERNELS", dict.fromkeys(("cuda", "mps", "cpu"), "some.kernels"))
    monkeypatch.setattr(operators, "_registered", {})
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="available here .cuda:0, mps, cpu., got 'cuda:1'"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") == resolve_device("cpu")
    assert capsys.readouterr().err == "", "nothing is passed over"
    with pytest.raises(ValueError, match="available here .cpu., got 'cuda'"):
        resolve_device("cuda")


# ── the loop ──


def test_trainer_is_the_plain_loop():
    trainer = new_trainer(change(loss=l2_loss))
    truth, scene = trainer.ground_truth, trainer.scene.clone()
    groups = [dict(params=[getattr(scene, name)]) for name in PARAMETER_NAMES]
    adam = torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-15, fused=True)
    for step in range(12):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 12)) / 2
        adam.zero_grad()
        image = render(scene, 32, 40)
        loss = l2_loss(image, truth.image)
        loss.backward()
        adam.step()
        record = trainer.step()
        assert (record.step, record.loss, record.n_gaussians) == (step, loss.item(), 8)
        assert record.psnr == pytest.approx(psnr(image, truth.image).item(), rel=1e-5)  # float32 sums, another order
    assert bytes_of(scene) == bytes_of(trainer.scene)


def test_iterating_stops_at_the_end_and_goes_on_when_there_is_more():
    trainer = new_trainer()
    first = [record.step for _, record in zip(range(5), trainer)]
    rest = [record.step for record in trainer]
    assert first + rest == list(range(12)), first + rest
    assert list(trainer) == [] and trainer.steps_done == 12
    trainer.update(n_iterations=14)
    assert [record.step for record in trainer] == [12, 13]


def test_the_trainer_works_on_a_copy_and_so_does_the_result():
    truth = GroundTruth.random(4, 24, 24)
    start = initialize_scene(truth, InitLevel.RANDOM, seed=3)
    before = bytes_of(start)
    trainer = Trainer(truth, start, change(height=7, width=9))
    trainer.step()
    result = trainer.result()
    reached = bytes_of(result.scene)
    trainer.step()
    assert bytes_of(start) == before != reached
    assert bytes_of(result.scene) == reached and len(result.history) == 1
    assert (trainer.config.height, trainer.config.width) == (24, 24), "the ground truth's size counts"


def test_result_measures_the_final_scene():
    trainer = new_trainer()
    result = run(trainer, progress=False)
    truth = result.ground_truth
    image = render(result.scene, 32, 40).detach()
    torch.testing.assert_close(result.image, image, rtol=0, atol=0)
    assert result.psnr == psnr(image, truth.image).item()
    assert result.ssim == ssim(image.clamp(0, 1), truth.image).item()
    assert result.psnr > result.history[0].psnr
    assert result.config == trainer.config and [r.step for r in result.history] == list(range(12))


def test_timing():
    history = [StepRecord(i, 0.0, 0.0, 0.0, 1, ms) for i, ms in enumerate((2.0, 4.0, 6.0))]
    timing = TimingStats.from_history(history)
    assert timing == TimingStats(total_s=0.012, mean_ms=4.0, min_ms=2.0, max_ms=6.0, steps_per_sec=250.0)
    for part in ("0.01 s", "250.0 steps/s", "4.00 ms", "2.00 to 6.00"):
        assert part in timing.summary()
    assert TimingStats.from_history([]) == TimingStats()
    measured = run(new_trainer(), progress=False).timing
    assert 0 < measured.min_ms <= measured.mean_ms <= measured.max_ms
    assert measured.total_s == pytest.approx(12 * measured.mean_ms / 1000)


@pytest.mark.parametrize("frozen", PARAMETER_NAMES)
def test_a_factor_of_zero_freezes_every_byte(frozen):
    trainer = new_trainer(change(lr_scale={frozen: 0}))
    before = dict(zip(PARAMETER_NAMES, bytes_of(trainer.scene)))
    run(trainer, progress=False)
    after = dict(zip(PARAMETER_NAMES, bytes_of(trainer.scene)))
    assert [name for name in PARAMETER_NAMES if before[name] == after[name]] == [frozen]


def test_an_update_acts_at_the_next_step():
    trainer = new_trainer()
    assert trainer.step().lr == 1e-2
    trainer.update(lr=3e-3, lr_schedule="constant", loss=l1_loss, lr_scale={"means": 0})
    means = trainer.scene.means.detach().clone()
    with torch.no_grad():
        expected = l1_loss(render(trainer.scene, 32, 40), trainer.ground_truth.image).item()
    record = trainer.step()
    assert (record.lr, record.loss) == (3e-3, expected)
    assert torch.equal(trainer.scene.means, means)
    trainer.update(densify=GROWING)
    assert trainer.step().n_gaussians > 8


@pytest.mark.parametrize("fields", [
    dict(n_gaussians=9), dict(seed=1), dict(device="cpu"), dict(height=8), dict(init_level="exact")])
def test_an_update_refuses_what_needs_a_new_trainer(fields):
    trainer = new_trainer()
    with pytest.raises(ValueError, match=f"new Trainer is needed for {next(iter(fields))}"):
        trainer.update(**fields)
    with pytest.raises(ValueError, match="lr: expected"):
        trainer.update(lr=-1)
    assert trainer.config == SMALL


def test_channels_must_match():
    truth = GroundTruth.random(3, 16, 16)
    grey = Gaussians2D.from_values(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1), torch.ones(1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="3 channels.*got 1"):
        Trainer(truth, grey, SMALL)


def test_densification_grows_the_scene_up_to_the_cap():
    trainer = new_trainer(change(densify=GROWING))
    counts = [record.n_gaussians for record in trainer]
    assert counts[:2] == [8, 8] and counts[2] > 8, "the first round is after three steps"
    assert counts == sorted(counts) and counts[-1] <= 60
    assert len(trainer.scene) == counts[-1]
    assert all(len(group["params"][0]) == counts[-1] for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("blend", Blend)
def test_every_blend_trains(blend):
    result = train(change(blend=blend, n_iterations=40), progress=False)
    assert result.history[-1].loss < 0.8 * result.history[0].loss


# ── bytes ──


def test_the_same_configuration_gives_the_same_bytes():
    config = change(densify=BY_ERROR)
    first, second = train(config, progress=False), train(config, progress=False)
    assert bytes_of(first.scene) == bytes_of(second.scene)
    assert numbers_of(first.history) == numbers_of(second.history)
    other = train(change(config, seed=1), progress=False)
    assert bytes_of(other.scene) != bytes_of(first.scene)


def test_the_number_of_threads_does_not_matter():
    config = change(height=112, width=128, n_iterations=5)  # torch shares a sum out from 2¹⁵ numbers on
    before, outcomes = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            result = train(config, progress=False)
            outcomes.append((numbers_of(result.history), bytes_of(result.scene)))
    finally:
        torch.set_num_threads(before)
    assert outcomes[0] == outcomes[1]


def test_random_does_not_start_at_the_truth():
    result = train(change(n_iterations=1), progress=False)
    assert result.history[0].psnr < 25
    assert not torch.allclose(result.scene.means, result.ground_truth.scene.means, atol=0.5)


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("recipe", [
    dict(densify=GROWING), dict(densify=BY_ERROR), dict(densify=GROWING, growing_loss=l1_loss),
    dict(densify=dataclasses.replace(BY_ERROR, stop_fraction=0.6), growing_loss=l2_loss, lr_schedule="cooldown")],
    ids=["gradient", "error", "gradient-growing-loss", "error-growing-loss"])
@pytest.mark.parametrize("stop_at", [0, 5, 6])
def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path, recipe, blend, stop_at):
    config = change(blend=blend, **recipe)
    never_stopped, stopped = new_trainer(config), new_trainer(config)
    run(never_stopped, progress=False)
    for _ in range(stop_at):
        stopped.step()
    resumed = Trainer.load(stopped.save(tmp_path / "run.safetensors"))
    assert resumed.steps_done == stop_at and resumed.config == config
    assert resumed.history == stopped.history, "the times too"
    run(resumed, progress=False)
    assert len(resumed.scene) > 8, "the test means nothing without a round after the checkpoint"
    assert bytes_of(resumed.scene) == bytes_of(never_stopped.scene)
    assert numbers_of(resumed.history) == numbers_of(never_stopped.history)


def test_a_checkpoint_brings_the_ground_truth_along(tmp_path):
    truth = GroundTruth.random(5, 20, 30, seed=4, blend="over", background=(0.1, 0.2, 0.3))
    trainer = Trainer(truth, initialize_scene(truth, "noisy"), change(blend="over"))
    loaded = Trainer.load(trainer.save(tmp_path / "new.safetensors"), device="cpu").ground_truth
    assert torch.equal(loaded.image, truth.image) and bytes_of(loaded.scene) == bytes_of(truth.scene)
    assert (loaded.blend, loaded.background, loaded.domain) == (truth.blend, truth.background, truth.domain)
    assert (loaded.scene.blend, loaded.scene.background) == (truth.blend, truth.background)
    photo = GroundTruth(truth.image, None, truth.domain)
    trainer = Trainer(photo, initialize_scene(photo, "content", 6), SMALL)
    trainer.step()
    assert Trainer.load(trainer.save(tmp_path / "new.safetensors")).ground_truth.scene is None


def test_a_checkpoint_is_tensors_and_json(tmp_path):
    path = new_trainer().save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gs2d-checkpoint"])
        expected = {"scene.means", "truth.image", "truth.scene.colors", "densification.generator", "history"}
        assert expected <= set(file.keys())
    assert about["config"]["lr"] == 1e-2 and about["steps_done"] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"], "nothing temporary is left"


def test_what_is_not_a_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        Trainer.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        Trainer.load(tmp_path / "text.safetensors")
    whole = new_trainer().save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a checkpoint"):
        Trainer.load(tmp_path / "half.safetensors")
    from safetensors.torch import save_file
    old = {"gs2d-checkpoint": json.dumps({"format": "gs2d-checkpoint", "version": 1})}
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", old)
    with pytest.raises(ValueError, match="gs2d-checkpoint version 3 or 4, got gs2d-checkpoint version 1"):
        Trainer.load(tmp_path / "old.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="gs2d-checkpoint version 3"):
        Trainer.load(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="loss"):
        new_trainer(change(loss=lambda a, b: (a - b).abs().mean())).save(tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()


def test_a_checkpoint_remembers_the_recipe_for_photographs(tmp_path):
    truth, path = photograph(), tmp_path / "run.safetensors"
    never_stopped, stopped = (make_trainer(PHOTO, ground_truth=truth) for _ in range(2))
    run(never_stopped, progress=False)
    for _ in range(20):
        stopped.step()
    resumed = Trainer.load(stopped.save(path))
    assert resumed.loss == l2_loss and resumed.config == stopped.config
    result, expected = run(resumed, progress=False), never_stopped.result()
    assert bytes_of(result.scene) == bytes_of(expected.scene) and result.ssim == expected.ssim
    assert numbers_of(result.history) == numbers_of(expected.history)
    assert result.history[-1].n_gaussians == 60 > result.history[0].n_gaussians
    assert resumed.loss == L1SSIMLoss()


def test_the_loss_while_growing_gives_way_at_the_stop():
    growth = dataclasses.replace(BY_ERROR, stop_fraction=0.5)
    trainer = new_trainer(change(loss=l1_loss, growing_loss=l2_loss, densify=growth))
    for step in range(12):
        loss = trainer.loss
        assert loss is (l2_loss if step < 6 else l1_loss)
        with torch.no_grad():
            expected = loss(render(trainer.scene, 32, 40), trainer.target).item()
        assert trainer.step().loss == expected
    assert new_trainer(change(loss=l1_loss, growing_loss=l2_loss)).loss is l1_loss, "what does not grow never grows"


def rounds_taken(trainer):
    "Steps, from 0, after which there were more Gaussians than before."
    counts = [len(trainer.scene)] if not trainer.history else [record.n_gaussians for record in trainer.history]
    return [step for step in range(1, len(counts)) if counts[step] > counts[step - 1]]


def test_a_clock_drives_progress_rate_and_end(monkeypatch):
    clock = Clock(monkeypatch)
    trainer = new_trainer(change(loss=clock.costs(0.5), seconds=4.0, lr_schedule="cooldown", n_iterations=3))
    assert trainer.progress == 0
    records = list(trainer)
    assert len(records) == 9, "the first step is free"
    expected = [learning_rate(1e-2, "cooldown", max(0, step - 1) / 8) for step in range(9)]
    assert [record.lr for record in records] == pytest.approx(expected)
    assert trainer.progress == 1 and trainer.seconds_spent == 4.0 and trainer.expected_steps == 9
    assert not trainer.result().interrupted
    trainer.update(seconds=5.0)
    assert trainer.progress == 0.8 and trainer.result().interrupted and len(list(trainer)) == 2


def test_expected_steps_follow_the_clock(monkeypatch):
    clock = Clock(monkeypatch)
    trainer = new_trainer(change(loss=clock.costs(0.5), seconds=8.0))
    expected = []
    for _ in range(9):
        trainer.step()
        expected.append(trainer.expected_steps)
    assert trainer.progress == 0.5 and expected[-1] == 18
    assert all(steps > n for n, steps in enumerate(expected, 1))
    assert new_trainer().expected_steps == 12


@pytest.mark.parametrize("recipe", [
    dict(densify=GROWING),
    dict(densify=ErrorGrowth(rounds=6, growth=0.25, max_gaussians=60, stop_fraction=0.8), growing_loss=l1_loss)],
    ids=["gradient", "error"])
@pytest.mark.parametrize("stop_at", [0, 1, 4, 7, 8])
def test_a_timed_trainer_resumes_its_clock(tmp_path, monkeypatch, recipe, stop_at):
    clock = Clock(monkeypatch)

    def timed():
        return costing(new_trainer(change(seconds=6.0, loss="l2", **recipe)))

    def costing(trainer):  # half a second a step; not told by the loss, whose name goes into the checkpoint
        draw = trainer._render

        def slow(*args):
            clock.now += 0.5
            return draw(*args)

        trainer._render = slow
        return trainer

    never_stopped, stopped = timed(), timed()
    for _ in range(stop_at):
        stopped.step()
    clock.now += 1000  # the night in between does not count
    resumed = Trainer.load(stopped.save(tmp_path / "run.safetensors"))
    assert resumed.progress == stopped.progress and resumed.seconds_spent == stopped.seconds_spent
    assert resumed.config == stopped.config and resumed.loss == stopped.loss
    assert resumed.expected_steps == stopped.expected_steps and len(resumed.scene) == len(stopped.scene)
    run(costing(resumed), progress=False)
    run(stopped, progress=False)
    run(never_stopped, progress=False)
    assert bytes_of(stopped.scene) == bytes_of(never_stopped.scene), "this clock knows no chance"
    # the resumed one has one free step more, its first: one place on the clock comes twice, and no round with it
    free = stop_at > 0
    assert resumed.steps_done == never_stopped.steps_done + free and resumed.seconds_spent == 6.0
    if isinstance(resumed.config.densify, ErrorGrowth):
        assert len(rounds_taken(resumed)) == len(rounds_taken(never_stopped)) == 6
        assert len(resumed.scene) == len(never_stopped.scene) == 35  # 8, 10, 13, 17, 22, 28, 35
    if not free:
        assert bytes_of(resumed.scene) == bytes_of(never_stopped.scene)


def growth_that_counts(clock, seconds, log):
    "An ErrorGrowth that takes time, and writes down its rounds."
    class Slow(ErrorGrowth):
        def next_rows(self, scene, state, keep, rounds=1):
            clock.now += seconds
            log.append(rounds)
            return super().next_rows(scene, state, keep, rounds)

    return Slow(rounds=8, max_gaussians=60, growth=0.2, stop_fraction=0.8)


@pytest.mark.parametrize("step_s, growth_s", [(0.1, 0.0), (0.1, 0.3), (0.7, 0.0), (0.7, 0.7), (3.0, 2.0)])
def test_on_a_clock_no_round_is_lost_and_none_comes_twice(monkeypatch, step_s, growth_s):
    clock, log = Clock(monkeypatch), []
    config = change(seconds=8.0, loss=clock.costs(step_s), densify=growth_that_counts(clock, growth_s, log))
    trainer = new_trainer(config)
    run(trainer, progress=False)
    assert sum(log) == 8, log
    spent = sum(record.step_ms for record in trainer.history[1:]) / 1000
    assert trainer.seconds_spent == pytest.approx(spent), "growing takes time too"


@pytest.mark.parametrize("background", [None, (0.2, 0.4, 0.6)])
@pytest.mark.parametrize("blend", Blend)
def test_exact_starts_at_zero_loss_however_the_ground_truth_is_blended(blend, background, tmp_path):
    look = dict(blend=blend) if background is None else dict(blend=blend, background=background)
    truth = GroundTruth.random(20, 64, 64, **look)
    config = TrainConfig(n_gaussians=20, init_level=InitLevel.EXACT, n_iterations=1, device="cpu")
    trainer = make_trainer(config, ground_truth=truth)
    assert (trainer.scene.blend, trainer.scene.background) == (blend, background or (0.0, 0.0, 0.0))
    result = train(config, ground_truth=truth, progress=False)
    assert result.history[0].loss < 1e-5
    assert (result.scene.blend, result.scene.background) == (blend, background or (0.0, 0.0, 0.0))
    again = Gaussians2D.load(result.scene.save(tmp_path / "scene.json"))
    assert (again.blend, again.background) == (blend, background or (0.0, 0.0, 0.0))
    torch.testing.assert_close(render(again, 64, 64), result.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.render(64, 64), render(again, 64, 64, blend, background), rtol=0, atol=1e-5)
    assert result.render(10, 20).shape == (10, 20, 3) and not result.render(10, 20).requires_grad
    assert result.to_pil().size == (64, 64)


def test_the_blend_of_a_configuration_overrides(tmp_path):
    truth = GroundTruth.random(20, 64, 64, blend=Blend.ADDITIVE, background=(0.1, 0.2, 0.3))
    config = TrainConfig(n_gaussians=20, init_level="exact", blend="over", n_iterations=2, device="cpu")
    trainer = make_trainer(config, ground_truth=truth)
    assert trainer.ground_truth.blend is Blend.ADDITIVE and trainer.scene.blend is Blend.OVER
    assert trainer.scene.background == truth.background
    trainer.step()
    expected = render(truth.scene, 64, 64, "over", truth.background)
    assert torch.equal(trainer.image, expected.detach())
    loaded = Trainer.load(trainer.save(tmp_path / "x.safetensors"))
    assert loaded.scene.blend is Blend.OVER and loaded.ground_truth.blend is Blend.ADDITIVE
    trainer.update(blend=None)
    assert trainer.scene.blend is Blend.ADDITIVE
    assert train(change(blend="over", n_iterations=1), progress=False).ground_truth.blend is Blend.OVER


LOADER = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    result = pickle.load(file)
numbers = [result.psnr, result.ssim, len(result.scene), result.interrupted, result.scene.blend.value]
with open(sys.argv[2], "wb") as file:
    pickle.dump((numbers, result), file)
"""


@pytest.mark.parametrize("looked_at", [False, True])
def test_results_go_from_one_process_to_another(tmp_path, looked_at):
    config = change(blend="over", densify=BY_ERROR, growing_loss=l1_loss, n_iterations=4)
    result = train(config, progress=False)
    if looked_at:  # then it carries its picture and its scores along
        assert math.isfinite(result.psnr + result.ssim)
    (tmp_path / "in").write_bytes(pickle.dumps(result))
    command = [sys.executable, "-c", LOADER, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=120)
    there, back = pickle.loads((tmp_path / "out").read_bytes())
    assert there == [result.psnr, result.ssim, len(result.scene), False, "over"]
    assert bytes_of(back.scene) == bytes_of(result.scene) and back.psnr == result.psnr
    assert (back.scene.blend, back.scene.background) == (result.scene.blend, result.scene.background)
    assert (back.history, back.timing, back.config) == (result.history, result.timing, result.config)
    assert torch.equal(back.image, result.image) and torch.equal(back.ground_truth.image, result.ground_truth.image)


# ── when things go wrong ──


def stops_at(step, action):
    "A loss that calls `action` at that step, and is l2_loss before."
    calls = []

    def loss(image, target):
        calls.append(None)
        return action(image) if len(calls) > step else l2_loss(image, target)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_advice(value):
    trainer = new_trainer(change(loss=stops_at(3, lambda image: image.mean() * value)))
    words = rf"step 3: .*got a loss of {value}\. .*smaller learning rate than lr=0.01"
    with pytest.raises(FloatingPointError, match=words):
        run(trainer, progress=False)
    result = trainer.result()
    assert len(result.history) == 3 and math.isfinite(result.psnr)
    assert all(parameter.isfinite().all() for parameter in result.scene.parameters())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_scene():
    # sqrt(0) is a fine value with an infinite slope, and 0 · inf is NaN
    trainer = new_trainer(change(loss=stops_at(2, lambda image: (image * 0).abs().sum().sqrt() + image.mean())))
    with pytest.raises(FloatingPointError, match="step 2: .* with a gradient that is not"):
        run(trainer, progress=False)
    assert all(parameter.isfinite().all() for parameter in trainer.scene.parameters())


@pytest.mark.parametrize("slope", [1e38, -1e38])
def test_finite_gradients_whose_sum_overflows_are_finite(slope):
    def steep(image, target):
        colors = trainer.scene.colors
        return l2_loss(image, target) + slope * (colors - colors.detach()).sum()  # adds 0, with these slopes

    trainer = new_trainer(change(loss=steep))
    record = trainer.step()
    gradient = trainer.scene.colors.grad
    assert gradient.isfinite().all() and not gradient.sum().isfinite() and gradient.abs().max() == pytest.approx(1e38)
    assert math.isfinite(record.loss) and trainer.steps_done == 1
    assert all(parameter.isfinite().all() for parameter in trainer.scene.parameters())


@pytest.mark.parametrize("name", PARAMETER_NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_in_one_gradient_is_enough(name, value):
    trainer = new_trainer()
    before = bytes_of(trainer.scene)

    def poison(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = value
        return gradient

    getattr(trainer.scene, name).register_hook(poison)
    with pytest.raises(FloatingPointError, match="step 0: .* with a gradient that is not"):
        trainer.step()
    assert bytes_of(trainer.scene) == before and trainer.history == [] and trainer.steps_done == 0


def interrupt(image):
    raise KeyboardInterrupt


def test_an_interrupt_gives_what_was_reached(capsys):
    trainer = new_trainer(change(loss=stops_at(4, interrupt)))
    result = run(trainer, progress=True)
    assert result.interrupted and "interrupted" in repr(result)
    assert len(result.history) == 4 and math.isfinite(result.psnr)
    captured = capsys.readouterr()
    assert captured.out == "" and "interrupted after 4 of 12 steps" in captured.err
    trainer.update(loss=l2_loss)
    finished = run(trainer, progress=False)
    assert not finished.interrupted and "interrupted" not in repr(finished) and len(finished.history) == 12


def test_an_interrupt_in_the_first_step_gives_the_start():
    trainer = new_trainer(change(loss=stops_at(0, interrupt)))
    before = bytes_of(trainer.scene)
    result = run(trainer, progress=False)
    assert result.interrupted and result.history == [] and bytes_of(result.scene) == before
    assert result.timing == TimingStats() and math.isfinite(result.psnr)


# ── wrappers ──


def watcher(log, name, fails_at=None, error=KeyboardInterrupt):
    "A wrapper that writes down what it sees, and when it is closed."
    def watch(trainer, records):
        log.append((name, "opened"))
        try:
            for record in records:
                assert record is trainer.history[-1] and trainer.steps_done == record.step + 1
                log.append((name, record.step))
                if record.step == fails_at:
                    raise error("stop")
                yield record
        finally:
            log.append((name, "closed"))

    return watch


def seen_by(log, name):
    return [what for who, what in log if who == name]


def test_wrappers_see_every_record_in_their_order():
    log = []
    result = run(new_trainer(change(n_iterations=3)), watcher(log, "a"), watcher(log, "b"), progress=False)
    assert not result.interrupted and len(result.history) == 3
    for name in "ab":
        assert seen_by(log, name) == ["opened", 0, 1, 2, "closed"]
    assert [who for who, what in log if what in (0, 1, 2)] == ["a", "b"] * 3, "the first one stands next to the trainer"


def test_wrappers_change_nothing(tmp_path):
    plain = train(change(densify=GROWING), progress=False)
    trainer = make_trainer(change(densify=GROWING))
    watched = run(trainer, keep_checkpoints(tmp_path / "x.safetensors", 5), watcher([], "a"), progress=True)
    assert bytes_of(plain.scene) == bytes_of(watched.scene)
    assert numbers_of(plain.history) == numbers_of(watched.history)


def test_wrappers_are_closed_after_an_interrupt_of_a_step():
    log, trainer = [], new_trainer(change(loss=stops_at(2, interrupt)))
    result = run(trainer, watcher(log, "a"), watcher(log, "b"), progress=False)
    assert result.interrupted and len(result.history) == 2
    for name in "ab":
        assert seen_by(log, name) == ["opened", 0, 1, "closed"]


def test_wrappers_are_closed_after_an_error_of_a_step():
    log, trainer = [], new_trainer(change(loss=stops_at(2, lambda image: image.mean() * math.nan)))
    with pytest.raises(FloatingPointError):
        run(trainer, watcher(log, "a"), watcher(log, "b"), progress=True)
    for name in "ab":
        assert seen_by(log, name) == ["opened", 0, 1, "closed"]


@pytest.mark.parametrize("failing", "ab")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_wrappers_are_closed_after_an_interrupt_or_error_of_one_of_them(failing, error):
    log, trainer = [], new_trainer()
    around = [watcher(log, name, 2 if name == failing else None, error) for name in "ab"]
    if error is OSError:
        with pytest.raises(OSError, match="stop"):
            run(trainer, *around, progress=False)
    else:
        assert run(trainer, *around, progress=False).interrupted
    for name in "ab":
        assert seen_by(log, name)[-1] == "closed" and seen_by(log, name).count("closed") == 1
    assert trainer.steps_done == 3 and len(trainer.result().history) == 3
    assert [record.step for record in trainer] == list(range(3, 12)), "the trainer itself can go on"


def test_wrappers_are_closed_when_a_later_one_cannot_begin():
    log = []

    def broken(trainer, records):
        next(records)
        raise OSError("no room for a film")

    with pytest.raises(OSError, match="no room"):
        run(new_trainer(), watcher(log, "a"), lambda trainer, records: broken(trainer, records), progress=False)
    assert seen_by(log, "a") == ["opened", 0, "closed"]


def test_a_wrapper_may_end_the_run():
    def first_five(trainer, records):
        for record in records:
            yield record
            if record.step == 4:
                return

    log = []
    result = run(new_trainer(), watcher(log, "a"), first_five, progress=False)
    assert result.interrupted and len(result.history) == 5
    assert seen_by(log, "a") == ["opened", 0, 1, 2, 3, 4, "closed"]


@pytest.mark.parametrize("stopped_by", ["interrupt", "error"])
def test_keep_checkpoints_leaves_one_that_resumes_to_the_same_bytes(tmp_path, stopped_by):
    config, path = change(densify=BY_ERROR, loss="l2"), tmp_path / "run.safetensors"
    never_stopped = run(new_trainer(config), progress=False)
    error = KeyboardInterrupt if stopped_by == "interrupt" else OSError
    trainer = new_trainer(config)
    around = [keep_checkpoints(path, 4), watcher([], "a", fails_at=9, error=error)]
    if stopped_by == "interrupt":
        assert run(trainer, *around, progress=False).interrupted
    else:
        with pytest.raises(OSError):
            run(trainer, *around, progress=False)
    assert trainer.steps_done == 10
    resumed = Trainer.load(path)
    assert resumed.steps_done == 8, "of the steps 4, 8 and 12"
    result = run(resumed, keep_checkpoints(path, np.int64(100)), progress=False)
    assert not result.interrupted and bytes_of(result.scene) == bytes_of(never_stopped.scene)
    assert numbers_of(result.history) == numbers_of(never_stopped.history)
    last = Trainer.load(path)
    assert last.steps_done == 12 and bytes_of(last.scene) == bytes_of(result.scene), "one at the end too"
    with pytest.raises(ValueError, match="every_n_steps"):
        keep_checkpoints(path, 0)


def test_show_progress_is_a_wrapper_like_others(capsys):
    run(new_trainer(), show_progress, progress=False)
    assert "12/12" in capsys.readouterr().err


def test_progress_goes_to_stderr_and_says_what_a_learner_wants_to_know(capsys):
    train(change(n_iterations=20), progress=True)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.strip().startswith("step ")]
    assert captured.out == "" and len(lines) == 10
    for words in ("20/20", "loss", "PSNR", "dB", "lr", "8 Gaussians", "ms/step"):
        assert words in lines[-1]
    train(SMALL, progress=False)
    assert capsys.readouterr().err == ""


# ── what it learns ──


def test_exact_starts_at_zero_loss_and_the_levels_end_in_order():
    def final(level, seed):
        config = TrainConfig(
            n_gaussians=12, height=48, width=48, n_iterations=200, init_level=level, seed=seed, device="cpu")
        result = train(config, progress=False)
        if level is InitLevel.EXACT:
            assert result.history[0].loss < 1e-5
        return result.psnr

    levels = [InitLevel.EXACT, InitLevel.NOISY, InitLevel.POSITIONS_ONLY, InitLevel.RANDOM]
    means = [sum(final(level, seed) for seed in range(3)) / 3 for level in levels]
    assert means == sorted(means, reverse=True), means
    assert means[1] > 40, "40 dB is an error of a hundredth of full scale"


def test_the_call_people_make(tmp_path):
    config = TrainConfig(
        n_gaussians=20, height=64, width=64, n_iterations=30, lr=1e-2, lr_schedule=LRSchedule.COSINE,
        init_level=InitLevel.RANDOM, densify=DensifyConfig(every_n_steps=10, max_gaussians=500))
    result = train(config, progress=False)
    assert "ms a step" in result.timing.summary() and result.timing.steps_per_sec > 0
    assert result.ground_truth.save(tmp_path / "ground_truth.png").stat().st_size > 0


def test_compile_is_for_cuda_unless_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr("gs2d.kernels.operators.available", lambda device, dtype: frozenset())
    new_trainer(), new_trainer(change(compile=False))
    assert compiled == []
    new_trainer(change(compile=True)).step()
    (function,) = compiled
    assert (function.func, function.args, function.keywords) == (render, (), dict(backend="reference"))


def test_a_step_taken_back_can_be_saved_and_goes_on(tmp_path):
    for lr in (1e30, 1000.0, 50.0):
        trainer = new_trainer(change(lr=lr))
        with pytest.raises(FloatingPointError, match="before the last update"):
            list(trainer)
        result = trainer.result()
        assert all(parameter.isfinite().all() for parameter in result.scene.parameters())
        result.save(tmp_path / "results")
        again = Trainer.load(trainer.save(tmp_path / "run.safetensors"))
        for one in (trainer, again):
            one.update(lr=0.01)
            list(one)
            assert one.progress == 1 and one.result().psnr > result.psnr - 3


def test_a_loss_of_ones_own_is_called_before_the_run_and_not_in_the_middle():
    growing = ErrorGrowth(max_gaussians=8)
    for wrong in (lambda image, target: 1.0, lambda image, target: (image - target).abs()):
        with pytest.raises(TypeError, match="loss: expected a function of two pictures whose value is a scalar tensor"):
            new_trainer(change(loss=wrong, growing_loss=l2_loss, densify=growing))
    trainer = new_trainer(change(growing_loss=l2_loss, densify=growing))
    with pytest.raises(ZeroDivisionError):
        trainer.update(loss=lambda image, target: 1 / 0)
    assert len(list(trainer)) == trainer.config.n_iterations  # it goes on as it was


def test_a_growth_that_fails_leaves_a_whole_trainer(tmp_path, monkeypatch):
    trainer = new_trainer(change(densify=BY_ERROR))

    def no_room(*arguments, **options):
        raise MemoryError("about 10 would fit")

    with monkeypatch.context() as patch:
        patch.setattr("gs2d.densify.check_growth", no_room)
        with pytest.raises(MemoryError):
            list(trainer)
    assert len(trainer.history) == trainer.steps_done > 0
    again = Trainer.load(trainer.save(tmp_path / "run.safetensors"))
    list(again)
    assert again.progress == 1
