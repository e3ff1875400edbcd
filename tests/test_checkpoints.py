"""Files and checkpoints: written whole or not at all, told apart from damaged ones, and a run restored is one that can go on."""
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_scene
from safetensors.torch import load, save

from gs2d.densify import DensifyConfig
from gs2d.gaussians import Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.io import files
from gs2d.io.checkpoints import read_checkpoint, write_checkpoint
from gs2d.io.files import atomic_write
from gs2d.resume import trainer_state
from gs2d.train import TrainConfig, Trainer, make_trainer

CONFIG = TrainConfig(8, 24, 32, n_iterations=12, device="cpu", densify=DensifyConfig(every_n_steps=3, grad_threshold=1e-6))


def trained(steps=4, config=CONFIG, **given):
    trainer = make_trainer(config, **given)
    for _ in range(steps):
        trainer.step()
    return trainer


def names_in(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


# ── files ─────────────────────────────────────────────────────────────────────

def fails(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "/somewhere/.a.txt.0123.tmp")
    return fail


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EACCES])
def test_an_error_names_the_file_that_was_wanted(tmp_path, monkeypatch, where, number):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    monkeypatch.setattr(os, where, fails(number))
    with pytest.raises(OSError) as caught:
        atomic_write(path, b"two")
    assert caught.value.errno == number and caught.value.filename == str(path)
    assert ".tmp" not in str(caught.value) and "nothing was written" in str(caught.value)
    assert path.read_bytes() == b"one" and names_in(tmp_path) == ["a.txt"]


def test_a_file_that_grows_too_large_is_an_error_with_its_name(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from gs2d.io.files import atomic_write
path = Path(sys.argv[1]) / "a.bin"
atomic_write(path, b"one")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic_write(path, bytes(5000))
except OSError as error:
    assert error.filename == str(path), error
    assert path.read_bytes() == b"one"
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr
    assert names_in(tmp_path) == ["a.bin"]


def test_the_data_reach_the_disk_before_the_name_and_the_name_too(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    atomic_write(tmp_path / "a", b"x")
    assert done == ["file", "rename", "folder"]


def test_a_file_system_that_cannot_wait_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    assert atomic_write(tmp_path / "a", b"x").read_bytes() == b"x"


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"got a folder: {tmp_path}"):
        atomic_write(tmp_path, b"x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="got a device"):
        atomic_write(tmp_path / "pipe", b"x")
    assert names_in(tmp_path) == ["pipe"] and not (tmp_path / "pipe").is_file()


def test_a_long_name_can_be_written(tmp_path):
    for name in ("a" * 250 + ".png", "ä" * 125):
        assert atomic_write(tmp_path / name, b"x").name == name


def test_an_interrupt_at_any_line_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    at, n_events, interrupted = [0], 1, 0

    def trace(frame, event, _):
        if frame.f_code.co_filename != files.__file__:
            return trace if "contextlib" in frame.f_code.co_filename else None
        frame.f_trace_opcodes = True
        at[0] += 1
        if at[0] == n_events:
            raise KeyboardInterrupt
        return trace

    while True:
        path.write_bytes(b"one")
        at[0], before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            atomic_write(path, b"two")
            sys.settrace(before)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        assert names_in(tmp_path) == ["a.txt"], f"after event {n_events}"
        assert path.read_bytes() in (b"one", b"two")
        n_events += 1
    assert interrupted > 100 and path.read_bytes() == b"two" and names_in(tmp_path) == ["a.txt"]


# ── the file of a checkpoint ──────────────────────────────────────────────────

def test_a_loaded_trainer_does_not_depend_on_its_file(tmp_path):
    path = trained().save(tmp_path / "x.safetensors")
    loaded = Trainer.load(path)
    before = [values.clone() for values in trainer_state(loaded)[0].values()]
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(*both) for both in zip(before, trainer_state(loaded)[0].values()))
    loaded.step()


def test_a_loaded_trainer_survives_the_end_of_its_file(tmp_path):
    path = trained().save(tmp_path / "x.safetensors")
    script = "import os, sys; from gs2d.train import Trainer; t = Trainer.load(sys.argv[1]); os.truncate(sys.argv[1], 0); t.step()"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, signal.Signals(-done.returncode) if done.returncode < 0 else done.stderr)


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    path, rng = trained().save(tmp_path / "x.safetensors"), np.random.default_rng(0)
    whole = path.read_bytes()
    for place in rng.integers(0, len(whole), 300):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            Trainer.load(path)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 300 + len(str(path)) and "\n" not in str(error)
        else:  # a character of the header that is only space, say
            expected = load(whole)
            assert all(torch.equal(expected[name], tensor) for name, tensor in load(bytes(data)).items())


def test_a_checkpoint_of_version_3_is_read_and_an_older_one_says_what_to_do(tmp_path):
    tensors, about = trainer_state(trained())
    for version, can in ((3, True), (2, False), (4, False)):
        metadata = {"gs2d-checkpoint": json.dumps({"format": "gs2d-checkpoint", "version": version} | about)}
        data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
        (tmp_path / "old.safetensors").write_bytes(data)
        if can:
            Trainer.load(tmp_path / "old.safetensors").step()
        else:
            with pytest.raises(ValueError, match="damaged" if version == 4 else "the gs2d that wrote it can finish it"):
                Trainer.load(tmp_path / "old.safetensors")


def header_of(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("data", [
    header_of(b"{}"), header_of(b'{"__metadata__": {"gs2d-checkpoint": "[]"}}'), header_of(b'{"__metadata__": {"gs2d-checkpoint": "3"}}'),
    header_of(b'{"__metadata__": {"gs2d-checkpoint": "' + b"[" * 90_000 + b'"}}'), header_of(b'{"__metadata__": null}'), b"", b"\xff" * 9,
    header_of(b'{"__metadata__": {"gs2d-checkpoint": "{\\"version\\": ' + b"9" * 5000 + b'}"}}'), header_of(b"\xff\xfe"),
    header_of(b'{"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}', bytes(4)),
    header_of(b'{"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}', bytes(2)),
    header_of(b'{"x": {"dtype": "F32", "shape": [0, 4611686018427387904, 4611686018427387904], "data_offsets": [0, 0]}}')])
def test_whatever_is_no_checkpoint_is_one_kind_of_error(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="expected") as caught:
        Trainer.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_the_checksum_is_over_everything(tmp_path):
    path = write_checkpoint(tmp_path / "x.safetensors", {"a": torch.zeros(2, 3), "b": torch.ones(())}, {"n": 1, "text": "x"})
    about = json.loads(json.loads(path.read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")["__metadata__"]["gs2d-checkpoint"])
    whole = {"a": torch.zeros(2, 3), "b": torch.ones(())}
    for tensors, json_too in (
        ({"a": torch.zeros(3, 2)}, {}), ({"b": torch.ones((), dtype=torch.int32)}, {}), ({"c": torch.zeros(0)}, {}), ({}, {"n": 2}),
        ({}, {"new": None}), ({"b": torch.tensor(1.0000001)}, {})):
        path.write_bytes(save(whole | tensors, {"gs2d-checkpoint": json.dumps(about | json_too)}))
        with pytest.raises(ValueError, match="checksum"):
            read_checkpoint(path)
    path.write_bytes(save(whole, {"gs2d-checkpoint": json.dumps(dict(reversed(about.items())))}))
    assert read_checkpoint(path)[1]["n"] == 1  # the order of the keys is nothing


# ── what is in it ─────────────────────────────────────────────────────────────

def changed(name, change):
    def apply(tensors, about):
        tensors[name] = change(tensors[name])
    return apply


def said(**lies):
    return lambda tensors, about: about.update(lies)


def dropped(name):
    return lambda tensors, about: tensors.pop(name)


@pytest.mark.parametrize("damage, words", [
    (changed("adam.means.exp_avg", lambda t: t[1:]), "adam.means.exp_avg"), (changed("adam.colors.exp_avg_sq", lambda t: -t - 1), "adam.colors"),
    (changed("adam.means.step", lambda t: t * 0 - 1), "adam.means.step"), (changed("adam.means.step", lambda t: t / 0), "adam.means.step"),
    (changed("adam.rotations.exp_avg", lambda t: t.double()), "adam.rotations"), (dropped("adam.rotations.exp_avg"), "adam.rotations.exp_avg"),
    (dropped("scene.means"), "scene.means"), (dropped("truth.image"), "truth.image"), (dropped("history"), "history"),
    (dropped("truth.scene.colors"), "truth.scene.colors"), (dropped("densification.generator"), "densification.generator"),
    (changed("scene.colors", lambda t: t / 0), "scene.colors"), (changed("scene.colors", lambda t: t[:, :2]), "channels|background"),
    (changed("scene.means", lambda t: t.long()), "scene.means"), (changed("scene.log_scales", lambda t: t[0]), "scene.log_scales"),
    (changed("truth.image", lambda t: t[0]), "truth.image"), (changed("truth.image", lambda t: t[:0]), "height"),
    (changed("truth.image", lambda t: t * torch.nan), "truth.image"), (changed("history", lambda t: t[1:]), "history"),
    (changed("history", lambda t: t.flip(0)), "history"), (changed("history", lambda t: t[:, 1:]), "history"), (changed("history", lambda t: t / 0), "history"),
    (changed("densification.generator", lambda t: t * 0), "generator"), (changed("densification.generator", lambda t: t[1:]), "generator"),
    (changed("densification.norms", lambda t: t[1:]), "norms"), (changed("densification.counts", lambda t: t - 1e9), "counts"),
    (lambda tensors, about: tensors.update(other=torch.zeros(1)), "other"), (lambda tensors, about: about.pop("config"), "config"),
    (said(steps_done=-1), "steps_done"), (said(steps_done=3), "history"), (said(steps_done=10**400), "steps_done"), (said(steps_done=4.0), "steps_done"),
    (said(seconds_spent="a"), "seconds_spent"), (said(seconds_spent=10**400), "seconds_spent"), (said(seconds_spent=-1), "seconds_spent"),
    (said(grown_until=2), "grown_until"), (said(domain=5), "expected"), (said(domain=[[1, 0], [0, 1]]), "x_dim"), (said(truth_domain={"a": 1}), "expected"),
    (said(background=[1]), "background"), (said(background=[1e39] * 3), "background"), (said(blend=[]), "blend"), (said(blend="x" * 10**6), "blend"),
    (said(config=[]), "expected"), (said(config={"n_gaussians": "x" * 10**6}), "n_gaussians"), (said(config={"densify": {"strategy": []}}), "strategy"),
    (said(config={"densify": {"x" * 10**6: 1}}), "expected"), (said(config={"a": 1}), "'a'"), (said(config={"lr": 10**400}), "lr"),
    (said(config={"lr_scale": {"fog": 1}}), "lr_scale")])
def test_what_does_not_fit_a_run_is_refused_by_name(tmp_path, damage, words):
    tensors, about = trainer_state(trained())
    damage(tensors, about)
    path = write_checkpoint(tmp_path / "x.safetensors", tensors, about)
    with pytest.raises(ValueError, match=words) as caught:
        Trainer.load(path)
    assert len(str(caught.value)) < 300 + len(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("n, channels", [(0, 3), (1, 1), (5, 4)])
def test_what_a_trainer_writes_can_be_read_whatever_the_scene(tmp_path, steps, n, channels):
    truth = GroundTruth(torch.rand(16, 20, channels), None, make_scene(1).domain)
    trainer = Trainer(truth, make_scene(n, channels=channels), CONFIG)
    for _ in range(steps):
        trainer.step()
    loaded = Trainer.load(trainer.save(tmp_path / "x.safetensors"))
    assert [a.tolist() for a in loaded.scene.parameters()] == [a.tolist() for a in trainer.scene.parameters()]
    assert loaded.history == trainer.history
    loaded.step()
    assert isinstance(loaded.result().scene, Gaussians2D)


def test_a_perfect_picture_has_an_infinite_psnr_and_its_run_can_be_resumed(tmp_path):
    truth = GroundTruth(torch.zeros(16, 20, 3), None, make_scene(1).domain)
    scene = make_scene(3)
    with torch.no_grad():
        scene.colors.zero_()
    trainer = Trainer(truth, scene, TrainConfig(n_iterations=5, device="cpu", loss="l2"))
    assert trainer.step().psnr == float("inf")
    assert Trainer.load(trainer.save(tmp_path / "x.safetensors")).history == trainer.history
