"""End small fits at random moments, and see that nothing is torn: what is left is whole, and goes on to the same bytes.

    python tests/endings.py interrupts 2000        Ctrl-C at random instructions of fits in this process
    python tests/endings.py kills 100              SIGINT, SIGTERM, SIGHUP and SIGKILL at random moments of `gs2d fit`
    python tests/endings.py full 100               `gs2d fit` where files may have only so many bytes, over earlier results

Each prints how many fits it ended, and how; the first thing that is wrong is an AssertionError.
"""
import argparse
import collections
import contextlib
import fcntl
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gs2d
from gs2d.densify import DensifyConfig, ErrorGrowth
from gs2d.fit import fit_config
from gs2d.gaussians import PARAMETER_NAMES, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.train import TrainConfig, Trainer, make_trainer, run

RESULTS = ["comparison.png", "history.csv", "metrics.json", "render.png", "scene.json", "target.png"]
SAME = ["comparison.png", "render.png", "scene.json", "target.png"]  # nothing about time in them
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    "Slopes and an edge, (H, W, 3) in [0, 1]."
    y, x = np.mgrid[:height, :width]
    return np.stack([x / width, y / height, (x > width / 2) * 0.5 + 0.5 * np.sin(y / 3) ** 2], -1).astype(np.float32)


# --- Ctrl-C at random instructions, in this process ---


def recipes() -> list[TrainConfig]:
    "Fits of a few steps in which rows come and go in nearly every step."
    growing = DensifyConfig(every_n_steps=2, grad_threshold=1e-7, max_gaussians=40, stop_fraction=1.0)
    common = dict(n_gaussians=8, height=24, width=32, n_iterations=8, device="cpu")
    photo = fit_config(24, 32, 30, 10, loss="l1_ssim", device="cpu")
    return [TrainConfig(densify=growing, **common), TrainConfig(blend="over", densify=growing, loss="l2", **common), photo,
            TrainConfig(blend="additive", densify=ErrorGrowth(rounds=4, max_gaussians=30), init_level="content", **common)]


class AfterInstructions:
    "Raises SIGINT after so many instructions of Python's, in every function that is called within the block."

    def __init__(self, n: int):
        self.left = n

    def __call__(self, frame, event, argument):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def whole(trainer: Trainer) -> None:
    "Nothing of a trainer is torn: its rows, its optimiser's and its history fit together."
    n = len(trainer.scene)
    for group in trainer.optimizer.param_groups:
        (parameter,) = group["params"]
        assert parameter is getattr(trainer.scene, group["name"]) and len(parameter) == n
        state = trainer.optimizer.state.get(parameter, {})
        assert all(state[key].shape == parameter.shape for key in ("exp_avg", "exp_avg_sq") if key in state)
    assert len(trainer.densification.state_dict()["norms"]) == n
    assert [record.step for record in trainer.history] == list(range(trainer.steps_done))
    assert trainer.steps_done == 0 or trainer.history[-1].n_gaussians == n


def bytes_of(scene: Gaussians2D) -> list[bytes]:
    return [getattr(scene, name).detach().numpy().tobytes() for name in PARAMETER_NAMES]


def interrupts(n: int, seed: int = 0) -> collections.Counter:
    "Interrupt n fits, each after a random number of instructions; then go on with each of them."
    rng, counts = random.Random(seed), collections.Counter()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    truth, cases = GroundTruth.from_image(picture()), []
    try:
        for config in recipes():
            for counter in (contextlib.nullcontext(), AfterInstructions(sys.maxsize)):  # the first loads the kernels
                straight = make_trainer(config, ground_truth=truth)
                with counter:
                    run(straight, progress=False)
            cases.append((config, bytes_of(straight.scene), sys.maxsize - counter.left))
        for k in range(n):
            config, expected, instructions = cases[k % len(cases)]
            counts["fits"] += 1
            trainer = make_trainer(config, ground_truth=truth)
            try:
                with AfterInstructions(rng.randrange(1, int(1.02 * instructions))):
                    result = run(trainer, progress=False)
                counts["ended by run" if result.interrupted else "came to their end"] += 1
            except KeyboardInterrupt:  # just before `run` takes notice, or just after it
                counts["at the edge of run"] += 1
            counts["autograd left off"] += not torch.is_grad_enabled()  # a step turns it on for itself
            torch.set_grad_enabled(True)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            whole(trainer)
            for _ in trainer:  # goes on as if nothing had happened
                pass
            assert bytes_of(trainer.scene) == expected, f"interrupt {k} changed the fit of {config}"
    finally:
        signal.signal(signal.SIGINT, before)
    return counts


# --- a command that is ended ---


def start(folder: Path, *arguments, limit: int | None = None, shell: str = "", terminal: int | None = None) -> subprocess.Popen:
    """`gs2d fit` in a process of its own.

    With a limit, no file may have more bytes; `shell` is what a shell is told about its streams; or it has a terminal.
    """
    command = [sys.executable, "-m", "gs2d", "fit", *map(str, arguments)]
    command = ["sh", "-c", f"exec {shlex.join(command)} {shell}"] if shell else command
    environment = {**os.environ, "PYTHONPATH": str(Path(gs2d.__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def prepared():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if terminal is not None:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if terminal is not None:
        streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    return subprocess.Popen(
        command, text=True, cwd=folder, env=environment, preexec_fn=prepared, start_new_session=terminal is not None, **streams)


def read_all(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS if (run / name).exists()}


def check_results(run: Path, said: str) -> None:
    "Six files that belong together."
    metrics, scene = json.loads((run / "metrics.json").read_text()), Gaussians2D.load(run / "scene.json")
    rows = (run / "history.csv").read_text().splitlines()
    assert len(rows) == metrics["steps"] + 1 and len(scene) == metrics["n_gaussians"], said
    for name in ("render.png", "target.png", "comparison.png"):
        Image.open(run / name).load()


def check_folder(run: Path, said: str) -> str:
    "Whatever happened, what has a final name is whole. Says what there is."
    if not run.is_dir():
        return "nothing"
    state = json.loads((run / "run.json").read_text())["state"] if (run / "run.json").exists() else "none"
    present = read_all(run)
    ready = run / ".results-ready"
    if not ready.exists():
        assert len(present) in (0, 6), f"{sorted(present)}: {said}"
        if present:
            check_results(run, said)
    if state == "complete":
        assert len(present) == 6 and not (run / "checkpoint.safetensors").exists(), said
    if (run / "checkpoint.safetensors").exists():
        Trainer.load(run / "checkpoint.safetensors").step()
        return f"{state}, with a checkpoint"
    return state


class Kills:
    "A fit that takes a few seconds, and what it ends with when nobody disturbs it."

    OPTIONS = ("--steps", 600, "--n-gaussians", 40, "--device", "cpu", "--checkpoint-every", "0.2s", "-q")

    def __init__(self, folder: Path):
        self.folder = folder
        Image.fromarray((255 * picture(120, 160)).astype(np.uint8)).save(folder / "photo.png")
        for name in ("first", "straight"):  # the first one may have to compile the kernels
            began = time.monotonic()
            process = start(folder, "photo.png", *self.OPTIONS, "--out", name)
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
            self.seconds = time.monotonic() - began
        self.expected = read_all(folder / "straight")

    def one(self, name: str, number: signal.Signals, wait: float) -> tuple[str, int]:
        "Start it, end it after so many seconds, and resume it until it is complete."
        run = self.folder / name
        process = start(self.folder, "photo.png", *self.OPTIONS, "--out", name)
        time.sleep(wait)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        left = check_folder(run, said)
        assert process.returncode in (0, -number, 128 + number), (process.returncode, said)
        assert "Traceback" not in said, said
        if number != signal.SIGKILL and process.returncode == 128 + number and "nothing was written" not in said:
            assert left.startswith(("stopped", "complete")), (left, said)
        if left != "complete":
            again = ("--resume", name) if (run / "run.json").exists() else ("photo.png", *self.OPTIONS, "--out", name)
            process = start(self.folder, *again)
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
        found = read_all(run)
        assert all(found[file] == self.expected[file] for file in SAME), said
        assert sorted(path.name for path in run.iterdir()) == sorted([*RESULTS, "run.json"]), said
        return left, process.returncode


def kills(n: int, seed: int = 0) -> collections.Counter:
    "End n commands with the four signals at random moments."
    rng, counts = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        fits = Kills(Path(folder))
        for k in range(n):
            number = ENDINGS[k % len(ENDINGS)]
            left, _ = fits.one(f"run-{k}", number, fits.seconds * rng.betavariate(3, 1.5))
            counts[f"{number.name}: {left}"] += 1
    return counts


def full(n: int, seed: int = 0) -> collections.Counter:
    "Replace earlier results n times, where no file may have more than a random number of bytes."
    rng, counts = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        fits = Kills(folder)
        options = (*fits.OPTIONS, "--steps", 40, "--overwrite", "--seed")
        largest = max(map(len, fits.expected.values()))
        for k in range(n):
            before, limit = read_all(folder / "straight"), int(rng.uniform(0, 1.3) * largest) + 200
            process = start(folder, "photo.png", *options, k + 1, "--out", "straight", limit=limit)
            said, _ = process.communicate(timeout=120)
            after = read_all(folder / "straight")
            assert len(after) == 6 and "Traceback" not in said, said
            check_results(folder / "straight", said)
            hidden = [path.name for path in (folder / "straight").iterdir() if path.name.startswith(".")]
            assert hidden == [], (hidden, said)
            if process.returncode:
                assert process.returncode == 2 and after == before, said
                counts["refused, earlier results kept"] += 1
            else:
                counts["written"] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["interrupts", "kills", "full"])
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for ending, times in sorted(globals()[given.what](given.n, given.seed).items()):
        print(f"{times:6,}  {ending}")
