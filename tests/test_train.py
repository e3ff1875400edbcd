"""The training loop: what it promises about bytes, checkpoints, errors, and what it learns."""
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open

from gs2d.densify import DensifyConfig
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel, initialize_scene
from gs2d.loss import L1SSIMLoss, l1_loss, l2_loss, psnr, ssim
from gs2d.renderer import Blend, render
from gs2d.train import (
    FINAL_LR_FRACTION, LRSchedule, StepRecord, TimingStats, TrainConfig, Trainer, learning_rate, resolve_device, run, train,
)

SMALL = TrainConfig(n_gaussians=8, height=32, width=40, n_iterations=12, device="cpu")
# Rounds after 3, 6 and 9 steps, with thresholds low enough that every round clones or splits something.
GROWING = DensifyConfig(every_n_steps=3, grad_threshold=1e-6, max_gaussians=60, stop_fraction=1.0)


def change(config=SMALL, **fields):
    return dataclasses.replace(config, **fields)


def new_trainer(config=SMALL, n=8, level=InitLevel.RANDOM):
    truth = GroundTruth.random(n, config.height, config.width, seed=1, blend=config.blend)
    return Trainer(truth, initialize_scene(truth, level, seed=2), config)


def bytes_of(scene):
    return [getattr(scene, name).detach().numpy().tobytes() for name in PARAMETER_NAMES]


def numbers_of(history):
    "Everything in the records except the time."
    return [record[:-1] for record in history]


# ── schedules ──


def test_schedules_start_at_lr_and_end_where_they_say():
    ends = {LRSchedule.COSINE: 0.0, LRSchedule.EXPONENTIAL: FINAL_LR_FRACTION, LRSchedule.COOLDOWN: 0.0, LRSchedule.CONSTANT: 1.0}
    for schedule, end in ends.items():
        rates = [learning_rate(0.5, schedule, step, 100) for step in range(101)]
        assert rates[0] == 0.5
        assert rates[-1] == pytest.approx(0.5 * end)
        assert rates == sorted(rates, reverse=True)
        assert learning_rate(0.5, schedule, 250, 100) == rates[-1], "past the end the rate stays"


def test_cooldown_holds_for_half_of_the_steps_and_falls_in_a_straight_line():
    rates = [learning_rate(1.0, LRSchedule.COOLDOWN, step, 100) for step in range(101)]
    assert rates[:51] == [1.0] * 51
    assert rates[50:] == pytest.approx([1 - step / 50 for step in range(51)])


def test_cosine_is_half_way_down_in_the_middle_and_exponential_falls_by_equal_factors():
    assert learning_rate(1.0, LRSchedule.COSINE, 50, 100) == pytest.approx(0.5)
    rates = [learning_rate(1.0, "exponential", step, 10) for step in range(11)]
    factors = [b / a for a, b in zip(rates, rates[1:])]
    assert factors == pytest.approx([FINAL_LR_FRACTION**0.1] * 10)


# ── configuration ──


def test_the_defaults_and_their_order():
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    assert names == ["n_gaussians", "height", "width", "n_iterations", "lr", "lr_schedule", "lr_scale", "init_level",
                     "blend", "loss", "densify", "seed", "device", "compile"]
    config = TrainConfig()
    assert (config.n_gaussians, config.height, config.width, config.n_iterations, config.lr) == (100, 256, 256, 1000, 1e-2)
    assert config.loss == L1SSIMLoss() and config.densify is None and config.lr_scale == {}
    assert hash(config) == hash(TrainConfig()) and config == TrainConfig()


def test_strings_stand_for_enum_members():
    config = TrainConfig(lr_schedule="exponential", init_level="noisy", blend="over", loss="l2_loss")
    assert config.lr_schedule is LRSchedule.EXPONENTIAL and config.init_level is InitLevel.NOISY
    assert config.blend is Blend.OVER and config.loss is l2_loss


@pytest.mark.parametrize("fields, error, words", [
    (dict(n_gaussians=0), ValueError, ["n_gaussians", "at least 1", "0"]),
    (dict(height=2.5), TypeError, ["height", "whole number", "2.5"]),
    (dict(width=True), TypeError, ["width", "True"]),
    (dict(n_iterations=-3), ValueError, ["n_iterations", "-3"]),
    (dict(lr=0), ValueError, ["lr", "above 0"]),
    (dict(lr=math.nan), ValueError, ["lr", "finite", "nan"]),
    (dict(lr="fast"), TypeError, ["lr", "number", "fast"]),
    (dict(lr_schedule="linear"), ValueError, ["lr_schedule", "'cosine'", "'linear'"]),
    (dict(lr_scale={"mean": 1.0}), ValueError, ["lr_scale", "means", "'mean'"]),
    (dict(lr_scale={"means": -1.0}), ValueError, ["lr_scale['means']", "at least 0", "-1"]),
    (dict(lr_scale=[1.0]), TypeError, ["lr_scale", "dict"]),
    (dict(init_level="perfect"), ValueError, ["init_level", "'exact'", "'perfect'"]),
    (dict(blend="multiply"), ValueError, ["blend", "'weighted'", "'multiply'"]),
    (dict(loss="huber"), ValueError, ["loss", "'huber'"]),
    (dict(loss=3), ValueError, ["loss", "3"]),
    (dict(densify=True), TypeError, ["densify", "DensifyConfig", "True"]),
    (dict(seed=-1), ValueError, ["seed", "-1"]),
    (dict(device="abacus"), ValueError, ["device", '"cpu"', "'abacus'"]),
    (dict(device="meta"), ValueError, ["device", "'meta'"]),
    (dict(device="cuda:99"), ValueError, ["device", "available", "cuda:99"]),
    (dict(compile="yes"), ValueError, ["compile", "auto", "'yes'"]),
])
def test_a_bad_field_says_what_was_expected_and_what_came(fields, error, words):
    with pytest.raises(error) as caught:
        TrainConfig(**fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_config_goes_through_json_and_back():
    config = TrainConfig(lr_scale={"colors": 2, "means": 0}, loss=L1SSIMLoss(0.8, 0.2), densify=GROWING, blend="additive", compile=False)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.densify == GROWING
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


def test_auto_takes_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="available here .cuda:0, mps, cpu., got 'cuda:1'"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu") == resolve_device("cpu")
    with pytest.raises(ValueError, match="available here .cpu., got 'cuda'"):
        resolve_device("cuda")


# ── the loop ──


def test_trainer_is_the_plain_loop():
    trainer = new_trainer(change(loss=l2_loss))
    truth, scene = trainer.ground_truth, trainer.scene.clone()
    adam = torch.optim.Adam([dict(params=[getattr(scene, name)]) for name in PARAMETER_NAMES], lr=1e-2, betas=(0.9, 0.98), eps=1e-15, fused=True)
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


@pytest.mark.parametrize("fields", [dict(n_gaussians=9), dict(seed=1), dict(device="cpu"), dict(height=8), dict(init_level="exact")])
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
    config = change(densify=dataclasses.replace(GROWING, strategy="error"))
    first, second = train(config, progress=False), train(config, progress=False)
    assert bytes_of(first.scene) == bytes_of(second.scene)
    assert numbers_of(first.history) == numbers_of(second.history)
    other = train(change(config, seed=1), progress=False)
    assert bytes_of(other.scene) != bytes_of(first.scene)


def test_the_number_of_threads_does_not_matter():
    config = change(height=112, width=128, n_iterations=5)  # more than the 2¹⁵ numbers from which torch shares a sum out
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


@pytest.mark.parametrize("strategy", ["gradient", "error"])
@pytest.mark.parametrize("stop_at", [0, 5, 6])
def test_resuming_gives_the_same_bytes_as_never_stopping(tmp_path, strategy, stop_at):
    config = change(densify=dataclasses.replace(GROWING, strategy=strategy))
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
    photo = GroundTruth(truth.image, None, truth.domain)
    trainer = Trainer(photo, initialize_scene(photo, "content", 6), SMALL)
    trainer.step()
    assert Trainer.load(trainer.save(tmp_path / "new.safetensors")).ground_truth.scene is None


def test_a_checkpoint_is_tensors_and_json(tmp_path):
    path = new_trainer().save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gs2d-checkpoint"])
        assert {"scene.means", "truth.image", "truth.scene.colors", "generator", "history"} <= set(file.keys())
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
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="gs2d-checkpoint version 1"):
        Trainer.load(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="loss"):
        new_trainer(change(loss=lambda a, b: (a - b).abs().mean())).save(tmp_path / "own.safetensors")
    assert not (tmp_path / "own.safetensors").exists()


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
    with pytest.raises(FloatingPointError, match=rf"step 3: .*got a loss of {value}\. .*smaller learning rate than lr=0.01"):
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


def test_an_interrupt_gives_what_was_reached(capsys):
    def interrupt(image):
        raise KeyboardInterrupt

    trainer = new_trainer(change(loss=stops_at(4, interrupt)))
    result = run(trainer, progress=True)
    assert len(result.history) == 4 and math.isfinite(result.psnr)
    captured = capsys.readouterr()
    assert captured.out == "" and "interrupted after 4 of 12 steps" in captured.err


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
        config = TrainConfig(n_gaussians=12, height=48, width=48, n_iterations=200, init_level=level, seed=seed, device="cpu")
        result = train(config, progress=False)
        if level is InitLevel.EXACT:
            assert result.history[0].loss < 1e-5
        return result.psnr

    levels = [InitLevel.EXACT, InitLevel.NOISY, InitLevel.POSITIONS_ONLY, InitLevel.RANDOM]
    means = [sum(final(level, seed) for seed in range(3)) / 3 for level in levels]
    assert means == sorted(means, reverse=True), means
    assert means[1] > 40, "40 dB is an error of a hundredth of full scale"


def test_the_call_people_make(tmp_path):
    result = train(TrainConfig(n_gaussians=20, height=64, width=64, n_iterations=30, lr=1e-2, lr_schedule=LRSchedule.COSINE,
                               init_level=InitLevel.RANDOM, densify=DensifyConfig(every_n_steps=10, max_gaussians=500)), progress=False)
    assert "ms a step" in result.timing.summary() and result.timing.steps_per_sec > 0
    assert result.ground_truth.save(tmp_path / "ground_truth.png").stat().st_size > 0


def test_compile_is_for_cuda_unless_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr("gs2d.kernels.operators.available", lambda device, dtype: frozenset())
    new_trainer(), new_trainer(change(compile=False))
    assert compiled == []
    new_trainer(change(compile=True)).step()
    assert compiled == [render]
