"""Measure the quality of fits for every Gaussian and every second spent: `make bench-quality ARGS="FOLDER"`.

FOLDER holds the pictures; the project's own numbers are for six of the Kodak set (04, 05, 08, 15, 20, 23). Every number
is of the clamped float image, seed 0. Seconds are those of the steps, on this machine, now. Prints tables, and
writes quality.json, table.csv and table.png into --out.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from run import machine
from torch.nn import functional as F

from gs2d import renderer
from gs2d import train as training
from gs2d.densify import DensifyConfig
from gs2d.fit import fit_config, fit_image, photo_target
from gs2d.gaussians import Blend, covariances
from gs2d.init_levels import InitLevel
from gs2d.io.pictures import pictures_in
from gs2d.kernels import cpu
from gs2d.measure import PUBLISHED, bench, bench_csv, bench_row, bench_table, rate_quality
from gs2d.train import LRSchedule, Trainer, make_trainer, run

HERE = Path(__file__).parent
EPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TABLE = [(5_000, 2_000), (9_000, 1_200), (10_000, 3_000), (30_000, 1_500)]  # Gaussians, steps


def bench_main(pictures, options):
    "PSNR, SSIM, MS-SSIM and cost, for four numbers of Gaussians."
    rows = []
    for n, steps in options.table:
        for row in bench(pictures, [n], steps=steps):
            rows.append(row)
            print(bench_table(rows).splitlines()[-1], flush=True)
        (options.out / "table.csv").write_bytes(bench_csv(rows))
    means = [(row["n_gaussians"], row["psnr"]) for row in rows if row["picture"] == "mean"]
    rate_quality({f"gs2d, {len(pictures)} pictures": means} | PUBLISHED).savefig(options.out / "table.png")
    return rows


def _grown_by_gradient(config):
    "The same start and as many rounds, but by clone and split, those over the most error first."
    growth = config.densify
    pull = DensifyConfig(
        every_n_steps=max(1, int(growth.stop_fraction * config.n_iterations / growth.rounds)), grad_threshold=0.0,
        max_gaussians=growth.max_gaussians, growth=growth.growth, stop_fraction=growth.stop_fraction)
    return replace(config, n_gaussians=growth.n_start(config.n_gaussians), densify=pull)


def _removals(config):
    "What the recipe is without one of its ingredients: name -> configuration."
    return {
        "the whole recipe": config,
        "all Gaussians from the start": replace(config, densify=None),
        "growth by gradient, not by error": _grown_by_gradient(config),
        "random start": replace(config, init_level=InitLevel.RANDOM),
        **{f"one rate for all parameters, {lr}": replace(config, lr=lr, lr_scale={}) for lr in (0.01, 0.02, 0.04)},
        "cosine schedule": replace(config, lr_schedule=LRSchedule.COSINE),
        "constant rate": replace(config, lr_schedule=LRSchedule.CONSTANT),
        "Adam's usual β₂ = 0.999": config,
        "sum, not average": replace(config, blend=Blend.ADDITIVE),
        "over, not average": replace(config, blend=Blend.OVER),
        "L1 + SSIM, not squared error": replace(config, loss="l1_ssim"),
    }


def _print_changes(scores, options):
    "The mean of every list of scores, beside that of the whole recipe, as a table; returns its rows."
    whole = statistics.mean(scores["the whole recipe"])
    rows = [dict(name=name, psnr=statistics.mean(values), change=statistics.mean(values) - whole) for name, values in scores.items()]
    print(f"\n| {options.n:,} Gaussians, {options.steps:,} steps | mean PSNR, dB | change |\n|---|---|---|")
    for row in rows:
        change = "" if row["name"] == "the whole recipe" else f"{row['change']:+.2f}".replace("-", "−")
        print(f"| {row['name']} | {row['psnr']:.2f} | {change} |")
    return rows


def _fit_and_print(path, name, trainer, scores):
    result = run(trainer, progress=False)
    scores.setdefault(name, []).append(result.psnr)
    print(f"{path.stem}  {name}: {result.psnr:.2f}  ({len(result.scene):,} Gaussians, {result.timing.total_s:.1f} s)", flush=True)


def bench_ablation(pictures, options):
    "Mean PSNR with one ingredient of the recipe removed."
    scores = {}
    for path in pictures:
        truth = photo_target(path, options.max_side)
        removals = _removals(fit_config(truth.height, truth.width, options.n, options.steps))
        for name, config in removals.items():
            betas = (0.9, 0.999) if "β₂" in name else training.ADAM_BETAS
            with patch.object(training, "ADAM_BETAS", betas):
                _fit_and_print(path, name, make_trainer(config, ground_truth=truth), scores)
    return _print_changes(scores, options)


def bench_eps(pictures, options):
    "Mean PSNR for several ε of the weighted blend."
    means = {}
    for eps in EPS:
        with patch.object(renderer, "WEIGHT_EPS", eps), patch.object(cpu, "WEIGHT_EPS", eps):
            means[eps] = statistics.mean(
                fit_image(path, options.n, options.steps, max_side=options.max_side, progress=False).psnr for path in pictures)
        print(f"ε = {eps:<6g} {means[eps]:.3f} dB", flush=True)
    return means


def _optimizer(kind, **options):
    "A stand-in for make_optimizer that gives another optimiser the same groups."
    adam = training.make_optimizer
    return lambda scene, lr: kind([{key: group[key] for key in ("params", "name")} for group in adam(scene, lr).param_groups],
                                  lr=lr, eps=training.ADAM_EPS, **options)


def _cholesky_conics(scales, shears):
    "Conics where Σ = L Lᵀ with L = [[s₁, 0], [r s₂, s₂]]: the two scales keep their parameter, the shear r takes the rotation's."
    (s1, s2), r = scales.unbind(-1), shears
    return torch.stack([(1 + r * r) / s1**2, -r / (s1 * s2), 1 / s2**2], -1)


def _to_cholesky(scene):
    "Let the scene's parameters mean what _cholesky_conics takes them for, with the same ellipses."
    factor = torch.linalg.cholesky(covariances(scene.scales, scene.rotations).detach())
    scene.log_scales.data = factor.diagonal(dim1=-2, dim2=-1).log()
    scene.rotations.data = factor[:, 1, 0] / factor[:, 1, 1]


def _coarse_first(truth, config, share=0.3):
    "A trainer whose first steps were taken on the picture at half its size."
    half = F.avg_pool2d(truth.image.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)
    coarse = make_trainer(config, ground_truth=replace(truth, image=half.contiguous()))
    while coarse.progress < share:
        coarse.step()
    fine = Trainer(truth, coarse.scene, config)  # goes on with all that the next step depends on
    for name in ("scene", "optimizer", "densification", "steps_done", "seconds_spent", "history"):
        setattr(fine, name, getattr(coarse, name))
    return fine


def bench_alternatives(pictures, options):
    "Mean PSNR with one ingredient of the recipe replaced by another that is in use for such fits."
    from pytorch_optimizer import Adan, LaProp

    optimizers = {
        "LaProp, not Adam": _optimizer(LaProp, betas=training.ADAM_BETAS),
        "Adan, not Adam": _optimizer(Adan),
        "Adan with as short a memory": _optimizer(Adan, betas=(0.9, 0.9, 0.98)),
        "NAdam, not Adam": _optimizer(torch.optim.NAdam, betas=training.ADAM_BETAS)}
    scores = {}
    for path in pictures:
        truth = photo_target(path, options.max_side)
        config = fit_config(truth.height, truth.width, options.n, options.steps)
        _fit_and_print(path, "the whole recipe", make_trainer(config, ground_truth=truth), scores)
        for name, make in optimizers.items():
            with patch.object(training, "make_optimizer", make):
                _fit_and_print(path, name, make_trainer(config, ground_truth=truth), scores)
        with patch.object(renderer, "conics", _cholesky_conics):
            trainer = make_trainer(config, ground_truth=truth)
            _to_cholesky(trainer.scene)
            _fit_and_print(path, "Cholesky factor, not scales and rotation", trainer, scores)
        faint = replace(config, densify=replace(config.densify, opacity_threshold=0.05))
        _fit_and_print(path, "the faintest moved in every round", make_trainer(faint, ground_truth=truth), scores)
        _fit_and_print(path, "half the size for 30 % of the steps", _coarse_first(truth, config), scores)
    return _print_changes(scores, options)


def bench_losses(pictures, options):
    "Squared error against L1 + SSIM at equal N and time; MS-SSIM also by pytorch-msssim."
    from pytorch_msssim import ms_ssim as peer

    rows = []
    for name in ("l2", "l1_ssim"):
        mine = []
        for path in pictures:
            result = fit_image(
                path, options.n, max_side=options.max_side, blend=options.blend, seconds=options.seconds, loss=name, progress=False)
            planes = [image.permute(2, 0, 1)[None].clamp(0, 1) for image in (result.image, result.ground_truth.image)]
            mine.append(bench_row(path.stem, result) | {"loss": name, "pytorch_msssim": peer(*planes, data_range=1.0).item()})
            print(name, {key: mine[-1][key] for key in ("picture", "psnr", "ssim", "ms_ssim", "pytorch_msssim", "seconds", "steps")}, flush=True)
        rows += mine
        print(f"mean {name}: " + ", ".join(f"{key} {statistics.mean(row[key] for row in mine):.4f}" for key in ("psnr", "ssim", "ms_ssim", "pytorch_msssim")))
    return rows


def bench_targets(pictures, options):
    "How many Gaussians each picture needs for the target, and whether 9 % fewer would have done."
    rows = []
    for path in pictures:
        start = time.perf_counter()
        result = fit_image(path, target_psnr=options.target, steps=options.target_steps)
        seconds, n = time.perf_counter() - start, len(result.scene)
        fewer = fit_image(path, math.floor(n / 1.1), options.target_steps, progress=False)
        rows.append(dict(picture=path.stem, n_gaussians=n, psnr=result.psnr, seconds=seconds, of_a_fit=seconds / result.timing.total_s,
                         n_fewer=len(fewer.scene), psnr_fewer=fewer.psnr))
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main():
    sections = {"main": bench_main, "ablation": bench_ablation, "eps": bench_eps, "alternatives": bench_alternatives, "losses": bench_losses, "targets": bench_targets}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder with the pictures")
    parser.add_argument("--only", nargs="+", choices=sections, default=["main"], help="sections to run (default: main)")
    parser.add_argument("--table", nargs="+", metavar="N:STEPS", help="Gaussians and steps of the rows of main")
    parser.add_argument("--max-side", type=int, help="pixels of the longer side, for all but main and targets")
    parser.add_argument("--n", type=int, default=10_000, help="Gaussians for all but main and targets")
    parser.add_argument("--steps", type=int, default=1_000, help="steps for ablation, eps and alternatives")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each fit of losses")
    parser.add_argument("--blend", default="weighted", help="blend of losses (default: weighted)")
    parser.add_argument("--target", type=float, default=32.0, help="decibels for targets")
    parser.add_argument("--target-steps", type=int, default=1_000, help="steps of each fit of targets")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for the results")
    options = parser.parse_args()
    options.table = [tuple(map(int, row.split(":"))) for row in options.table] if options.table else TABLE
    try:
        pictures = pictures_in(options.folder)
    except ValueError as error:
        sys.exit(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "quality.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results["machine"] = machine()
    print("  ".join(f"{key}: {value}" for key, value in results["machine"].items()))
    for name in options.only:
        print(f"\n{sections[name].__doc__}")
        results[name] = sections[name](pictures, options)
        file.write_text(json.dumps(results, indent=1))
    print(f"\nwrote {file}")


if __name__ == "__main__":
    main()
