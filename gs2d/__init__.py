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

_AT_FIRST_USE = {"LiveTrainer": "show.panel", "record": "show.film"}  # they import ipywidgets, and what writes videos

__all__ = [
    "Blend", "DensifyConfig", "Domain2D", "ErrorGrowth", "Gaussians2D", "GroundTruth", "InitLevel", "L1SSIMLoss",
    "LRSchedule", "LiveTrainer", "TrainConfig", "TrainResult", "Trainer", "draw_outlines", "fit_image",
    "initialize_scene", "l1_loss", "l2_loss", "load", "project", "psnr", "rasterize", "record", "render", "ssim"]


def __getattr__(name: str):
    if name in _AT_FIRST_USE:
        from importlib import import_module

        return getattr(import_module(f".{_AT_FIRST_USE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
