"""Differentiable rendering with 2D Gaussians: a course in numbered notebooks, and the library they export."""

__version__ = "0.1.0"

import os
import sys

# OpenMP's threads spin while they wait for each other, and where something else is busy on the same cores, a browser say, that
# makes a training step ten times slower. Asleep they lose nothing. PyTorch reads this while it is imported; where that has
# happened already, gs2d.cpu_kernels shortens the spinning in another way.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The function `gs2d.train.train` is not among these names: it would hide the module `gs2d.train`.
from .densify import DensifyConfig
from .fit import fit_image
from .gaussians import Domain2D, Gaussians2D, draw_outlines
from .ground_truth import GroundTruth
from .init_levels import InitLevel, initialize_scene
from .loss import L1SSIMLoss, psnr, ssim
from .renderer import Blend, project, rasterize, render
from .train import LRSchedule, TrainConfig, Trainer, TrainResult

__all__ = [
    "Blend", "DensifyConfig", "Domain2D", "Gaussians2D", "GroundTruth", "InitLevel", "L1SSIMLoss", "LRSchedule", "TrainConfig", "TrainResult",
    "Trainer", "draw_outlines", "fit_image", "initialize_scene", "project", "psnr", "rasterize", "render", "ssim"]
