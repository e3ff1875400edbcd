"""The estimate of memory against whole processes, what limits a process, and a refusal before anything is allocated."""
import re
import subprocess
import sys

import psutil
import pytest
import torch

from gs2d import memory
from gs2d.gaussians import Blend
from gs2d.memory import available_bytes, check_memory, rendering_bytes, training_bytes

MEASURE = """
import sys, torch
from gs2d.fit import fit_config
from gs2d.ground_truth import GroundTruth
from gs2d.renderer import render
from gs2d.train import make_trainer

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

def fit(n, side):
    truth = GroundTruth.from_image(torch.rand(side, side, 3, generator=torch.Generator().manual_seed(0)))
    trainer = make_trainer(fit_config(side, side, n, 6, loss="l1_ssim", device="cpu"), ground_truth=truth)
    for _ in range(5):
        trainer.step()

def draw(n, side):
    with torch.no_grad():
        render(GroundTruth.random(n, 8, 8, seed=0).scene, side, side)

work, n, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
globals()[work](40, 48)
before = peak()
globals()[work](n, side)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak where Linux writes it")
@pytest.mark.parametrize("work, n, side", [("fit", 300_000, 64), ("fit", 500, 1024), ("draw", 400_000, 256)])
def test_the_estimate_bounds_what_a_process_takes_and_is_not_far_above(work, n, side):
    done = subprocess.run([sys.executable, "-c", MEASURE, work, str(n), str(side)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.split()[-1])
    estimate = training_bytes(n, side, side) if work == "fit" else rendering_bytes(n, side, side)
    assert taken <= estimate <= 2 * taken + memory._BASE


def test_more_of_anything_never_takes_less():
    for estimate in (training_bytes, rendering_bytes):
        sizes = [estimate(n, side, 2 * side, channels) for n, side, channels in ((1, 1, 1), (9, 1, 1), (9, 8, 1), (9, 8, 3), (9, 8, 4))]
        assert sizes == sorted(sizes) and all(isinstance(size, int) for size in sizes)
    plain = training_bytes(9, 99, 99, content=False)
    assert plain < training_bytes(9, 99, 99) < training_bytes(9, 99, 99, scored=True)
    assert training_bytes(9, 9, 9, blend=Blend.OVER) == training_bytes(9, 9, 9, blend="over")


@pytest.mark.parametrize("arguments", [(0, 8, 8), (8, 0, 8), (8, 8, 2.5), (8, 8, 8, 0), (8, 8, 8, 3, "mixed"), (True, 8, 8)])
def test_odd_sizes_are_refused(arguments):
    for estimate in (training_bytes, rendering_bytes):
        with pytest.raises((TypeError, ValueError)):
            estimate(*arguments)


@pytest.mark.parametrize("estimate", [training_bytes, rendering_bytes])
@pytest.mark.parametrize("free", [10**8, 10**9, 2 * 10**10])
def test_what_does_not_fit_is_refused_with_a_number_that_does(estimate, free, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    with pytest.raises(MemoryError, match="n_gaussians: 1,000,000,000 Gaussians on 64×48 pixels need about .* GB, and .* GB are free; about") as caught:
        check_memory(estimate, 10**9, 48, 64)
    fits = int(re.search(r"about ([\d,]+) would fit", str(caught.value))[1].replace(",", ""))
    check_memory(estimate, fits, 48, 64)
    assert estimate(int(1.1 * fits), 48, 64) > free, "and not many more would"


def test_a_picture_that_is_too_large_is_refused_with_a_size_that_fits(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    with pytest.raises(MemoryError, match="^80,000×40,000 pixels need about") as caught:
        check_memory(training_bytes, 100, 40_000, 80_000, channels=4)
    side = int(re.search(r"longer side of ([\d,]+) would fit", str(caught.value))[1].replace(",", ""))
    check_memory(training_bytes, 1, side // 2, side, channels=4)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10)
    with pytest.raises(MemoryError, match="close other programs"):
        check_memory(training_bytes, 100, 40, 80)


def test_a_refusal_allocates_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    for name in ("empty", "zeros", "rand"):
        monkeypatch.setattr(torch, name, lambda *arguments, **options: pytest.fail("it allocates"))
    before = psutil.Process().memory_info().rss
    with pytest.raises(MemoryError):
        check_memory(training_bytes, 10**12, 10**5, 10**5)
    assert psutil.Process().memory_info().rss - before < 20e6


def test_the_machine_its_groups_and_the_process_itself_limit_what_is_available(monkeypatch):
    assert 0 < available_bytes() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_free_in_groups", lambda: [123, 456])
    assert available_bytes() == 123
    monkeypatch.setattr(memory, "_free_in_groups", lambda: [-5])
    assert available_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_a_limit_of_the_shell_counts():
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30,) * 2); from gs2d.memory import available_bytes; print(available_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and 0 <= int(done.stdout) < 3 << 30, done.stderr


@pytest.mark.parametrize("line, folder, names", [
    ("0::/box/inner", "", ("memory.max", "memory.current", "inactive_file")),
    ("4:memory:/box/inner", "memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ("4:cpu,memory:/box/inner", "memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
])
def test_control_groups_of_both_versions_are_read_with_those_around_them(line, folder, names, tmp_path):
    limit, usage, files = names
    (tmp_path / "cgroup").write_text(f"12:cpuset:/\n{line}\n7:devices:/\n")
    inner = tmp_path / folder / "box" / "inner"
    inner.mkdir(parents=True)
    free = lambda: memory._free_in_groups(tmp_path / "cgroup", tmp_path)
    assert free() == []
    (inner / limit).write_text("9000\n")
    (inner / usage).write_text("4000\n")
    (inner.parent / limit).write_text("max\n")
    assert free() == [5000]
    (inner / "memory.stat").write_text(f"anon 3000\n{files} 1000\n")
    (inner.parent / limit).write_text("5000\n")
    (inner.parent / usage).write_text("4900\n")
    assert free() == [6000, 100]
    assert memory._free_in_groups(tmp_path / "none", tmp_path) == []


def test_what_a_run_has_taken_already_is_not_asked_for_again(monkeypatch):
    whole, half = training_bytes(10**6, 64, 64), training_bytes(5 * 10**5, 64, 64)
    monkeypatch.setattr(memory, "available_bytes", lambda: whole - half)  # the rest of the machine is this run's
    memory.check_growth(5 * 10**5, 10**6, 64, 64, 3)
    with pytest.raises(MemoryError, match="would fit"):
        memory.check_growth(5 * 10**5, 2 * 10**6, 64, 64, 3)
