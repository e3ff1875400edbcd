"""Differentiable rendering with 2D Gaussians: a course in numbered notebooks, and the library they export."""

__version__ = "0.1.0"

import os
import sys

# OpenMP's threads spin while they wait for each other, and where something else is busy on the same cores, a browser
# say, that makes a training step ten times slower. Asleep they lose nothing. PyTorch reads this while it is imported;
# where that has happened already, gs2d.kernels.threads shortens the spinning in another way.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The function `gs2d.train.train` is not among these names: it would hide the module `gs2d.train`.
from .densify import DensifyConfig, ErrorGrowth
from .fit import fit_image
from .gaussians import Blend, Domain2D, Gaussians2D, draw_outlines
from .ground_truth import GroundTruth
from .init_levels import InitLevel, initialize_scene
from .loss import L1SSIMLoss, l1_loss, l2_loss, psnr, ssim
from .renderer import project, rasterize, render
from .train import LRSchedule, TrainConfig, Trainer, TrainResult

load = Gaussians2D.load  # a scene from a file

__all__ = [
    "Blend", "DensifyConfig", "Domain2D", "ErrorGrowth", "Gaussians2D", "GroundTruth", "InitLevel", "L1SSIMLoss",
    "LRSchedule", "LiveTrainer", "Recorder", "TrainConfig", "TrainResult", "Trainer", "draw_outlines", "fit_image",
    "initialize_scene", "l1_loss", "l2_loss", "load", "project", "psnr", "rasterize", "record", "render", "ssim"]


def __getattr__(name: str):
    "What imports ipywidgets, or looks at a training, at its first use."
    if name == "LiveTrainer":
        from .show.panel import LiveTrainer as found
    elif name == "record":
        from .show.film import record as found
    elif name == "Recorder":
        from .show.viewer import Recorder as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
