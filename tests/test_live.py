"""The live session and its panel, with clicks made in code. For the end of a run they wait with `session.wait`, for something
in its middle they poll, with a deadline. Nothing here sleeps for a fixed time."""
import base64
import dataclasses
import gc
import io
import re
import subprocess
import sys
import threading
import time
import weakref
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from ipywidgets.widgets import widget as widget_registry
from PIL import Image

from gs2d.densify import DensifyConfig, ErrorGrowth
from gs2d.fit import default_portrait, fit_config, fit_image
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.init_levels import InitLevel
from gs2d.loss import L1SSIMLoss, l2_loss
from gs2d.renderer import Blend
from gs2d.show.panel import LiveTrainer, Pace, view_of
from gs2d.show.session import ALLOWED, LiveSession, State
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
    assert not training_threads(), "stop returns when the thread has ended"


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
    assert session.wait(30) and session.state is State.DONE
    plain = train(config, ground_truth=TRUTH, progress=False)
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(plain.scene, name), getattr(session.trainer.scene, name))


def test_pause_freezes_the_counter_within_a_step_and_run_goes_on():
    session = started()
    session.pause()
    steps = session.trainer.steps_done
    assert session.state is State.PAUSED and not training_threads(), "nobody is left to take another step"
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
    assert (session.trainer.steps_done, session.state) == (2, State.DONE), "with no steps left, done allows neither"


def test_stop_ends_the_thread_and_a_reset_starts_again():
    session = started()
    session.stop()
    assert session.state is State.DONE and not training_threads()
    session.reset()
    assert (session.state, session.trainer.steps_done) == (State.IDLE, 0)


def test_a_run_that_was_stopped_goes_on_where_it_stopped():
    session = started()
    session.stop()
    steps = session.trainer.steps_done
    session.step()
    assert (session.state, session.trainer.steps_done) == (State.PAUSED, steps + 1)
    session.stop()
    session.run()
    wait_for(lambda: session.trainer.steps_done > steps + 3)
    assert session.trainer.history[steps].step == steps


@pytest.mark.parametrize("how", ["change", "extend"])
def test_a_finished_run_that_is_made_longer_goes_on(how):
    session = LiveSession(TRUTH, change(n_iterations=5))
    session.run()
    assert session.wait(30) and session.state is State.DONE
    scene = session.trainer.scene
    if how == "change":
        session.change(n_iterations=9)
        session.run()
    else:
        session.extend(4)
    assert session.wait(30) and (session.state, session.trainer.steps_done) == (State.DONE, 9)
    assert session.trainer.scene is scene and [record.step for record in session.trainer.history] == list(range(9))


def test_a_run_by_the_clock_is_made_longer_in_steps():
    session = LiveSession(TRUTH, change(seconds=1e-3))
    session.run()
    assert session.wait(30) and session.state is State.DONE
    steps = session.trainer.steps_done
    session.extend(7)
    assert session.wait(30) and (session.state, session.trainer.steps_done) == (State.DONE, steps + 7)


@pytest.mark.parametrize("call", ["run", "step"])
def test_a_learning_rate_that_is_too_large_fails_and_a_lower_one_goes_on(call):
    session = started()
    session.change(lr=1e38)
    assert session.wait(30) and session.state is State.FAILED and isinstance(session.error, FloatingPointError)
    steps = session.trainer.steps_done
    assert all(parameter.isfinite().all() for parameter in session.trainer.scene.parameters())
    assert not session.allows("run") and "Lower the learning rate" in session.advice
    getattr(session, call)()
    assert session.state is State.FAILED and session.trainer.steps_done == steps, "with the same rate it would fail again"
    session.change(lr=1e-3)
    assert session.allows(call) and "go on" in session.advice
    getattr(session, call)()
    wait_for(lambda: session.trainer.steps_done > steps)
    assert session.error is None and session.state is not State.FAILED and session.advice == ""
    assert [record.step for record in list(session.trainer.history)[:steps + 1]] == list(range(steps + 1))


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
    assert len(training_threads()) == 1


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
    assert session.wait(30) and session.state is State.FAILED and not training_threads()
    assert str(session.error) == "no loss today"
    session.run()
    assert session.state is State.FAILED and "Change a setting" in session.advice
    session.change(loss=L1SSIMLoss())
    steps = session.trainer.steps_done
    session.step()
    assert (session.state, session.trainer.steps_done, session.error) == (State.PAUSED, steps + 1, None)
    session.reset()
    assert session.state is State.IDLE
    session.step()
    assert session.trainer.steps_done == 1


def test_a_start_that_is_impossible_fails_in_words():
    session = LiveSession(TRUTH, LONG)
    session.change(init_level="exact", n_gaussians=7)
    session.reset()
    assert session.state is State.FAILED and "expected the truth's own 6" in str(session.error)
    session.change(lr=1e-4)
    assert not session.allows("run") and "Reset" in session.advice, "the trainer is that of another configuration"


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
    assert [thread.session for thread in training_threads()] == [second]


def test_in_the_foreground_run_returns_at_the_end_and_an_interrupt_pauses():
    session = LiveSession(TRUTH, change(n_iterations=7), threaded=False)
    session.run()
    assert (session.state, session.trainer.steps_done) == (State.DONE, 7)

    def interrupt():
        if session.trainer.steps_done == 3 and session.state is State.RUNNING:
            raise KeyboardInterrupt

    session = LiveSession(TRUTH, LONG, watch=interrupt, threaded=False)
    session.run()
    assert (session.state, session.trainer.steps_done) == (State.PAUSED, 3)
    session.step()
    assert session.trainer.steps_done == 4


def test_a_program_that_ends_while_a_session_trains_ends_without_an_error():
    program = """
import time
from gs2d.ground_truth import GroundTruth
from gs2d.show.session import LiveSession
from gs2d.train import TrainConfig
session = LiveSession(GroundTruth.random(30, 96, 128, seed=1), TrainConfig(n_gaussians=30, n_iterations=10**6, device="cpu"))
session.run()
while session.trainer.steps_done < 20:
    time.sleep(0.01)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "terminate" not in done.stderr and "Traceback" not in done.stderr, done.stderr


# ── at rest: nobody trains, nobody draws ──


class SlowWatch:
    "Notes what it sees, slowly, and whether two threads are ever in it at once."

    def __init__(self):
        self.seen, self.inside, self.met = [], threading.Lock(), False

    def __call__(self):
        if not self.inside.acquire(blocking=False):
            self.met = True
            return
        time.sleep(0.02)  # a drawing that takes its time
        self.seen.append((self.session.state, self.session.trainer.steps_done))
        self.inside.release()


def watched(config=LONG, **options):
    watch = SlowWatch()
    watch.session = LiveSession(TRUTH, config, watch, **options)
    return watch.session, watch


@pytest.mark.parametrize("call, end", [("pause", State.PAUSED), ("stop", State.DONE), ("reset", State.IDLE)])
def test_pause_stop_and_reset_return_when_the_last_drawing_is_done(call, end):
    session, watch = watched()
    for _ in range(3):
        session.run()
        wait_for(lambda: len(watch.seen) > 2)
        if call == "reset":
            session.pause()  # a reset of one that runs would run on
        getattr(session, call)()
        assert not training_threads() and watch.seen[-1] == (end, session.trainer.steps_done) and not watch.met
        watch.seen.clear()
        session.reset()


def test_wait_says_whether_the_run_has_come_to_rest():
    session, watch = watched(change(n_iterations=5))
    assert session.wait(0), "nobody is at work before it runs"
    session.run()
    assert not session.wait(0)
    assert session.wait(30) and session.state is State.DONE and watch.seen[-1] == (State.DONE, 5) and not training_threads()


def test_a_reset_as_the_run_ends_waits_for_the_last_drawing():
    drawing, drawn, met = threading.Event(), threading.Event(), threading.Event()

    def watch():
        if drawing.is_set() and not drawn.is_set():
            met.set()
        elif session.state is State.DONE:
            drawing.set()
            met.wait(0.3)  # a second thread that draws would come now
            drawn.set()
        seen.append((session.state, session.trainer.steps_done))

    seen, session = [], LiveSession(TRUTH, change(n_iterations=5), watch)
    session.run()
    assert drawing.wait(30)
    session.reset()
    assert not met.is_set() and drawn.is_set() and seen[-2:] == [(State.DONE, 5), (State.IDLE, 0)]


def test_a_run_that_starts_while_the_last_one_is_drawn_for_the_last_time_waits_for_it():
    session, watch = watched()
    for call in ("run", "step") * 2:
        session.run()
        wait_for(lambda: watch.seen and watch.seen[-1][1] > 0)
        clicker = threading.Thread(target=session.pause)  # as where clicks are delivered in a thread of their own
        clicker.start()
        wait_for(lambda: session.state is State.PAUSED)
        getattr(session, call)()
        clicker.join(30)
        session.pause()
        assert not clicker.is_alive() and not watch.met and not training_threads()


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("call, end, steps", [("pause", State.PAUSED, 3), ("stop", State.DONE, 3), ("run", State.DONE, 6), ("step", State.DONE, 6)])
def test_calls_from_within_watch_return_at_once_and_act_after_the_step(threaded, call, end, steps):
    def from_within():
        if session.trainer.steps_done == 3 and session.state is State.RUNNING:
            getattr(session, call)()
            assert session.state is State.RUNNING and not session.wait(30) and session.ask(lambda: 7) == 7

    session = LiveSession(TRUTH, change(n_iterations=6), from_within, threaded)
    session.run()
    assert session.wait(30) and (session.state, session.trainer.steps_done, session.error) == (end, steps, None)


def test_a_reset_from_within_watch_happens_when_the_run_has_come_to_rest():
    trainers = []

    def from_within():
        if session.trainer.steps_done == 3 and not trainers:
            trainers.append(session.trainer)
            session.reset()

    session = LiveSession(TRUTH, LONG, from_within)
    session.run()
    wait_for(lambda: session.trainer not in trainers and session.trainer.steps_done > 3)
    session.pause()
    assert session.state is State.PAUSED and not training_threads()


def test_many_callers_at_once_end_at_rest_and_nobody_waits_for_ever():
    session, calls = started(), ("pause", "run", "stop", "reset", "step", "run") * 5

    def click_through(first):
        for k in range(len(calls)):
            getattr(session, calls[(first + k) % len(calls)])()
            session.change(lr=1e-3)
            session.ask(lambda: session.trainer.steps_done)

    clickers = [threading.Thread(target=click_through, args=(k,), daemon=True) for k in range(4)]
    for clicker in clickers:
        clicker.start()
    for clicker in clickers:
        clicker.join(60)
    assert not any(clicker.is_alive() for clicker in clickers)
    session.stop()
    assert session.error is None and session.state in (State.IDLE, State.DONE) and not training_threads()


def test_an_error_in_the_last_drawing_leaves_nobody_waiting():
    def broken():
        if session.state is not State.RUNNING:
            raise KeyboardInterrupt

    session = LiveSession(TRUTH, change(n_iterations=3), broken, threaded=False)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert session.wait(0) and session.state is State.DONE


def test_a_clock_ends_a_run_too():
    session = LiveSession(TRUTH, change(n_iterations=1, seconds=0.05))
    session.run()
    assert session.wait(30) and session.state is State.DONE and session.trainer.steps_done > 1


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
    assert session.wait(30) and session.state is State.DONE
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


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def saved(live):
    "The path that the view names."
    return re.search("Saved <code>(.*?)</code>", live.message.value)[1]


def test_buttons_run_pause_step_reset_and_stop(live):
    assert enabled(live) == {"run", "step", "reset"} and "idle" in live.words.value
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 0)
    assert "running" in live.words.value, "said before the first step, whatever the pace"
    assert live.buttons["run"].description == "Pause"
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
    assert "done" in live.words.value and enabled(live) == {"run", "step", "reset"}


def test_the_pictures_and_the_curves_change_while_it_runs_and_the_last_ones_are_exact(live):
    pictures, curves = {live.picture.render_frame}, {live.curves.run}
    assert np.array_equal(decoded(live.picture.target_frame), view_of(live.trainer, View.TARGET))
    click(live, "run")

    def enough():
        pictures.add(live.picture.render_frame)
        curves.add(live.curves.run)
        return len(pictures) > 3 and len(curves) > 1

    wait_for(enough)
    assert live.picture.error_frame.startswith(b"\xff\xd8"), "JPEG on the way"
    click(live, "run")
    for name in ("render", "error"):
        assert np.array_equal(decoded(getattr(live.picture, f"{name}_frame")), view_of(live.trainer, View(name)))
    steps = np.frombuffer(live.curves.run, np.float32).reshape(5, -1)[0]
    assert steps[-1] == live.trainer.history[-1].step and live.curves.x_max >= steps[-1]


def test_another_view_is_drawn_at_once_running_or_not(live):
    live.picture.view = "outlines"
    assert np.array_equal(decoded(live.picture.outlines_frame), view_of(live.trainer, View.OUTLINES))
    click(live, "run")
    live.picture.view, live.picture.compare = "opacity", "none"
    assert live.picture.opacity_frame.startswith(b"\xff\xd8")


def test_pointing_at_the_picture_is_answered_between_two_steps(live):
    answers = []
    live.picture.show_gaussian = answers.append
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    live.picture._hear(None, dict(type="point", x=0.5, y=0.5, pin=True, id=1), [])
    assert answers[0] is None or {"index", "outline", "rows", "color"} <= set(answers[0])
    wait_for(lambda: len(answers) > 3)  # what is pinned is followed
    live.picture._hear(None, dict(type="unpin"), [])
    click(live, "run")
    n = len(answers)
    click(live, "step")
    assert len(answers) == n


def test_reset_as_the_run_ends_leaves_curves_and_table_whole():
    drawing, go_on = threading.Event(), threading.Event()
    live = LiveTrainer(TRUTH, change(n_iterations=30))
    draw = live.screen.draw_curves

    def slowly():
        if live.session.state is State.DONE and not drawing.is_set():
            drawing.set()
            go_on.wait(30)
        draw()

    live.screen._drawings[1] = (slowly, live.screen._drawings[1][1])
    click(live, "run")
    assert drawing.wait(30)
    clicker = threading.Thread(target=click, args=(live, "reset"))
    clicker.start()
    go_on.set()
    clicker.join(30)
    assert live.session.state is State.IDLE and live.curves.run == b"" and len(live.curves.ghost) == 5 * 4 * 30
    click(live, "run")
    assert live.session.wait(30) and len(live.curves.run) == 5 * 4 * 30


def test_a_learning_rate_that_is_too_large_says_in_words_what_leads_on(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    live.session.change(lr=1e38)
    assert live.session.wait(30) and "Lower the learning rate" in live.words.value and enabled(live) == {"reset"}
    steps = live.trainer.steps_done
    live.controls["lr"].value = 1e-3
    assert "Press Run to go on" in live.words.value and enabled(live) == {"run", "step", "reset"}
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > steps and "running" in live.words.value)


@pytest.mark.parametrize("how", ["more", "steps in all"])
def test_a_finished_run_is_made_longer(how):
    live = LiveTrainer(TRUTH, change(n_iterations=20))
    click(live, "run")
    assert live.session.wait(30) and enabled(live) == {"reset"}
    if how == "more":
        click(live, "more")
    else:
        live.controls["n_iterations"].value = 520
        assert enabled(live) == {"run", "step", "reset"}
        click(live, "run")
    assert live.session.wait(30) and "step 520 of 520" in live.words.value
    assert live.controls["n_iterations"].value == 520 and live.trainer.history[-1].step == 519


def test_progress_time_and_the_end_of_growth_are_said(live):
    live = LiveTrainer(TRUTH, change(n_iterations=40, densify=DensifyConfig(every_n_steps=5, max_gaussians=12)))
    assert "growth ends at step 20" in live.words.value
    click(live, "run")
    wait_for(lambda: "to go" in live.words.value or live.session.state is State.DONE)
    assert live.session.wait(30)
    assert "growth ended at step 20" in live.words.value and "spent" in live.words.value
    assert re.search('<progress aria-label="[^"]+" style="[^"]+" value="1.0000"', live.words.value)


def test_each_run_has_a_row_and_the_one_before_is_a_ghost(live):
    live = LiveTrainer(TRUTH, change(n_iterations=20))
    assert live.screen.table.value == "" and live.curves.ghost == b""
    click(live, "run")
    assert live.session.wait(30)
    live.controls["lr"].value = 1e-3
    live.controls["n_gaussians"].value = 9
    click(live, "reset")
    click(live, "run")
    assert live.session.wait(30)
    first, second = live.screen.runs.rows
    assert [row.config.lr for row in (first, second)] == [1e-2, 1e-3], "what was set after its end is not of the first run"
    assert "learning rate 0.001" in live.screen.table.value and "Gaussians 9" in live.screen.table.value and (first.n_gaussians, second.n_gaussians) == (6, 9)
    ghost = np.frombuffer(live.curves.ghost, np.float32).reshape(5, -1)
    assert np.array_equal(ghost[1], np.array([record.loss for record in first.history], np.float32))


@pytest.mark.parametrize("name, value, field, expected", [
    ("lr", 1e-3, "lr", 1e-3),
    ("lr_schedule", LRSchedule.EXPONENTIAL, "lr_schedule", LRSchedule.EXPONENTIAL),
    ("n_iterations", 5000, "n_iterations", 5000),
    ("blend", Blend.ADDITIVE, "blend", Blend.ADDITIVE),
    ("ssim_share", 0.25, "loss", L1SSIMLoss(0.75, 0.25)),
    ("loss", "l2", "loss", l2_loss),
    ("growth", "gradient", "densify", DensifyConfig(max_gaussians=24)),
    ("growth", "error", "densify", ErrorGrowth(max_gaussians=24, growth=4 ** (1 / 7) - 1)),
])
def test_a_control_moved_while_it_runs_reaches_the_trainer(live, name, value, field, expected):
    click(live, "run")
    live.controls[name].value = value
    wait_for(lambda: getattr(live.trainer.config, field) == expected)
    assert live.session.state is State.RUNNING and live.message.value == ""


def test_growth_by_gradient_is_steered_by_its_controls(live):
    for name, value in dict(every_n_steps=2, grad_threshold=1e-7, max_gaussians=11, growth="gradient").items():
        live.controls[name].value = value
    click(live, "run")
    wait_for(lambda: len(live.trainer.scene) == 11)
    live.controls["growth"].value = "none"
    wait_for(lambda: live.trainer.config.densify is None)


def test_growth_by_error_is_steered_by_its_controls(live):
    live = LiveTrainer(TRUTH, change(n_iterations=100))
    for name, value in dict(rounds=5, max_gaussians=17, growth="error").items():
        live.controls[name].value = value
    shown = {name for name in ("every_n_steps", "grad_threshold", "rounds", "max_gaussians") if live.controls[name].layout.display is None}
    assert shown == {"rounds", "max_gaussians"}
    click(live, "run")
    assert live.session.wait(30) and len(live.trainer.scene) == 17


def test_growth_of_a_configuration_is_left_alone_until_its_controls_are_touched():
    growth = ErrorGrowth(max_gaussians=20)
    live = LiveTrainer(TRUTH, change(densify=growth))
    assert live.controls["growth"].value == "error" and live.controls["max_gaussians"].value == 20
    for name, value in dict(lr=1e-3, every_n_steps=7, n_gaussians=9).items():
        live.controls[name].value = value
    assert live.trainer.config.densify == live.session.config.densify == growth
    live.controls["max_gaussians"].value = 30
    assert live.trainer.config.densify.max_gaussians == 30
    live.controls["growth"].value = "gradient"
    assert live.trainer.config.densify == DensifyConfig(every_n_steps=7, max_gaussians=30)


def test_a_loss_of_your_own_is_left_alone_and_can_be_chosen_again():
    def own(image, target):
        return (image - target).abs().mean()

    live = LiveTrainer(TRUTH, change(loss=own))
    assert live.controls["loss"].value == "own" and live.controls["ssim_share"].disabled
    live.controls["loss"].value = "l1_ssim"
    assert live.trainer.config.loss == L1SSIMLoss(1 - live.controls["ssim_share"].value, live.controls["ssim_share"].value)
    live.controls["loss"].value = "own"
    assert live.trainer.config.loss is own


def test_the_blend_control_shows_the_blend_in_effect():
    live = LiveTrainer(GroundTruth.random(6, 24, 32, seed=1, blend="additive"), LONG)
    assert live.controls["blend"].value is Blend.ADDITIVE and live.session.config.blend is None
    upload(live, "red.png", png(8, 8))
    assert live.controls["blend"].value is live.trainer.scene.blend is Blend.WEIGHTED
    live.controls["blend"].value = Blend.OVER
    assert live.trainer.scene.blend is Blend.OVER


def test_what_needs_a_reset_says_so_and_then_happens(live):
    live.controls["n_gaussians"].value = 13
    notice = live.settings.notice
    assert "Reset" in notice.value and "Gaussians" in notice.value and len(live.trainer.scene) == 6
    click(live, "reset")
    assert len(live.trainer.scene) == 13 and notice.value == ""
    click(live, "run")
    live.controls["seed"].value = 7
    assert "seed" in notice.value
    click(live, "reset")
    wait_for(lambda: live.trainer.config.seed == 7)
    assert notice.value == "" and live.session.state is State.RUNNING
    click(live, "run")
    click(live, "reset")
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
    assert live.session.wait(30) and "failed" in live.words.value
    assert "RuntimeError: &lt;b&gt;no loss" in live.words.value and enabled(live) == {"reset"}


def upload(live, name, content):
    live.choices.upload.value = ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": datetime.now()},)


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "png")
    return file.getvalue()


def test_an_uploaded_picture_becomes_the_target_and_a_broken_one_changes_nothing(live):
    click(live, "run")
    upload(live, "broken.png", b"this is no picture")
    assert "did not work" in live.message.value and "not a picture" in live.message.value
    assert live.session.state is State.RUNNING and live.session.ground_truth is TRUTH
    upload(live, "red.png", png(500, 250))
    assert live.trainer.ground_truth.image.shape == (192, 384, 3), "shrunk to max_side"
    assert live.trainer.config == fit_config(192, 384) and live.controls["n_gaussians"].value == 192 * 384 // 40
    assert [level for _, level in live.controls["init_level"].options] == [InitLevel.CONTENT, InitLevel.RANDOM]
    assert live.session.state is State.RUNNING and "red.png" in live.message.value


def test_an_uploaded_photograph_is_fitted_as_fit_image_does_it(live):
    file = io.BytesIO()
    Image.open(default_portrait()).resize((96, 112)).save(file, "png")
    upload(live, "portrait.png", file.getvalue())
    click(live, "run")
    assert live.session.wait(120) and live.trainer.history[-1].psnr > 29
    plain = fit_image(live.session.ground_truth, progress=False)
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(plain.scene, name), getattr(live.trainer.scene, name))


def test_another_number_of_gaussians_takes_the_recipe_along(live):
    live.choices.picture.value = "portrait of Grace Hopper"
    size = live.trainer.ground_truth.image.shape[:2]
    before = live.trainer.config
    live.controls["n_gaussians"].value = 200
    assert live.trainer.config == before, "all of it waits for the reset"
    click(live, "reset")
    assert live.trainer.config == fit_config(*size, 200) and live.controls["max_gaussians"].value == 200


def test_every_preset_of_every_picture_starts(live):
    for picture in list(live.choices.picture.options):
        live.choices.picture.value = picture
        for preset in live.choices.preset.options[1:]:
            live.choices.preset.value = preset
            click(live, "step")
            assert live.session.state is State.PAUSED and preset in live.message.value, live.words.value
            assert live.controls["n_gaussians"].value == live.trainer.config.n_gaussians
    live.choices.picture.value = live.choices.picture.options[0]
    assert live.session.ground_truth is TRUTH and live.session.config.n_gaussians == 6


def test_save_buttons_write_what_they_say(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 5)
    click(live, "scene")
    assert len(Gaussians2D.load(saved(live))) == 6
    data = re.search('<a download="live-step-\\d+.json" href="data:application/json;base64,(.*?)">', live.message.value)[1]
    assert base64.b64decode(data) == Path(saved(live)).read_bytes()
    click(live, "image")
    with Image.open(saved(live)) as image:
        assert image.size == (32, 24)
    click(live, "page")
    assert len(Gaussians2D.load(saved(live))) == 6 and 'href="data:text/html;base64,' in live.message.value


def test_the_video_button_records_until_it_is_pressed_again(live):
    live.controls["n_iterations"].value = 400
    live.video.value = True
    assert "Recording" in live.message.value
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 20)
    live.video.value = False
    capture = cv2.VideoCapture(saved(live))
    assert capture.isOpened() and capture.read()[0], live.message.value
    assert live.files.film.player.value.startswith("<video") and "Download" in live.message.value


def test_the_video_button_pressed_while_idle_waits_for_the_run_and_may_be_pressed_again(live):
    live.video.value = True
    assert "from the next Run on" in live.message.value
    live.video.value = False
    assert "Nothing was recorded" in live.message.value and "did not work" not in live.message.value
    live.video.value = True
    click(live, "reset")
    assert live.video.value, "a reset of what has not begun changes nothing"
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    click(live, "stop")
    assert "Saved" in live.message.value and not live.video.value


def test_a_video_of_a_run_that_ends_is_saved_by_itself(live):
    live.controls["n_iterations"].value = 30
    live.video.value = True
    click(live, "run")
    assert live.session.wait(30) and live.session.state is State.DONE
    assert live.message.value.startswith("Saved") and not live.video.value


def test_a_folder_that_cannot_be_written_is_said_in_the_view(live, tmp_path):
    (tmp_path / "file").write_text("in the way")
    live.files.folder = tmp_path / "file"
    for name in ("scene", "image"):
        click(live, name)
        assert "did not work" in live.message.value
    live.video.value = True
    assert "did not work" in live.message.value


def test_what_closing_has_to_say_is_in_the_still_picture(live):
    live.video.value = True
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 20)
    live.close()
    assert "Saved" in live.words.value and not live.video.value


def test_a_new_view_closes_the_one_before(live):
    click(live, "run")
    wait_for(lambda: live.trainer.steps_done > 3)
    other = LiveTrainer(TRUTH, LONG)
    assert live.session.state is State.DONE and "closed" in live.words.value
    other.session.run()
    wait_for(lambda: other.trainer.steps_done > 3)
    assert [thread.session for thread in training_threads()] == [other.session]


def parts_of(widget):
    "All widgets that a widget's state names, itself included: what a page that is loaded asks for."
    parts = [widget]
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        parts += [] if part is None else parts_of(part)
    return parts


def test_a_closed_view_leaves_a_still_picture_and_nothing_else_open():
    open_widgets = widget_registry._instances  # everything that a page can ask for
    if LiveTrainer._open is not None:
        LiveTrainer._open.close()
    before = set(open_widgets)
    for k in range(1, 4):
        live = LiveTrainer(TRUTH, LONG)
        click(live, "step")
        live.close()
        left = [open_widgets[name] for name in set(open_widgets) - before]
        assert len(left) == 5 * k, "a box and a text, with their layouts, and the text's style"
        assert all(part in left for widget in left for part in parts_of(widget)), "no open widget asks for a closed one"
    assert live.box.children == (live.words,) and "closed" in live.words.value
    assert live.words.value.count('src="data:image/jpeg;base64,') == 3 == live.words.value.count("<img alt=")
    words = live.words.value
    live.close()
    live.session.reset()
    assert live.words.value == words, "closed for good"


def test_a_closed_view_is_let_go_of_with_its_trainer():
    gone = []
    for _ in range(3):
        live = LiveTrainer(TRUTH, LONG)
        live.session.run()
        wait_for(lambda: live.trainer.steps_done > 3)
        gone += [weakref.ref(thing) for thing in (live, live.session, live.trainer, live.trainer.optimizer, live.trainer.scene)]
        live.close()
    assert live.result().scene is not None, "who holds it may ask it"
    del live
    gc.collect()
    assert [thing() for thing in gone] == [None] * 15


def test_a_notebook_that_runs_a_cell_again_and_again_does_not_keep_the_views_that_it_has_shown():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shell.user_ns.update(LiveTrainer=LiveTrainer, TRUTH=TRUTH, LONG=LONG)
        trainers = []
        for _ in range(6):
            assert shell.run_cell("live = LiveTrainer(TRUTH, LONG)\nlive", store_history=True).success
            trainers.append(weakref.ref(shell.user_ns["live"].trainer))
        gc.collect()
        alive = [trainer() is not None for trainer in trainers]
        assert alive == [False] * 3 + [True] * 3, "the last three: live itself, and what IPython calls _, __ and ___"
    finally:
        shell.run_cell("del live")
        InteractiveShell.clear_instance()


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
    assert live.session.config == fit_config(40, 60)
    assert InitLevel.EXACT not in [level for _, level in live.controls["init_level"].options]
