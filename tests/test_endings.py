"""However a fit ends, nothing is torn and nothing is lost. The long versions of these are in endings.py."""
import json
import os
import pty
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from endings import ENDINGS, RESULTS, Kills, bytes_of, check_results, full, interrupts, picture, read_all, start, whole
from PIL import Image

from gs2d import interrupts as signals
from gs2d.fit import fit_config, fit_image
from gs2d.ground_truth import GroundTruth
from gs2d.io.checkpoints import keep_checkpoints
from gs2d.io.runs import RunFolder, appearing_together, settle
from gs2d.loss import l2_loss
from gs2d.search import fewest_gaussians
from gs2d.train import TrainConfig, Trainer, make_trainer, run


@pytest.fixture
def ctrl_c():
    "Python's own handler, which raises KeyboardInterrupt, whoever started the tests."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    return Kills(tmp_path_factory.mktemp("kills"))


# --- in this process ---


def test_interrupts_at_random_instructions_tear_nothing():
    counts = interrupts(60)
    assert counts["fits"] == 60 and counts["ended by run"] > 30, counts


def small(**fields):
    return TrainConfig(**{**dict(n_gaussians=8, height=24, width=32, n_iterations=12, device="cpu"), **fields})


def test_an_interrupt_within_a_step_comes_after_it(ctrl_c):
    def pressing(image, target):
        ctrl_c()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        return l2_loss(image, target)

    trainer = make_trainer(small(loss=pressing))
    for steps in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            trainer.step()
        assert trainer.steps_done == len(trainer.history) == steps
        whole(trainer)
    result = run(trainer, progress=False)
    assert result.interrupted and trainer.steps_done == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_autograd_left_off_does_not_spoil_a_later_fit():
    torch.set_grad_enabled(False)
    try:
        trainer = make_trainer(small())
        before = bytes_of(trainer.scene)
        list(trainer)
        assert bytes_of(trainer.scene) != before
    finally:
        torch.set_grad_enabled(True)


def test_a_handler_of_ones_own_and_other_threads_are_left_alone(ctrl_c):
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    trainer = make_trainer(small())
    ctrl_c()
    list(trainer)
    assert heard == [signal.SIGINT] and trainer.progress == 1
    mine = signal.getsignal(signal.SIGINT)

    def in_a_thread():
        list(make_trainer(small()))
        seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [mine]


def test_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.held(), signals.noted() as pressed:
            signal.raise_signal(signal.SIGINT)
        assert not pressed and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with signals.program() as told:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(signals.Stopped), signals.held():
                signal.raise_signal(signal.SIGTERM)
        assert told.heard == [signal.SIGTERM] and told.status == 143
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_after_the_last_step_ends_a_search(ctrl_c):
    truth, fits = GroundTruth.from_image(picture()), []

    def one(n_gaussians, steps):
        fits.append(fit_image(truth, n_gaussians, steps, progress=False))
        ctrl_c()
        return fits[-1]

    result = fewest_gaussians(one, 30.0, 12, 10, 700)
    assert result.interrupted and len(fits) == 1


def test_a_second_interrupt_ends_a_wrapper_that_takes_for_ever(ctrl_c):
    def slow(trainer, records):
        for record in records:
            ctrl_c()
            ctrl_c()
            time.sleep(3600)
            yield record

    trainer = make_trainer(small())
    result = run(trainer, slow, progress=False)
    assert result.interrupted and len(result.history) == 1


# --- files ---


def test_results_appear_together_or_not_at_all(tmp_path):
    result = run(make_trainer(small()), progress=False)
    result.save(tmp_path)
    before = read_all(tmp_path)
    again = run(make_trainer(small(seed=5)), progress=False)
    for name in RESULTS:  # each of them in the way, once
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match=name):
            again.save(tmp_path)
        (tmp_path / name).rmdir()
        (tmp_path / name).write_bytes(before[name])
        assert read_all(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == RESULTS
    again.save(tmp_path)
    check_results(tmp_path, "")
    assert read_all(tmp_path) != before


def test_what_was_killed_while_moving_is_settled(tmp_path):
    with pytest.raises(KeyboardInterrupt), appearing_together(tmp_path) as aside:
        (aside / "a").write_text("new")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").write_text("old")
    ready = tmp_path / ".results-ready"
    ready.mkdir()
    (ready / "a").write_text("new")
    with appearing_together(tmp_path) as aside:
        assert (tmp_path / "a").read_text() == "new"
        (aside / "b").write_text("b")
    settle(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_checkpoint_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    trainer = make_trainer(small())

    def full_disk(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(trainer, "save", full_disk)
    with pytest.warns(UserWarning, match="No space left on device.*goes on without this checkpoint"):
        result = run(trainer, keep_checkpoints(tmp_path / "run.safetensors", 5), progress=False)
    assert not result.interrupted and trainer.steps_done == 12


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now, saved = [100.0], []
    monkeypatch.setattr("gs2d.io.checkpoints.time.monotonic", lambda: now[0])
    trainer = make_trainer(small())
    monkeypatch.setattr(trainer, "save", lambda path: saved.append(trainer.steps_done))

    def ticking(trainer, records):
        for record in records:
            now[0] += 10
            yield record

    run(trainer, ticking, keep_checkpoints("x", every_seconds=30, from_second=60, at_end=False), progress=False)
    assert saved == [6, 9]


def test_writes_that_fail_lose_no_earlier_file():
    counts = full(3, seed=2)
    assert counts["refused, earlier results kept"] and sum(counts.values()) == 3, counts


# --- a command that is ended ---


def until(path: Path, process) -> None:
    "Wait for a file that the command writes."
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no {path} after a minute")


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_ended_in_the_middle_and_resumed(fits, number):
    name = f"middle-{number.name}"
    process = start(fits.folder, "photo.png", *fits.OPTIONS, "--out", name)
    until(fits.folder / name / "checkpoint.safetensors", process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    state = json.loads((fits.folder / name / "run.json").read_text())["state"]
    if number == signal.SIGKILL:
        assert (process.returncode, state) == (-number, "running")
    else:
        assert (process.returncode, state) == (128 + number, "stopped") and f"gs2d fit --resume {name} goes on" in said
        check_results(fits.folder / name, said)
    process = start(fits.folder, "--resume", name)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "goes on after" in said, said
    found = read_all(fits.folder / name)
    assert all(found[file] == fits.expected[file] for file in RESULTS if file not in ("history.csv", "metrics.json"))
    assert sorted(path.name for path in (fits.folder / name).iterdir()) == sorted([*RESULTS, "run.json"])


def test_ended_at_a_random_moment(fits):
    for number, wait in zip(ENDINGS, (0.4, 0.6, 0.7, 0.8)):
        fits.one(f"random-{number.name}", number, wait * fits.seconds)


def test_told_twice_it_leaves_at_once_and_says_what_there_is(fits):
    process = start(fits.folder, "photo.png", *fits.OPTIONS[2:], "--steps", 10**6, "--out", "twice")
    until(fits.folder / "twice" / "checkpoint.safetensors", process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (130, 143) and "Traceback" not in said, said
    found = read_all(fits.folder / "twice")
    if "ended at once" in said:
        assert ("no results were written; --resume twice goes on" in said) == (found == {}), said
        assert ("the results are in twice" in said) == (len(found) == 6), said
    else:
        assert len(found) == 6, said


def test_nobody_reads_what_it_says(fits):
    process = start(fits.folder, "photo.png", *fits.OPTIONS[:-1], "--out", "unread")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert all(read_all(fits.folder / "unread")[name] == fits.expected[name] for name in ("scene.json", "render.png"))


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed(fits, closed):
    name = f"closed-{len(closed)}"
    process = start(fits.folder, "photo.png", *fits.OPTIONS[:-1], "--out", name, shell=closed)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert read_all(fits.folder / name)["scene.json"] == fits.expected["scene.json"]


def test_a_terminal_that_closes_leaves_results(fits):
    parent, child = pty.openpty()
    process = start(fits.folder, "photo.png", *fits.OPTIONS[2:-1], "--steps", 10**6, "--out", "terminal", terminal=child)
    os.close(child)
    until(fits.folder / "terminal" / "checkpoint.safetensors", process)  # meanwhile it writes little: the window has no width
    os.close(parent)  # and with it the terminal: SIGHUP, and every write fails
    assert process.wait(timeout=120) == 129
    check_results(fits.folder / "terminal", "")


# --- the folder of a run ---


def test_two_fits_in_one_folder(fits):
    process = start(fits.folder, "photo.png", *fits.OPTIONS[2:], "--steps", 10**6, "--out", "shared")
    until(fits.folder / "shared" / "run.json", process)
    for arguments in (("photo.png", *fits.OPTIONS, "--out", "shared"), ("--resume", "shared")):
        second = start(fits.folder, *arguments)
        said, _ = second.communicate(timeout=120)
        assert second.returncode == 2 and f"in use by process {process.pid} on" in said, said
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    check_results(fits.folder / "shared", said)


def test_a_run_says_what_is_wrong_with_resuming_it(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        run.read()
    for text in (b"", b"{", b"\xff", b"[]", b'{"format": "gs2d-run"}', b"[" * 10**5):
        (tmp_path / "run.json").write_bytes(text)
        with pytest.raises(ValueError, match="expected the state of a run"):
            run.read()


def test_resuming_takes_another_picture_for_what_it_is(fits):
    name = "other"
    Image.fromarray((255 * picture(120, 160)).astype("uint8")).save(fits.folder / "mine.png")
    process = start(fits.folder, "mine.png", *fits.OPTIONS, "--checkpoint-every", "0", "--out", name)
    until(fits.folder / name / "run.json", process)
    process.kill()
    process.communicate()
    Image.new("RGB", (160, 120)).save(fits.folder / "mine.png")
    process = start(fits.folder, "--resume", name)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "expected the picture that the run began with" in said, said


def test_an_interrupt_before_the_first_step_is_not_forgotten(ctrl_c):
    with signals.noted() as pressed:
        with signals.held():  # as while a trainer is made
            ctrl_c()
        result = run(make_trainer(small()), progress=False)
    assert pressed and result.interrupted and len(result.history) <= 1
