"""The live session and its panel, with clicks made in code. Nothing here sleeps for a fixed time: it polls, with a deadline."""
import dataclasses
import io
import threading
import time
from datetime import datetime

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gs2d.densify import DensifyConfig
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel
from gs2d.live import ALLOWED, LiveSession, LiveTrainer, Pace, State, view_of
from gs2d.loss import L1SSIMLoss
from gs2d.renderer import Blend
from gs2d.show.views import View, draw_view
from gs2d.train import LRSchedule, TrainConfig, train

TRUTH = GroundTruth.random(6, 24, 32, seed=1)
LONG = TrainConfig(n_gaussians=6, n_iterations=10**6, lr_schedule="constant", device="cpu")


def wait_for(condition, seconds=30):
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "waited too long"
        time.sleep(0.002)


def change(config=LONG, **fields):
    return dataclasses.replace(config, **fields)


def training_threads():
    return [thread for thread in threading.enumerate() if thread.name == "gs2d-training"]


@pytest.fixture(autouse=True)
def no_thread_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    for thread in training_threads():
        thread.session.stop()
    wait_for(lambda: not training_threads())


def started(config=LONG, **options):
    session = LiveSession(TRUTH, config, **options)
    session.run()
    wait_for(lambda: session.trainer.steps_done > 3)
    return session


# ── the session ──


def test_a_live_run_is_the_run_that_train_makes():
    config = change(n_iterations=60, lr_schedule="cosine", densify=DensifyConfig(every_n_steps=10, grad_threshold=1e-6, max_gaussians=20))
    session = LiveSession(TRUTH, config)
    session.step()
    session.run()
    wait_for(lambda: session.trainer.steps_done > 10)
    session.pause()
    session.run()
    wait_for(lambda: session.state is State.DONE)
    plain = train(config, TRUTH, progress=False)
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(plain.scene, name), getattr(session.trainer.scene, name))


def test_pause_freezes_the_counter_within_a_step_and_run_goes_on():
    session = started()
    session.pause()
    steps = session.trainer.steps_done
    assert session.state is State.PAUSED
    wait_for(lambda: not training_threads())  # so nobody is left to take another step
    assert session.trainer.steps_done == steps
    session.run()
    wait_for(lambda: session.trainer.steps_done > steps)


def test_step_takes_one_and_ends_in_done_at_the_last():
    session = LiveSession(TRUTH, change(n_iterations=2))
    session.step()
    assert (session.trainer.steps_done, session.state) == (1, State.PAUSED)
    session.step()
    assert (session.trainer.steps_done, session.state) == (2, State.DONE)
    session.step()
    session.run()
    assert (session.trainer.steps_done, session.state) == (2, State.DONE), "done allows neither"


def test_stop_ends_the_thread_and_only_a_reset_goes_on():
    session = started()
    session.stop()
    wait_for(lambda: not training_threads())
    assert session.state is State.DONE
    session.run()
    assert session.state is State.DONE
    session.reset()
    assert (session.state, session.trainer.steps_done) == (State.IDLE, 0)


def test_stop_from_paused_is_done_and_every_call_in_every_state_ends_in_a_known_state():
    session = started()
    session.pause()
    session.stop()
    assert session.state is State.DONE
    for state in ALLOWED:
        for call in ("pause", "stop", "step", "run", "reset"):
            if state is not State.RUNNING:
                session.state = state
                getattr(session, call)()
                session.pause()
                assert session.state in ALLOWED


def test_reset_of_a_running_session_runs_on_from_the_start():
    session = started()
    wait_for(lambda: session.trainer.steps_done > 50)
    old = session.trainer
    session.reset()
    assert session.trainer is not old and session.state is State.RUNNING
    assert len([t for t in training_threads() if not t.session._ended.is_set()]) == 1


def test_a_change_takes_effect_at_the_next_step_or_waits_for_a_reset():
    session = started()
    session.change(lr=0.5e-3, n_gaussians=9, seed=4)
    wait_for(lambda: session.trainer.history[-1].lr == 0.5e-3)
    rates = [record.lr for record in list(session.trainer.history)]
    assert rates == sorted(rates, reverse=True) and set(rates) == {1e-2, 0.5e-3}
    assert session.waiting == ["n_gaussians", "seed"] and len(session.trainer.scene) == 6
    session.reset()
    assert session.waiting == [] and len(session.trainer.scene) == 9


def test_a_bad_change_is_refused_and_leaves_the_session_as_it_was():
    session = started()
    with pytest.raises(ValueError, match="lr: expected"):
        session.change(lr=-1.0)
    assert session.config == LONG and session.state is State.RUNNING


def test_an_error_in_a_step_becomes_the_state_and_a_reset_recovers():
    def broken(image, target):
        raise RuntimeError("no loss today")

    session = started()
    session.change(loss=broken)
    wait_for(lambda: session.state is State.FAILED)
    assert str(session.error) == "no loss today"
    wait_for(lambda: not training_threads())
    session.change(loss=L1SSIMLoss())
    session.reset()
    assert session.state is State.IDLE and session.error is None
    session.step()
    assert session.trainer.steps_done == 1


def test_a_start_that_is_impossible_fails_in_words():
    session = LiveSession(TRUTH, LONG)
    session.change(init_level="exact", n_gaussians=7)
    session.reset()
    assert session.state is State.FAILED and "expected the truth's own 6" in str(session.error)


def test_ask_sees_the_trainer_at_rest():
    grow = DensifyConfig(every_n_steps=2, grad_threshold=0.0, max_gaussians=60, stop_fraction=1.0)
    session = started(change(densify=grow))
    for _ in range(20):
        result = session.ask(lambda: session.trainer.result())
        assert len({len(getattr(result.scene, name)) for name in PARAMETER_NAMES}) == 1
        assert len(result.scene) == result.history[-1].n_gaussians
    with pytest.raises(ZeroDivisionError):
        session.ask(lambda: 1 / 0)
    assert session.state is State.RUNNING


def test_only_one_session_trains_at_a_time():
    first, second = started(), started()
    assert first.state is State.PAUSED and second.state is State.RUNNING
    wait_for(lambda: len(training_threads()) == 1)


def test_in_the_foreground_run_returns_at_the_end_and_an_interrupt_pauses():
    session = LiveSession(TRUTH, change(n_iterations=7), background=False)
    session.run()
    assert (session.state, session.trainer.steps_done) == (State.DONE, 7)

    def interrupt():
        if session.trainer.steps_done == 3 and session.state is State.RUNNING:
            raise KeyboardInterrupt

    session = LiveSession(TRUTH, LONG, watch=interrupt, background=False)
    session.run()
    assert (session.state, session.trainer.steps_done) == (State.PAUSED, 3)
    session.step()
    assert session.trainer.steps_done == 4


# ── what it draws, and how often ──


def test_pace_waits_for_the_interval_or_until_the_share_is_kept(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def draw(pace, cost):
        with pace:
            now[0] += cost

    cheap, dear = Pace(0.06, 0.05), Pace(0.06, 0.05)
    for pace, cost, period in ((cheap, 0.001, 0.06), (dear, 0.04, 0.8)):
        assert pace.due()
        start = now[0]
        draw(pace, cost)
        now[0] = start + 0.99 * period
        assert not pace.due()
        now[0] = start + 1.01 * period
        assert pace.due()
    draw(cheap, 5.0)
    now[0] += 0.07
    assert cheap.due(), "one hiccup does not freeze the picture"


def test_the_view_is_of_the_picture_that_the_last_step_rendered():
    session = LiveSession(TRUTH, change(n_iterations=3))
    before = {view: view_of(session.trainer, view) for view in View}
    session.run()
    wait_for(lambda: session.state is State.DONE)
    assert np.array_equal(view_of(session.trainer), draw_view(session.trainer.scene, session.trainer.image, TRUTH.image))
    changed = {view for view in View if not np.array_equal(before[view], view_of(session.trainer, view))}
    assert changed == set(View) - {View.TARGET}


# ── the panel ──


@pytest.fixture
def live():
    return LiveTrainer(TRUTH, LONG)


def click(live, name):
    live.buttons[name].click()


def enabled(live):
    return {name for name in ("run", "step", "stop", "reset") if not live.buttons[name].disabled}


def decoded(widget):
    return np.asarray(Image.open(io.BytesIO(widget.value)))


def test_buttons_run_pause_step_reset_and_stop(live):
    assert enabled(live) == {"run", "step", "reset"} and "idle" in live.words.value
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3 and "running" in live.words.value)
    wait_for(lambda: live.buttons["run"].description == "Pause")
    assert enabled(live) == {"run", "stop", "reset"}
    click(live, "run")
    steps = live.trainer.steps_done
    assert live.session.state is State.PAUSED and live.buttons["run"].description == "Run" and enabled(live) == {"run", "step", "stop", "reset"}
    click(live, "step")
    assert live.trainer.steps_done == steps + 1 and f"step {steps + 1:,} of" in live.words.value
    click(live, "reset")
    assert live.trainer.steps_done == 0 and "idle" in live.words.value
    click(live, "step")
    click(live, "stop")
    assert "done" in live.words.value and enabled(live) == {"reset"}


def test_the_picture_and_the_curves_change_while_it_runs_and_the_last_one_is_exact(live):
    pictures, curves = {live.image.value}, {live.curves.value}
    click(live, "run")

    def enough():
        pictures.add(live.image.value)
        curves.add(live.curves.value)
        return len(pictures) > 3 and len(curves) > 1

    wait_for(enough)
    assert live.image.format == "jpeg"
    click(live, "run")
    assert live.image.format == "png"
    assert np.array_equal(decoded(live.image), view_of(live.trainer))
    curves = decoded(live.curves)[..., :3].astype(int)
    half = len(curves) // 2
    for part, color in ((curves[:half], (0xD5, 0x5E, 0x00)), (curves[half:], (0x00, 0x72, 0xB2))):
        assert (np.abs(part - color).max(-1) < 30).sum() > 50, "a curve in each half"


@pytest.mark.parametrize("name, value, field, expected", [
    ("lr", 1e-3, "lr", 1e-3),
    ("lr_schedule", LRSchedule.EXPONENTIAL, "lr_schedule", LRSchedule.EXPONENTIAL),
    ("n_iterations", 5000, "n_iterations", 5000),
    ("blend", Blend.ADDITIVE, "blend", Blend.ADDITIVE),
    ("ssim_share", 0.25, "loss", L1SSIMLoss(0.75, 0.25)),
    ("densify", True, "densify", DensifyConfig()),
])
def test_a_control_moved_while_it_runs_reaches_the_trainer(live, name, value, field, expected):
    click(live, "run")
    live.controls[name].value = value
    wait_for(lambda: getattr(live.trainer.config, field) == expected)
    assert live.session.state is State.RUNNING and live.message.value == ""


def test_densification_is_steered_by_its_four_controls(live):
    for name, value in dict(every_n_steps=2, grad_threshold=1e-7, max_gaussians=11, densify=True).items():
        live.controls[name].value = value
    click(live, "run")
    wait_for(lambda: len(live.trainer.scene) == 11)
    live.controls["densify"].value = False
    wait_for(lambda: live.trainer.config.densify is None)


def test_what_needs_a_reset_says_so_and_then_happens(live):
    live.controls["n_gaussians"].value = 13
    assert "Reset" in live.message.value and "Gaussians" in live.message.value and len(live.trainer.scene) == 6
    click(live, "reset")
    assert len(live.trainer.scene) == 13
    live.controls["init_level"].value = InitLevel.EXACT
    assert live.controls["n_gaussians"].disabled and live.controls["n_gaussians"].value == 6
    click(live, "reset")
    click(live, "step")
    assert live.trainer.history[0].loss < 1e-5


def test_extremes_of_every_slider_fail_in_words_or_train_on(live):
    for name in ("lr", "ssim_share", "grad_threshold"):
        for end in ("min", "max"):
            control = live.controls[name]
            bound = getattr(control, end)
            control.value = 10.0**bound if name != "ssim_share" else bound
            click(live, "step")
            assert live.session.state is State.PAUSED, live.words.value


def test_an_error_while_training_is_shown_with_its_text_and_not_as_markup(live):
    def broken(image, target):
        raise RuntimeError("<b>no loss</b> today")

    live.session.change(loss=broken)
    click(live, "run")
    wait_for(lambda: "failed" in live.words.value)
    assert "RuntimeError: &lt;b&gt;no loss" in live.words.value and enabled(live) == {"reset"}


def upload(live, name, content):
    live.upload.value = ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": datetime.now()},)


def test_an_uploaded_picture_becomes_the_target_and_a_broken_one_changes_nothing(live):
    click(live, "run")
    upload(live, "broken.png", b"this is no picture")
    assert "did not work" in live.message.value and "not a picture" in live.message.value
    assert live.session.state is State.RUNNING and live.session.ground_truth is TRUTH
    file = io.BytesIO()
    Image.new("RGB", (500, 250), (200, 30, 30)).save(file, "png")
    upload(live, "red.png", file.getvalue())
    assert live.trainer.ground_truth.image.shape == (192, 384, 3), "shrunk to max_side"
    assert [level for _, level in live.controls["init_level"].options] == [InitLevel.CONTENT, InitLevel.RANDOM]
    assert live.session.state is State.RUNNING and "red.png" in live.message.value


def test_save_buttons_write_what_they_say(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 5)
    click(live, "scene")
    path = live.message.value.removeprefix("Saved ")
    assert len(Gaussians2D.load(path)) == 6
    click(live, "image")
    with Image.open(live.message.value.removeprefix("Saved ")) as image:
        assert image.size == (32, 24)


def test_the_video_button_records_until_it_is_pressed_again(live):
    live.controls["n_iterations"].value = 400
    live.video.value = True
    assert "Recording" in live.message.value
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 20)
    live.video.value = False
    path = live.message.value.removeprefix("Saved ").split(":")[0]
    capture = cv2.VideoCapture(path)
    assert capture.isOpened() and capture.read()[0], path


def test_a_video_of_a_run_that_ends_is_saved_by_itself(live):
    live.controls["n_iterations"].value = 30
    live.video.value = True
    click(live, "run")
    wait_for(lambda: live.session.state is State.DONE and live.session._ended.is_set())
    assert live.message.value.startswith("Saved") and not live.video.value


def test_a_folder_that_cannot_be_written_is_said_in_the_view(live, tmp_path):
    (tmp_path / "file").write_text("in the way")
    live.folder = tmp_path / "file"
    for name in ("scene", "image"):
        click(live, name)
        assert "did not work" in live.message.value
    live.video.value = True
    assert "did not work" in live.message.value


def test_a_new_view_closes_the_one_before(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    other = LiveTrainer(TRUTH, LONG)
    assert live.session.state is State.DONE and "closed" in live.words.value
    other.session.run()
    wait_for(lambda: other.trainer.steps_done > 3 and len(training_threads()) == 1)


def test_result_is_a_copy_at_rest_while_training_goes_on(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    result = live.result()
    steps = len(result.history)
    wait_for(lambda: live.trainer.steps_done > steps)
    assert len(result.history) == steps and live.session.state is State.RUNNING


def test_bad_arguments_are_refused_and_leave_the_open_view_alone(live):
    with pytest.raises(FileNotFoundError):
        LiveTrainer("no-such-picture.png")
    with pytest.raises(ValueError, match="n_gaussians"):
        LiveTrainer(TRUTH, change(init_level="exact", n_gaussians=5))
    click(live, "step")
    assert live.trainer.steps_done == 1


def test_a_picture_gets_settings_that_suit_one():
    live = LiveTrainer(np.random.default_rng(0).random((40, 60, 3)))
    assert live.session.config.init_level is InitLevel.CONTENT and live.session.config.n_gaussians == 300
    assert InitLevel.EXACT not in [level for _, level in live.controls["init_level"].options]
