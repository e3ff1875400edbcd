import math
from enum import Enum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .gaussians import PARAMETER_NAMES, Domain2D, Gaussians2D
from .ground_truth import GroundTruth
from .renderer import Blend


class InitLevel(str, Enum):
    "How much of the truth the scene knows before the first step of training."

    EXACT = "exact"  # every parameter is the truth's
    NOISY = "noisy"  # every parameter is the truth's plus the noise in NOISE
    POSITIONS_ONLY = "positions_only"  # true centres; the rest as in RANDOM
    RANDOM = "random"  # nothing of the truth but the domain
    CONTENT = "content"  # centres, sizes, directions and colours read off the picture


NOISE = {  # standard deviations; means in units of the Gaussian's own size √(s₁s₂)
    "means": 0.2,
    "log_scales": 0.15,
    "rotations": 0.15,
    "opacity_logits": 0.3,
    "colors": 0.1,
}
START_OPACITY = 0.7
START_SIZE = 0.4  # standard deviation of a fresh Gaussian, in units of √(area / N)
GRADIENT_SHARE = 0.7  # CONTENT: how many of the centres follow the picture's gradient (Image-GS uses 70 %)


def _normal(shape, std: float, generator: torch.Generator) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def _noisy(truth: Gaussians2D, generator: torch.Generator) -> Gaussians2D:
    "The truth with Gaussian noise of the standard deviations NOISE added to every parameter."
    raw = {name: getattr(truth, name).detach().cpu() for name in PARAMETER_NAMES}
    noise = {name: _normal(value.shape, NOISE[name], generator) for name, value in raw.items()}
    noise["means"] = noise["means"] * raw["log_scales"].mean(1, keepdim=True).exp()
    return Gaussians2D(*(raw[name] + noise[name] for name in PARAMETER_NAMES), truth.domain)


def _inks(colors: Tensor, ground_truth: GroundTruth) -> Tensor:
    """(N, 3) what to store so that the blend shows about `colors`.

    An additive picture adds up every Gaussian that reaches a pixel, so each gets a share: the factor that
    leaves the smallest mean squared error when they are strewn at random.
    """
    if ground_truth.blend != Blend.ADDITIVE:
        return colors
    share = 1 / (START_OPACITY * (2 * math.pi * START_SIZE**2 + 0.5))
    return share * (colors - torch.tensor(ground_truth.background))


def _fresh(ground_truth: GroundTruth, means: Tensor, generator: torch.Generator) -> Gaussians2D:
    "Round-ish, greyish, turned any way: what a Gaussian starts as when only its centre is given."
    n, domain = len(means), ground_truth.domain
    size = START_SIZE * math.sqrt(domain.width * domain.height / n)
    scales = size * _normal((n, 2), 0.15, generator).exp()
    rotations = math.pi * (torch.rand(n, generator=generator) - 0.5)
    colors = 0.5 + _normal((n, 3), 0.1, generator)
    return Gaussians2D.from_values(
        means, scales, rotations, torch.full((n,), START_OPACITY), _inks(colors, ground_truth), domain)


def _uniform_positions(n: int, domain: Domain2D, generator: torch.Generator) -> Tensor:
    "(N, 2) points anywhere in the domain, each as likely as any other."
    low = torch.tensor([domain.x_dim[0], domain.y_dim[0]])
    return low + torch.rand(n, 2, generator=generator) * torch.tensor([domain.width, domain.height])


def picture_gradient(
    image: Tensor,  # (H, W, C)
) -> Tensor:  # (2, H, W, C) change per pixel to the right and downwards
    "Central differences of every channel; one-sided at the border, 0 along a side of one pixel."
    along_x, along_y = torch.zeros_like(image), torch.zeros_like(image)
    if image.shape[1] > 1:
        along_x = torch.gradient(image, dim=1)[0]
    if image.shape[0] > 1:
        along_y = torch.gradient(image, dim=0)[0]
    return torch.stack([along_x, along_y])


def content_density(
    image: Tensor,  # (H, W, C)
) -> Tensor:  # (H, W) float64, sums to 1
    "How likely CONTENT draws a centre from each pixel: 70 % by gradient magnitude, 30 % alike everywhere (Image-GS)."
    strength = picture_gradient(image.double()).square().sum((0, 3)).sqrt()
    uniform = torch.full_like(strength, 1 / strength.numel())
    total = strength.sum(1).sum()
    return uniform if total <= 0 else GRADIENT_SHARE * strength / total + (1 - GRADIENT_SHARE) * uniform


def _blur(maps: Tensor, radius: int) -> Tensor:
    "(K, H, W) averages over squares of 2·radius + 1 pixels, cut off at the border."
    return F.avg_pool2d(maps[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]


def _draw(density: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    "Rows and columns of n pixels drawn with these probabilities: where uniform numbers land in the running sum."
    ladder = np.cumsum(density.numpy().ravel())
    picks = torch.rand(n, generator=generator, dtype=torch.float64).numpy() * ladder[-1]
    flat = torch.from_numpy(np.searchsorted(ladder, picks, side="right").clip(max=density.numel() - 1))
    return flat // density.shape[1], flat % density.shape[1]


def _from_content(ground_truth: GroundTruth, n: int, generator: torch.Generator) -> Gaussians2D:
    "Centres where the picture changes, small where they are many, long along edges, in the picture's colours."
    image, domain = ground_truth.image.detach().cpu().double(), ground_truth.domain
    height, width = image.shape[:2]
    pixel = torch.tensor([domain.width / width, domain.height / height])
    density = content_density(image)
    rows, columns = _draw(density, n, generator)
    where = torch.stack([columns, height - 1 - rows], -1) + torch.rand(n, 2, generator=generator)
    means = torch.tensor([domain.x_dim[0], domain.y_dim[0]]) + where * pixel
    gx, gy = picture_gradient(image)
    radius = min(max(1, round(START_SIZE * math.sqrt(height * width / n))), (min(height, width) - 1) // 2)
    maps = torch.stack([density, (gx * gx).sum(2), (gx * gy).sum(2), (gy * gy).sum(2)])
    local, xx, xy, yy = _blur(maps, radius)[:, rows, columns]
    size = (START_SIZE / (n * local).sqrt()).clamp(min=0.5)
    spread = torch.hypot(xx - yy, 2 * xy)
    stretch = (1 + spread / (xx + yy).clamp(min=1e-12)).sqrt()
    rotations = math.pi / 2 - 0.5 * torch.atan2(2 * xy, xx - yy)
    scales = torch.stack([size * stretch, size / stretch], -1) * pixel.double().prod().sqrt()
    colors = _inks(image[rows, columns].float(), ground_truth)
    order = size.argsort() if ground_truth.blend == Blend.OVER else slice(None)
    values = (means, scales, rotations, torch.full((n,), START_OPACITY), colors)
    return Gaussians2D.from_values(*(value[order] for value in values), domain)


_NEED_A_SCENE = (InitLevel.EXACT, InitLevel.NOISY, InitLevel.POSITIONS_ONLY)


def _number(ground_truth: GroundTruth, level: InitLevel, n_gaussians: int | None) -> int:
    "How many Gaussians to start with, or a clear error."
    known = None if ground_truth.scene is None else len(ground_truth.scene)
    if level in _NEED_A_SCENE and known is None:
        raise ValueError(f"level {level.value!r} needs a ground truth with a known scene, got a picture; for a picture choose 'content' or 'random'")
    if n_gaussians is None:
        if known is None:
            raise ValueError("n_gaussians: expected a number of Gaussians for a picture, got None")
        return known
    if n_gaussians < 1:
        raise ValueError(f"n_gaussians: expected at least 1, got {n_gaussians}")
    if level in _NEED_A_SCENE and n_gaussians != known:
        raise ValueError(f"n_gaussians: expected {known}, the ground truth's own number, for level {level.value!r}, got {n_gaussians}")
    return n_gaussians


def initialize_scene(
    ground_truth: GroundTruth,
    level: InitLevel,
    n_gaussians: int | None = None,  # None: as many as the known scene has
    seed: int = 0,
) -> Gaussians2D:
    """The scene that training starts from, on the ground truth's device.

    EXACT, NOISY and POSITIONS_ONLY need a ground truth with a known scene, and keep its number of Gaussians and their
    order. RANDOM and CONTENT take any number. The same seed gives the same bytes.
    """
    try:
        level = InitLevel(level)
    except ValueError:
        raise ValueError(f"level: expected one of {', '.join(repr(l.value) for l in InitLevel)}, got {level!r}") from None
    n, generator = _number(ground_truth, level, n_gaussians), torch.Generator().manual_seed(seed)
    if level == InitLevel.EXACT:
        scene = ground_truth.scene.clone()
    elif level == InitLevel.NOISY:
        scene = _noisy(ground_truth.scene, generator)
    elif level == InitLevel.POSITIONS_ONLY:
        scene = _fresh(ground_truth, ground_truth.scene.means.detach().cpu(), generator)
    elif level == InitLevel.RANDOM:
        scene = _fresh(ground_truth, _uniform_positions(n, ground_truth.domain, generator), generator)
    else:
        scene = _from_content(ground_truth, n, generator)
    return scene.to(ground_truth.image.device)


def parameter_error(
    scene: Gaussians2D,
    truth: Gaussians2D,  # as many Gaussians, row i of one meant to be row i of the other
) -> dict[str, float]:  # parameter name -> root of the mean squared error
    """How far each parameter is from the truth, row by row.

    An ellipse turned by π, or turned by π/2 with its two scales swapped, is the same ellipse: of those the nearest counts.
    """
    if len(scene) != len(truth) or len(truth) < 1:
        raise ValueError(f"expected two scenes with the same number of Gaussians, at least 1, got {len(scene)} and {len(truth)}")
    with torch.no_grad():
        ours, theirs = ({name: getattr(s, name).cpu().double() for name in PARAMETER_NAMES} for s in (scene, truth))
        off = {name: ours[name] - theirs[name] for name in PARAMETER_NAMES}
        turn = torch.stack([off["rotations"], off["rotations"] + math.pi / 2])
        turn = torch.remainder(turn + math.pi / 2, math.pi) - math.pi / 2
        size = torch.stack([off["log_scales"], ours["log_scales"].flip(1) - theirs["log_scales"]])
        nearest = (turn.square() + size.square().sum(-1)).argmin(0)
        rows = torch.arange(len(truth))
        off["rotations"], off["log_scales"] = turn[nearest, rows], size[nearest, rows]
        return {name: value.reshape(len(truth), -1).square().mean(1).mean().sqrt().item() for name, value in off.items()}
