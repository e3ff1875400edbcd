"""Measure speed and memory side by side with the obvious alternatives, in one run: `make bench`.

Every number is a median over repeats on this machine, now; every comparison is a ratio within the same run.
Prints tables, and writes results.json and pairs.png into --out.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import gs2d
from gs2d.gaussians import Blend, Domain2D, Gaussians2D
from gs2d.kernels import operators
from gs2d.loss import l1_loss, l2_loss, ssim_map
from gs2d.measure import visited_pairs
from gs2d.memory import rendering_bytes, training_bytes
from gs2d.renderer import WEIGHT_EPS, project, rasterize, render

HERE = Path(__file__).parent


def measure(function, seconds=1.5, repeats=(3, 200)):
    "Median seconds of one call, and the number of calls; one warm-up. A slow function is called fewer times."
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    if first > 10 * seconds:
        return first, 1
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < repeats[0] or (time.perf_counter() < deadline and len(times) < repeats[1]):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times)


def make_scene(n, height, width, sigma_px, seed=0):
    "n Gaussians spread over the image, with scales around sigma_px pixels."
    g = torch.Generator().manual_seed(seed)
    domain = Domain2D.for_image(height, width)
    unit = domain.width / width
    rand = torch.rand(n, 9, generator=g)
    return Gaussians2D.from_values(
        (rand[:, :2] - 0.5) * torch.tensor([domain.width, domain.height]), sigma_px * unit * (0.7 + 0.6 * rand[:, 2:4]),
        math.pi * rand[:, 4], 0.2 + 0.7 * rand[:, 5], rand[:, 6:], domain)


def make_target(height, width, seed=1):
    "A smooth random picture."
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 9, generator=g)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0).contiguous()


def dense_render(scene, height, width):
    "What most tutorials teach: one (N, H, W) tensor per quantity, and autograd. Weighted blending, no cut-off."
    means, shapes, opacities, colors = project(scene, height, width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dx, dy = x - means[:, 0, None, None], y - means[:, 1, None, None]
    a, b, c = shapes.T[:, :, None, None]
    weights = opacities[:, None, None] * torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
    return torch.einsum("nhw,nc->hwc", weights, colors) / (weights.sum(0)[..., None] + WEIGHT_EPS)


def dissimilarity(image, target, backend):
    "1 - SSIM as training takes it, of a picture that is not clamped."
    return operators.photometric(image, target, 0.0, 1.0) if backend == "auto" else 1 - ssim_map(image, target).mean()


def mixed_loss(image, target, backend):
    return 0.15 * l1_loss(image, target) + 0.85 * dissimilarity(image, target, backend)


def training_step(scene, target, draw, loss):
    "A function that does one whole step: render, loss, backward, Adam."
    scene = scene.clone()
    optimizer = torch.optim.Adam(scene.parameters(), lr=1e-4, fused=True)
    height, width, _ = target.shape

    def step():
        optimizer.zero_grad()
        loss(draw(scene, height, width), target).backward()
        optimizer.step()

    return step


def bench_steps(quick):
    "A whole training step: the dense formulation, the same compiled, our reference, our kernels."
    def peers(mixed):
        slow, fast = (mixed_loss, "reference"), (mixed_loss, "auto")
        if not mixed:
            slow = fast = (lambda image, target, _: l2_loss(image, target), None)
        make = lambda draw, loss: lambda scene, target: training_step(scene, target, draw, lambda i, t: loss[0](i, t, loss[1]))
        return {
            "dense": make(dense_render, slow),
            "dense, torch.compile": make(torch.compile(dense_render), slow),
            "reference": make(lambda *a: render(*a, backend="reference"), slow),
            "kernels": make(render, fast)}

    rows = []
    cases = [(500, 256, 256, 8.0, True), (100, 220, 330, 12.0, True), (9_000, 512, 768, 4.0, False)]
    for n, height, width, sigma, mixed in cases:
        scene, target = make_scene(n, height, width, sigma), make_target(height, width)
        row = dict(case=f"{n:,} on {width}×{height}, {'L1 + SSIM' if mixed else 'L2'}", unit="ms a step")
        for name, make in peers(mixed).items():
            if name.startswith("dense") and n * height * width > 2e8:
                row[name] = None  # one (N, H, W) tensor alone would be 14 GB
                continue
            if quick and name != "kernels":
                continue
            seconds, repeats = measure(make(scene, target))
            row[name], row[f"{name} repeats"] = 1000 * seconds, repeats
        rows.append(row)
    return rows


def cpp_baseline():
    "The C++ version of baseline.cpp, compiled here and now; None where there is no compiler."
    if shutil.which("g++") is None:
        return None
    library = Path(tempfile.mkdtemp()) / "baseline.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, str(HERE / "baseline.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def cpp_times(library, screen, height, width, grad, seconds):
    "Seconds of the C++ version's forward and backward pass over a sum of Gaussians, with as many threads as PyTorch."
    values = screen.opacities[:, None] * screen.colors
    n, k = values.shape
    arrays = [t.detach().contiguous().numpy() for t in (screen.means, screen.conics, values, grad.permute(2, 0, 1))]
    image, grads = np.empty((k, height, width), np.float32), np.empty((n, 6 + k), np.float32)
    means, shapes, inks, slopes, image, grads = (a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, image, grads))
    size, threads = (n, k, height, width), torch.get_num_threads()
    forward, _ = measure(lambda: library.splat_forward(*size, means, shapes, inks, image, threads), seconds)
    backward, _ = measure(lambda: library.splat_backward(*size, means, shapes, inks, slopes, grads, threads), seconds)
    return forward, backward


def bench_pairs(quick):
    "Nanoseconds per visited pixel–Gaussian pair of the compiled kernels, forward and backward, beside plain C++."
    rows, library = [], cpp_baseline()
    for n, height, width, sigma in [(500, 256, 256, 8.0), (5_000, 512, 768, 5.0), (50_000, 512, 768, 2.0)]:
        scene = make_scene(n, height, width, sigma)
        pairs = visited_pairs(scene, height, width)
        for blend in Blend:
            screen = type(project(scene, 1, 1))(*(t.detach().requires_grad_() for t in project(scene, height, width)))
            grad = torch.rand(height, width, 3)
            with torch.no_grad():
                forward, _ = measure(lambda: rasterize(screen, height, width, blend), 0.3 if quick else 1.5)
            image = rasterize(screen, height, width, blend)
            backward, repeats = measure(lambda: torch.autograd.grad(image, screen, grad, retain_graph=True), 0.3 if quick else 1.5)
            row = dict(case=f"{n:,} on {width}×{height}, σ ≈ {sigma:g} px", blend=blend.value, pairs=pairs, repeats=repeats,
                       forward_ns=1e9 * forward / pairs, backward_ns=1e9 * backward / pairs)
            if library and blend is Blend.ADDITIVE:
                forward, backward = cpp_times(library, screen, height, width, grad, 0.3 if quick else 1.5)
                row |= {"C++ forward_ns": 1e9 * forward / pairs, "C++ backward_ns": 1e9 * backward / pairs}
            rows.append(row)
    return rows


def bench_ssim(quick):
    "SSIM with its gradient on 768×512: pytorch-msssim, our reference, our kernels."
    from pytorch_msssim import ssim as peer_ssim

    target, image = make_target(512, 768), make_target(512, 768, seed=2).requires_grad_()
    ways = {
        "pytorch-msssim": lambda: peer_ssim(image.permute(2, 0, 1)[None], target.permute(2, 0, 1)[None], data_range=1.0),
        "reference": lambda: 1 - dissimilarity(image, target, "reference"),
        "kernels": lambda: 1 - dissimilarity(image, target, "auto")}
    row = dict(case="SSIM and its gradient, 768×512", unit="ms")
    for name, way in ways.items():
        row[name] = 1000 * measure(lambda: torch.autograd.grad(way(), image))[0]
    row["largest difference of the value"] = max(abs(ways["pytorch-msssim"]().item() - ways[w]().item()) for w in ("reference", "kernels"))
    return [row]


def bench_scaling(quick):
    "Render and backward against N, image size and threads; the milliseconds against the visited pairs."
    rows, threads = [], torch.get_num_threads()
    sweep = [("N", n, 512, threads) for n in (250, 1_000, 4_000, 16_000)]
    sweep += [("size", 2_000, side, threads) for side in (128, 256, 512, 1024)]
    sweep += [("threads", 4_000, 512, t) for t in sorted({1, 2, os.cpu_count()} & set(range(1, os.cpu_count() + 1)))]
    for what, n, side, count in sweep:
        torch.set_num_threads(count)
        scene = make_scene(n, side, side, sigma_px=5.0)
        target = make_target(side, side)
        seconds, _ = measure(training_step(scene, target, lambda *a: render(*a, Blend.ADDITIVE), l2_loss), 0.3 if quick else 1.0)
        rows.append(dict(sweep=what, n=n, side=side, threads=count, ms=1000 * seconds,
                         pairs=visited_pairs(scene, side, side)))
    torch.set_num_threads(threads)
    return rows


def fit_line(rows, out):
    "Least squares of milliseconds against pairs over the sweep of N; draws it."
    from matplotlib.figure import Figure

    x, y = (np.array([row[key] for row in rows if row["sweep"] == "N"]) for key in ("pairs", "ms"))
    slope, offset = np.polyfit(x, y, 1)
    r2 = 1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    figure = Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    ax = figure.subplots()
    ax.plot(x / 1e6, y, "o", label="measured")
    ax.plot(x / 1e6, slope * x + offset, label=f"{offset:.2f} ms + {1e6 * slope:.2f} ns per pair, R² = {r2:.4f}")
    ax.set(xlabel="visited pairs, millions", ylabel="ms a step", title="A step costs what the visited pairs cost")
    ax.legend(frameon=False)
    figure.savefig(out / "pairs.png")
    return dict(ns_per_pair=1e6 * slope, offset_ms=offset, r_squared=r2)


MEMORY_CODE = """
import resource, sys, tempfile, torch
sys.path.insert(0, {here!r})
from run import make_scene, make_target
import gs2d
from gs2d.fit import fit_config
from gs2d.gaussians import Domain2D
from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import save_picture, viewable
from gs2d.train import TrainConfig, make_trainer

def peak():
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with open("/proc/self/status") as status:  # Linux's ru_maxrss begins with what the parent process held
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

def target(height, width, channels):
    image = torch.cat([make_target(height, width), torch.ones(height, width, 1)], -1)[..., :channels].contiguous()
    return GroundTruth(image, None, Domain2D.for_image(height, width), {blend!r}, (0.0,) * channels)

def fit(n, height, width, channels):
    options = dict(steps=6, loss="l1_ssim", blend={blend!r})
    trainer = make_trainer(fit_config(height, width, n, **options), ground_truth=target(height, width, channels))
    for _ in range(5):
        trainer.step()
    return trainer.result()

def save(*size):
    with tempfile.TemporaryDirectory() as folder:
        fit(*size).save(folder)

def train(n, height, width, channels):
    trainer = make_trainer(TrainConfig(n_gaussians=n, height=height, width=width, blend={blend!r}))
    for _ in range(3):
        trainer.step()

def draw(n, height, width, channels):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        scene = make_scene(n, height, width, 3.0)
        scene.blend = gs2d.Blend({blend!r})
        save_picture(viewable(gs2d.render(scene, height, width)), folder + "/picture.png")

{work}(40, 48, 64, {channels})
before = peak()
{work}({n}, {height}, {width}, {channels})
print(before, peak())
"""
MEMORY_CASES = [  # work, Gaussians, height, width, channels, blend
    ("fit", 1_000, 256, 256, 3, "weighted"), ("fit", 100_000, 256, 256, 3, "weighted"), ("fit", 1_000_000, 256, 256, 3, "weighted"),
    ("fit", 1_000_000, 256, 256, 3, "over"), ("fit", 1_000_000, 256, 256, 4, "weighted"), ("fit", 1_000, 2048, 2048, 3, "weighted"),
    ("fit", 1_000, 2048, 2048, 4, "over"), ("fit", 1_000_000, 2048, 2048, 3, "additive"), ("fit", 9_000, 512, 768, 3, "weighted"),
    ("train", 1_000_000, 256, 256, 3, "weighted"), ("train", 1_000, 2048, 2048, 3, "weighted"), ("train", 100_000, 2048, 2048, 3, "over"),
    ("save", 1_000, 1024, 1024, 3, "weighted"), ("save", 1_000_000, 256, 256, 3, "weighted"), ("save", 1_000, 1024, 1024, 4, "weighted"),
    ("draw", 1_000, 4096, 4096, 3, "weighted"), ("draw", 2_000_000, 256, 256, 3, "over"), ("draw", 1_000_000, 1024, 1024, 3, "additive"),
]


def bench_memory(quick):
    "Peak memory of processes that fit, train, fit and save, or draw, beyond the libraries; and what gs2d.memory says before."
    rows = []
    for work, n, height, width, channels, blend in MEMORY_CASES[:: 4 if quick else 1]:
        code = MEMORY_CODE.format(here=str(HERE), work=work, n=n, height=height, width=width, channels=channels, blend=blend)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        before, peak = map(int, done.stdout.split())
        options = {} if work == "draw" else dict(content=work != "train", scored=work == "save")
        estimate = (rendering_bytes if work == "draw" else training_bytes)(n, height, width, channels, blend, **options)
        rows.append(dict(case=f"{work} {n:,} on {width}×{height}×{channels}, {blend}", libraries_gb=before / 1e9,
                         peak_gb=(peak - before) / 1e9, estimate_gb=estimate / 1e9, ratio=estimate / (peak - before)))
    return rows


def bench_live(quick):
    "Steps per second without and with the live view in front, one after the other, several times."
    from gs2d.ground_truth import GroundTruth
    from gs2d.show.panel import LiveTrainer
    from gs2d.show.session import LiveSession, State
    from gs2d.train import TrainConfig

    rows = []
    for n, height, width in [(100, 64, 64), (500, 256, 384)]:
        truth = GroundTruth.random(n, height, width, seed=0)
        config = TrainConfig(n_gaussians=n, height=height, width=width, n_iterations=10**6)
        speeds = {"without": [], "with": []}
        for _ in range(1 if quick else 5):
            for name, speed in speeds.items():
                session = LiveSession(truth, config) if name == "without" else LiveTrainer(truth, config).session
                session.run()
                time.sleep(0.5)  # the first steps load and measure
                start, first = time.perf_counter(), session.trainer.steps_done
                time.sleep(2.0)
                steps = session.trainer.steps_done - first
                speed.append(steps / (time.perf_counter() - start))
                session.stop()
                if session.state is not State.DONE:
                    raise RuntimeError(f"expected a session that ran until it was stopped, got {session.error!r}")
        medians = {name: statistics.median(speed) for name, speed in speeds.items()}
        rows.append(dict(case=f"{n} on {width}×{height}", unit="steps/s", **medians, ratio=medians["with"] / medians["without"]))
    return rows


def machine():
    "What the numbers were measured on."
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), name)
    return dict(cpu=name, cores=os.cpu_count(), threads=torch.get_num_threads(), system=platform.system(), python=platform.python_version(),
                torch=torch.__version__, gs2d=gs2d.__version__, kernels=bool(operators.available("cpu")))


def print_table(title, rows):
    "Rows of dicts as an aligned table."
    def show(value):
        return "does not fit" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row if not key.endswith("repeats")))
    cells = [keys] + [[show(row[key]) if key in row else "" for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_ratios(rows, to="kernels"):
    "How many times slower than the kernels each peer is."
    for row in rows:
        ratios = {name: value / row[to] for name, value in row.items() if isinstance(value, float) and name not in (to,) and "difference" not in name}
        if ratios:
            few = [name for name in ratios if row.get(f"{name} repeats", 9) < 3]
            print(f"  {row['case']}: " + ", ".join(f"{name} takes {ratio:,.1f}× as long as {to}" for name, ratio in ratios.items())
                  + (f" ({', '.join(few)} measured once: too slow for repeats)" if few else ""))


def main():
    sections = {"steps": bench_steps, "pairs": bench_pairs, "ssim": bench_ssim, "scaling": bench_scaling, "memory": bench_memory, "live": bench_live}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="sections to run")
    parser.add_argument("--quick", action="store_true", help="our kernels alone and few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for results.json and pairs.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine()}
    print("  ".join(f"{key}: {value}" for key, value in results["machine"].items()))
    for name in options.only:
        results[name] = sections[name](options.quick)
        print_table(sections[name].__doc__, results[name])
        if name in ("steps", "ssim"):
            print_ratios(results[name])
        if name == "scaling":
            results["fit"] = fit_line(results[name], options.out)
            print("  time against pairs: " + "  ".join(f"{key} {value:.4g}" for key, value in results["fit"].items()))
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nwrote {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
