"""The loop of the last lessons, pointed at a photograph"""
import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from . import __version__
from .densify import DensifyConfig, DensifyStrategy
from .gaussians import Domain2D, atomic_write, draw_outlines
from .ground_truth import GroundTruth, save_picture
from .init_levels import InitLevel
from .loss import l2_loss
from .renderer import Blend
from .train import LRSchedule, TrainConfig, TrainResult, train

MAX_SIDE = 2048  # pixels of the longer side; a larger picture is shrunk to it
PIXELS_PER_GAUSSIAN = 40
FEWEST, MOST = 16, 50_000  # Gaussians that the default number stays between
STEPS = 2000


def default_portrait() -> Path:
    "The photograph that matplotlib ships: Grace Hopper, 512×600 pixels, in the public domain."
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def default_n_gaussians(
    height: int,  # pixels
    width: int,  # pixels
) -> int:
    "One Gaussian for every 40 pixels, between 16 and 50,000, and never more than pixels."
    return min(max(FEWEST, min(height * width // PIXELS_PER_GAUSSIAN, MOST)), height * width)


START_SHARE = 0.5  # of the Gaussians that are there from the first step; the rest grows where the error is
GROWTH_ROUNDS = 12
GROWTH_END = 0.7  # fraction of all steps after which nothing grows any more


def _growth(start: int, n_gaussians: int, steps: int) -> DensifyConfig | None:
    "Rounds that multiply the number of Gaussians by the same factor each time, from `start` up to `n_gaussians`."
    if start == n_gaussians:
        return None
    factor = (n_gaussians / start) ** (1 / (GROWTH_ROUNDS - 1))  # one round to spare: it makes up for what was pruned
    return DensifyConfig(
        every_n_steps=max(1, int(GROWTH_END * steps / GROWTH_ROUNDS)), max_gaussians=n_gaussians,
        strategy=DensifyStrategy.ERROR, growth=factor - 1, stop_fraction=GROWTH_END)


LEARNING_RATE = 1e-2
LR_SCALE = {"log_scales": 1.0, "rotations": 1.0, "opacity_logits": 1.0, "colors": 1.0}  # multiples of it
MEANS_STEP = 0.05  # the rate of the centres, in units of the spacing √(area / N)


def fit_config(
    height: int,  # pixels
    width: int,  # pixels
    n_gaussians: int | None = None,  # at the end; None: one for every 40 pixels
    steps: int | None = None,  # None: 2,000
    seed: int = 0,
    blend: Blend = Blend.ADDITIVE,
    loss: Callable[[Tensor, Tensor], Tensor] = l2_loss,
    device: str = "auto",
) -> TrainConfig:
    "The configuration that `fit_image` trains with: read it, change it with `dataclasses.replace`, give it to `train`."
    n = default_n_gaussians(height, width) if n_gaussians is None else n_gaussians
    steps = STEPS if steps is None else steps
    for name, value in (("n_gaussians", n), ("steps", steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    domain = Domain2D.for_image(height, width)
    spacing = math.sqrt(domain.width * domain.height / n)
    start = math.ceil(START_SHARE * n)
    return TrainConfig(
        n_gaussians=start, height=height, width=width, n_iterations=steps,
        lr=LEARNING_RATE, lr_schedule=LRSchedule.COSINE,
        lr_scale={"means": MEANS_STEP * spacing / LEARNING_RATE, **LR_SCALE},
        init_level=InitLevel.CONTENT, blend=blend, loss=loss, densify=_growth(start, n, steps), seed=seed, device=device)


def fit_image(
    picture,  # a path, a Pillow image, a numpy array or a torch tensor
    n_gaussians: int | None = None,  # at the end; None: one for every 40 pixels
    steps: int | None = None,  # None: 2,000
    seed: int = 0,
    max_side: int | None = MAX_SIDE,  # pixels; a larger picture is shrunk to it, None keeps any size
    blend: Blend = Blend.ADDITIVE,
    loss: Callable[[Tensor, Tensor], Tensor] = l2_loss,  # (image, target) -> scalar
    background: tuple[float, float, float] = (0.0, 0.0, 0.0),  # behind the Gaussians, and behind what is transparent
    progress: bool = True,  # a bar on stderr
    device: str = "auto",  # "auto": CUDA, then MPS, then CPU
) -> TrainResult:
    """Fit Gaussians to a photograph, with defaults that suit one.

    The same arguments give the same bytes on the same machine's CPU. Ctrl-C, or the notebook's interrupt button, ends it
    early with what was reached. Raises FileNotFoundError, TypeError or ValueError saying what was expected and what came.
    """
    truth = GroundTruth.from_image(picture, max_side, background, blend)
    config = fit_config(truth.height, truth.width, n_gaussians, steps, seed, truth.blend, loss, device)
    return train(config, truth, progress)


def metrics(result: TrainResult) -> dict:
    "What to write down about a run, as plain values. A score that is infinite or not a number becomes None: JSON has neither."
    loss = result.config.loss(result.image, result.ground_truth.image.to(result.image)).item()
    scores = {"psnr": result.psnr, "ssim": result.ssim, "loss": loss}
    scores = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    truth, config, timing = result.ground_truth, result.config, result.timing
    return scores | dict(
        n_gaussians=len(result.scene), steps=len(result.history), seconds=timing.total_s, steps_per_sec=timing.steps_per_sec,
        height=truth.height, width=truth.width, blend=config.blend.value, device=str(result.scene.device), seed=config.seed,
        version=__version__)


def comparison(result: TrainResult):
    "A matplotlib Figure: the target, the render, the error with a colour bar, and the outlines at 2σ."
    from matplotlib.figure import Figure

    truth = result.ground_truth
    target, image = (picture.detach().cpu().clamp(0, 1) for picture in (truth.image, result.image))
    error = (image - target).square().mean(-1).sqrt().numpy()
    aspect = min(max(truth.width / truth.height, 0.2), 8)  # of a panel; beyond that a strip stays small
    rows, columns = (1, 4) if aspect < 1 else (2, 2) if aspect < 3 else (4, 1)
    width = 3.2 * columns if aspect < 1 else 10
    figure = Figure(figsize=(width, 0.5 + rows * (width / columns / aspect + 0.4)), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns).ravel()
    titles = ("target", f"{len(result.scene):,} Gaussians: {result.psnr:.2f} dB, SSIM {result.ssim:.4f}", "error (root mean square of R, G, B)", "outlines at 2σ")
    axes[0].imshow(target.numpy())
    axes[1].imshow(image.numpy())
    shown = axes[2].imshow(error, cmap="magma", vmin=0, vmax=max(float(error.max()), 1 / 255))
    figure.colorbar(shown, ax=axes[2], fraction=0.05)
    draw_outlines(result.scene, axes[3], color="black", linewidths=min(0.8, 20 / math.sqrt(len(result.scene))))
    for ax, title in zip(axes, titles):
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)
    return figure


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _csv(result: TrainResult) -> bytes:
    "The history, one line a step; the shortest decimals that read back as the same numbers."
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("step", "loss", "psnr", "lr", "n_gaussians", "step_ms"))
    table.writerows(result.history)
    return text.getvalue().encode()


def save_results(
    result: TrainResult,
    folder: str | os.PathLike,  # made if it does not exist; files of the same names are replaced
) -> Path:
    """Write scene.json, metrics.json, history.csv, render.png, target.png and comparison.png, each of them whole or not at all.

    What cannot be made again comes first, in case the disk fills up.
    """
    folder, truth = Path(folder), result.ground_truth
    folder.mkdir(parents=True, exist_ok=True)
    result.scene.save(folder / "scene.json", truth.height, truth.width, result.config.blend, truth.background)
    atomic_write(folder / "metrics.json", (json.dumps(metrics(result), indent=1, allow_nan=False) + "\n").encode())
    atomic_write(folder / "history.csv", _csv(result))
    save_picture(result.image, folder / "render.png")
    save_picture(truth.image, folder / "target.png")
    atomic_write(folder / "comparison.png", _png(comparison(result)))
    return folder
