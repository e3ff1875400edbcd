import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gaussians import PARAMETER_NAMES, Gaussians2D, conics
from .renderer import Blend


class DensifyStrategy(str, Enum):
    "Where new Gaussians come from."

    GRADIENT = "gradient"  # clone and split those that are pulled hard (3D Gaussian Splatting)
    ERROR = "error"  # sample new ones where the picture is wrong


def _check(name: str, ok: bool, expected: str, value) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _whole(value, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DensifyConfig:
    "When to densify, by which strategy, and how far."

    every_n_steps: int = 100  # steps between two rounds
    max_gaussians: int = 2000  # no round leaves more than this; a scene that starts above it can only shrink
    strategy: DensifyStrategy = DensifyStrategy.GRADIENT
    grad_threshold: float = 2e-4  # mean norm of the positional gradient, normalised device coordinates
    scale_threshold: float = 0.01  # as a fraction of the longer side of the domain: larger splits, smaller clones (3DGS: percent_dense)
    opacity_threshold: float = 0.005  # fainter is pruned; in Blend.ADDITIVE "faint" is opacity × largest |colour|
    split_factor: float = 1.6  # children's standard deviations are the parent's divided by this
    clone_shift: float = 0.5  # how far downhill a clone starts from its parent, in standard deviations
    growth: float = 0.5  # ERROR: new Gaussians per round, as a fraction of those there are
    start_step: int = 0  # no round before this step
    stop_fraction: float = 0.7  # no round after this fraction of all iterations

    def __post_init__(self):
        object.__setattr__(self, "strategy", DensifyStrategy(self.strategy))
        for name in ("every_n_steps", "max_gaussians"):
            _check(name, _whole(getattr(self, name), 1), "a whole number of at least 1", getattr(self, name))
        _check("start_step", _whole(self.start_step, 0), "a whole number of at least 0", self.start_step)
        for name in ("grad_threshold", "scale_threshold", "clone_shift", "growth"):
            value = getattr(self, name)
            _check(name, _number(value) and value >= 0, "a number of at least 0", value)
        for name in ("opacity_threshold", "stop_fraction"):
            value = getattr(self, name)
            _check(name, _number(value) and 0 <= value <= 1, "a number in [0, 1]", value)
        _check("split_factor", _number(self.split_factor) and self.split_factor > 1, "a number above 1", self.split_factor)

    def is_due(
        self,
        step: int,  # optimisation steps done so far
        n_iterations: int,  # steps of the whole run
    ) -> bool:
        "Whether a round is due after this step."
        return step > 0 and step % self.every_n_steps == 0 and self.start_step <= step <= self.stop_fraction * n_iterations


class DensificationState:
    "Positional gradients since the last round, in normalised device coordinates ([-1, 1] across the image)."

    def __init__(self, n_gaussians: int, device: torch.device | str = "cpu"):
        self.reset(n_gaussians, device)

    def reset(self, n_gaussians: int, device: torch.device | str | None = None) -> None:
        "Forget everything, for a scene of `n_gaussians`."
        device = self.norms.device if device is None else device
        self.norms = torch.zeros(n_gaussians, device=device)  # (N,) sum of the gradients' norms
        self.vectors = torch.zeros(n_gaussians, 2, device=device)  # (N, 2) sum of the gradients
        self.counts = torch.zeros(n_gaussians, device=device)  # (N,) steps in which there was a gradient

    def __len__(self) -> int:
        return len(self.counts)

    @torch.no_grad()
    def accumulate(
        self,
        scene: Gaussians2D,  # after `loss.backward()`, before the gradients are cleared
    ) -> None:
        "Add this step's positional gradients. Rows that got none, or one that is not finite, are left out of the average."
        if len(scene) != len(self):
            raise ValueError(f"expected a scene of {len(self)} Gaussians, got {len(scene)}")
        if scene.means.grad is None:
            return
        half_extents = scene.means.new_tensor([scene.domain.width / 2, scene.domain.height / 2])
        gradient = (scene.means.grad * half_extents).float()  # d(domain units) / d(NDC) = extent / 2
        norms = gradient.norm(dim=-1)
        seen = norms.isfinite() & (norms > 0)
        self.norms += torch.where(seen, norms, 0.0)
        self.vectors += torch.where(seen[:, None], gradient, 0.0)
        self.counts += seen

    @property
    def mean_norms(self) -> Tensor:
        "(N,) mean norm over the steps in which the Gaussian got a gradient; 0 where it never did."
        return self.norms / self.counts.clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        "The accumulated tensors, for a checkpoint."
        return {"norms": self.norms, "vectors": self.vectors, "counts": self.counts}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        "Put back what `state_dict` gave; the number of Gaussians may differ from the present one."
        missing = {"norms", "vectors", "counts"} - set(tensors)
        if missing:
            raise ValueError(f"expected norms, vectors and counts, got no {', '.join(sorted(missing))}")
        n = len(tensors["counts"])
        shapes = {"norms": (n,), "vectors": (n, 2), "counts": (n,)}
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensors[name].shape)}")
        for name in shapes:
            setattr(self, name, tensors[name].detach().to(self.counts.device, torch.float32, copy=True))


@dataclass(frozen=True)
class DensifyReport:
    "What one round did: n_gaussians = before + n_cloned + n_split + n_added - n_pruned."

    n_cloned: int  # Gaussians that got a copy beside them
    n_split: int  # Gaussians replaced by two smaller ones
    n_pruned: int  # Gaussians removed as too faint, or not finite
    n_added: int  # Gaussians placed where the error is
    n_gaussians: int  # Gaussians there are now


def shared_opacity_logits(
    opacity_logits: Tensor,  # (N,)
    blend: Blend,
) -> Tensor:  # (N,)
    """The logits that two copies in one place need to look like the one they replace.

    Sums (WEIGHTED, ADDITIVE): half the opacity, exactly. OVER: 1 - √(1 - o), exact at the centre (Rota Bulò et al. 2024).
    """
    if blend is Blend.OVER:
        return torch.log(torch.expm1(F.softplus(opacity_logits) / 2))
    return -F.softplus(math.log(2) - opacity_logits)


def clone_offsets(
    scene: Gaussians2D,
    gradients: Tensor,  # (N, 2) accumulated positional gradients, normalised device coordinates
    shift: float,  # standard deviations
) -> Tensor:  # (N, 2) domain units
    "Downhill by `shift` standard deviations; along the longer axis where there is no gradient to follow."
    extents = scene.means.new_tensor([scene.domain.width, scene.domain.height])
    direction = -gradients.to(scene.means) / extents
    length = direction.norm(dim=-1, keepdim=True)
    direction = torch.where(length > 0, direction / length, principal_axes(scene)[0])
    a, b, c = conics(scene.scales, scene.rotations).unbind(-1)
    dx, dy = direction.unbind(-1)
    power = a * dx**2 + 2 * b * dx * dy + c * dy**2  # 1/std² in that direction
    return shift * direction / power[:, None].sqrt()


def principal_axes(scene: Gaussians2D) -> tuple[Tensor, Tensor]:
    "((N, 2) unit vectors along the longer axes, (N,) standard deviations along them)."
    std, which = scene.scales.max(dim=-1)
    angle = scene.rotations + which * (math.pi / 2)
    return torch.stack([angle.cos(), angle.sin()], -1), std


def split_offsets(
    scene: Gaussians2D,
    factor: float,
) -> Tensor:  # (N, 2) domain units; the children sit at the mean plus and minus this
    "Along the longer axis, so far that the two children together have the parent's variance: d² + (σ/f)² = σ²."
    axis, std = principal_axes(scene)
    return axis * (std * math.sqrt(1 - 1 / factor**2))[:, None]


def visible_ink(
    scene: Gaussians2D,
    blend: Blend,
) -> Tensor:  # (N,)
    "What pruning looks at: the opacity; in ADDITIVE opacity × largest |colour|, the most it can change a pixel by."
    return scene.opacities * scene.colors.abs().amax(dim=-1) if blend is Blend.ADDITIVE else scene.opacities


def _rows_to_keep(scene: Gaussians2D, config: DensifyConfig, blend: Blend) -> Tensor:
    "(N,) False where a Gaussian is too faint or not finite. Never all False: the most visible one stays."
    finite = torch.stack([getattr(scene, name).reshape(len(scene), -1).isfinite().all(1) for name in PARAMETER_NAMES]).all(0)
    ink = torch.where(finite, visible_ink(scene, blend), -1.0)
    keep = ink >= config.opacity_threshold
    if len(scene) and not keep.any():
        keep[ink.argmax()] = True
    return keep


def _replace_rows(scene: Gaussians2D, optimizer, values: dict, source: Tensor, fresh: Tensor) -> None:
    "Give the scene new parameters. Row i of Adam's moments comes from row source[i], or is zero where fresh[i]."
    for name in PARAMETER_NAMES:
        old = getattr(scene, name)
        new = nn.Parameter(values[name].detach().clone().contiguous(), requires_grad=old.requires_grad)
        setattr(scene, name, new)
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        for key, value in state.items():  # exp_avg and exp_avg_sq have rows; the step counter has none and stays
            if torch.is_tensor(value) and value.shape == old.shape:
                rows = value[source]
                rows[fresh] = 0
                state[key] = rows
        optimizer.state[new] = state


def _sample_error(
    scene: Gaussians2D,
    image: Tensor,  # (H, W, C)
    target: Tensor,  # (H, W, C)
    n: int,  # how many to add
    n_total: int,  # how many there will be
    generator: torch.Generator,
    blend: Blend,
) -> dict[str, Tensor]:  # parameter name -> rows
    "New Gaussians at pixels drawn in proportion to their squared error. Drawn on the CPU, so that a seed means the same on every device."
    height, width, channels = target.shape
    residual = (target - image).cpu()
    power = (residual.double() ** 2).sum(-1).reshape(-1).nan_to_num(0.0, 0.0, 0.0)
    cumulative = power.cumsum(0)
    if n < 1 or not cumulative[-1] > 0:
        n = 0
    uniform = torch.rand(3, n, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    strata = (torch.arange(n, dtype=torch.float64) + uniform[0]) / max(n, 1)  # one draw in each n-th part: even cover
    pixels = torch.searchsorted(cumulative, strata * cumulative[-1], right=True).clamp(max=height * width - 1)
    x = (pixels % width + uniform[1]) / width
    y = (pixels // width + uniform[2]) / height
    domain = scene.domain
    means = torch.stack([domain.x_dim[0] + x * domain.width, domain.y_dim[1] - y * domain.height], -1)
    std = math.sqrt(domain.width * domain.height / n_total) / 2  # half the spacing of n_total evenly spread ones
    ink = residual if blend is Blend.ADDITIVE else target.cpu()  # opacity ½ below: half the residual, half-way to the target
    rows = dict(
        means=means,
        log_scales=torch.full((n, 2), math.log(std)),
        rotations=torch.zeros(n),
        opacity_logits=torch.zeros(n),
        colors=ink.reshape(-1, channels)[pixels],
    )
    return {name: rows[name].to(scene.means) for name in PARAMETER_NAMES}


@torch.no_grad()
def densify(
    scene: Gaussians2D,  # changed in place: its five parameters are replaced
    optimizer: torch.optim.Optimizer | None,  # its rows are carried along
    state: DensificationState,  # read, then reset
    config: DensifyConfig,
    generator: torch.Generator | None = None,  # for DensifyStrategy.ERROR
    image: Tensor | None = None,  # (H, W, C) what the scene renders to now, for ERROR
    target: Tensor | None = None,  # (H, W, C) what it should be, for ERROR
    blend: Blend = Blend.WEIGHTED,
) -> DensifyReport:
    "One round: prune the faint, then clone and split those that are pulled hard (GRADIENT) or sample new ones where the error is (ERROR)."
    blend, n_before = Blend(blend), len(scene)
    if len(state) != n_before:
        raise ValueError(f"expected the state of {n_before} Gaussians, got one of {len(state)}")
    by_error = config.strategy is DensifyStrategy.ERROR
    if by_error and (image is None or target is None or generator is None):
        raise ValueError("DensifyStrategy.ERROR: expected image, target and generator, got None")
    if by_error and image.shape != target.shape:
        raise ValueError(f"expected image and target of one shape, got {tuple(image.shape)} and {tuple(target.shape)}")

    keep = _rows_to_keep(scene, config, blend)
    n_kept = int(keep.sum())
    room = max(0, config.max_gaussians - n_kept)

    chosen = torch.zeros_like(keep)
    if not by_error:  # the hardest pulled first, ties by index
        pull = torch.where(keep & (state.mean_norms >= config.grad_threshold) & (state.counts > 0), state.mean_norms, -1.0)
        order = pull.argsort(descending=True, stable=True)[:room]
        chosen[order] = pull[order] >= 0
    limit = config.scale_threshold * max(scene.domain.width, scene.domain.height)
    large = scene.scales.amax(dim=-1) > limit
    cloned, split = chosen & ~large, chosen & large

    rows = torch.arange(n_before, device=keep.device)
    stay, copies, parents = rows[keep & ~split], rows[cloned], rows[split]
    source = torch.cat([stay, copies, parents, parents])
    values = {name: getattr(scene, name)[source] for name in PARAMETER_NAMES}
    is_copy = torch.zeros(len(source), dtype=torch.bool, device=keep.device)
    is_copy[len(stay):len(stay) + len(copies)] = True
    is_child = torch.arange(len(source), device=keep.device) >= len(stay) + len(copies)

    pair = cloned[source]  # the parent and its copy
    values["opacity_logits"] = torch.where(pair, shared_opacity_logits(values["opacity_logits"], blend), values["opacity_logits"])
    values["means"][is_copy] += clone_offsets(scene, state.vectors, config.clone_shift)[copies]
    offsets = split_offsets(scene, config.split_factor)[parents]
    values["means"][is_child] += torch.cat([offsets, -offsets])
    values["log_scales"][is_child] -= math.log(config.split_factor)

    n_added = 0
    if by_error:
        n_new = min(room, math.ceil(config.growth * n_kept))
        added = _sample_error(scene, image, target, n_new, n_kept + n_new, generator, blend)
        n_added = len(added["means"])
        values = {name: torch.cat([added[name], values[name]]) for name in PARAMETER_NAMES}
        source = torch.cat([source.new_full((n_added,), -1), source])
        is_child = torch.cat([is_child.new_ones(n_added), is_child])
    if blend is Blend.OVER:  # order is depth there: a copy stays beside its parent, what is added goes in front
        by_depth = source.argsort(stable=True)
    else:  # a sum has no order: survivors first
        by_depth = torch.cat([torch.arange(n_added, len(source), device=keep.device), torch.arange(n_added, device=keep.device)])
    values = {name: tensor[by_depth] for name, tensor in values.items()}
    _replace_rows(scene, optimizer, values, source[by_depth].clamp(min=0), is_child[by_depth])
    state.reset(len(scene))
    return DensifyReport(int(cloned.sum()), int(split.sum()), n_before - n_kept, n_added, len(scene))
