"""The loop: render, compare, follow the gradient, and write down what happened"""
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .densify import DensificationState, DensifyConfig, densify
from .gaussians import PARAMETER_NAMES, Domain2D, Gaussians2D, atomic_write
from .ground_truth import GroundTruth
from .init_levels import InitLevel, initialize_scene
from .loss import L1SSIMLoss, l1_loss, l2_loss, psnr, ssim
from .renderer import Blend, kernels_for, render


class LRSchedule(str, Enum):
    "How the learning rate falls while training runs."

    COSINE = "cosine"  # half a cosine wave, from lr to 0
    EXPONENTIAL = "exponential"  # the same factor at every step, from lr to lr / 100
    CONSTANT = "constant"


FINAL_LR_FRACTION = 0.01  # where EXPONENTIAL ends, as 3DGS does for its positions


def learning_rate(
    lr: float,  # the rate at step 0
    schedule: LRSchedule,
    step: int,  # optimisation steps already done
    n_iterations: int,  # steps of the whole run
) -> float:
    "The learning rate of one step: a pure function of the step, so nothing has to be remembered or saved."
    schedule, done = LRSchedule(schedule), min(1.0, step / n_iterations)
    if schedule is LRSchedule.COSINE:
        return lr * (1 + math.cos(math.pi * done)) / 2
    return lr * FINAL_LR_FRACTION**done if schedule is LRSchedule.EXPONENTIAL else lr


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    'The device of this name; "auto" takes CUDA where there is one, then MPS, then the CPU.'
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f'device: expected "auto", "cpu", "cuda", "cuda:1" or "mps", got {str(device)!r}')
    there = {"cpu": True, "cuda": cuda and (found.index or 0) < torch.cuda.device_count(), "mps": mps}[found.type]
    if not there:
        offered = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())] * cuda + ["mps"] * mps
        raise ValueError(f"device: expected one that is available here ({', '.join(offered)}), got {str(device)!r}")
    return found


def _whole(name: str, value, lowest: int) -> int:
    "`value` as an int of at least `lowest`, or a clear error."
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if int(value) < lowest:
        raise ValueError(f"{name}: expected a whole number of at least {lowest}, got {value}")
    return int(value)


def _number(name: str, value, positive: bool) -> float:
    "`value` as a finite float above 0 (or, not `positive`, of at least 0), or a clear error."
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'above 0' if positive else 'of at least 0'}, got {value}")
    return float(value)


def _member(name: str, value, kind: type[Enum]) -> Enum:
    "The member of an Enum of this value, or a clear error that lists them."
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name}: expected one of {', '.join(repr(m.value) for m in kind)}, got {value!r}") from None


_NAMED_LOSSES = {"l1_loss": l1_loss, "l2_loss": l2_loss}


def _loss(value) -> Callable[[Tensor, Tensor], Tensor]:
    "A loss from a callable, the name of one, or the weights of an `L1SSIMLoss`."
    if isinstance(value, dict):
        return L1SSIMLoss(**value)
    found = _NAMED_LOSSES.get(value) if isinstance(value, str) else value
    if not callable(found):
        raise ValueError(f"loss: expected a function of (image, target), 'l1_loss' or 'l2_loss', got {value!r}")
    return found


@dataclass(frozen=True)
class TrainConfig:
    "Everything that decides a run. Immutable: `dataclasses.replace` makes a changed copy."

    n_gaussians: int = 100
    height: int = 256  # pixels; a given ground truth brings its own
    width: int = 256  # pixels
    n_iterations: int = 1000  # optimisation steps
    lr: float = 1e-2  # Adam's step, in the units of each parameter
    lr_schedule: LRSchedule = LRSchedule.COSINE
    lr_scale: dict[str, float] = field(default_factory=dict, hash=False)  # parameter name -> multiple of lr; 0 freezes it
    init_level: InitLevel = InitLevel.RANDOM
    blend: Blend = Blend.WEIGHTED
    loss: Callable[[Tensor, Tensor], Tensor] = L1SSIMLoss()  # (image, target) -> scalar
    densify: DensifyConfig | None = None  # None keeps the number of Gaussians
    seed: int = 0
    device: str = "auto"  # "auto": CUDA, then MPS, then CPU
    compile: bool | str = "auto"  # torch.compile where the reference renders; "auto": on CUDA only

    def __post_init__(self):
        clean = dict(
            **{name: _whole(name, getattr(self, name), 1) for name in ("n_gaussians", "height", "width", "n_iterations")},
            lr=_number("lr", self.lr, positive=True),
            lr_schedule=_member("lr_schedule", self.lr_schedule, LRSchedule),
            lr_scale=self._clean_lr_scale(),
            init_level=_member("init_level", self.init_level, InitLevel),
            blend=_member("blend", self.blend, Blend),
            loss=_loss(self.loss),
            densify=DensifyConfig(**self.densify) if isinstance(self.densify, dict) else self.densify,
            seed=_whole("seed", self.seed, 0),
            device=str(self.device),
        )
        for name, value in clean.items():
            object.__setattr__(self, name, value)
        if not (self.densify is None or isinstance(self.densify, DensifyConfig)):
            raise TypeError(f"densify: expected a DensifyConfig or None, got {self.densify!r}")
        if not (isinstance(self.compile, bool) or self.compile == "auto"):
            raise ValueError(f'compile: expected True, False or "auto", got {self.compile!r}')
        resolve_device(self.device)

    def _clean_lr_scale(self) -> dict[str, float]:
        "A checked copy of `lr_scale`."
        if not isinstance(self.lr_scale, dict):
            raise TypeError(f"lr_scale: expected a dict from parameter name to factor, got {self.lr_scale!r}")
        unknown = set(self.lr_scale) - set(PARAMETER_NAMES)
        if unknown:
            raise ValueError(f"lr_scale: expected names among {', '.join(PARAMETER_NAMES)}, got {', '.join(map(repr, unknown))}")
        return {name: _number(f"lr_scale[{name!r}]", factor, positive=False) for name, factor in self.lr_scale.items()}

    def to_dict(self) -> dict:
        "The same as plain values for JSON. A loss of your own has no name to write down: TypeError."
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        loss_name = next((name for name, function in _NAMED_LOSSES.items() if function is self.loss), None)
        if type(self.loss) is L1SSIMLoss:
            plain["loss"] = dataclasses.asdict(self.loss)
        elif loss_name:
            plain["loss"] = loss_name
        else:
            raise TypeError(f"loss: expected an L1SSIMLoss, l1_loss or l2_loss to write down, got {self.loss!r}")
        plain["densify"] = None if self.densify is None else dataclasses.asdict(self.densify)
        plain["lr_scale"] = dict(self.lr_scale)
        return json.loads(json.dumps(plain))  # enums become their values

    @classmethod
    def from_dict(cls, plain: dict) -> "TrainConfig":
        "The configuration that `to_dict` wrote; fields that are absent take their defaults."
        unknown = set(plain) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"expected the fields of TrainConfig, got {', '.join(map(repr, sorted(unknown)))}")
        return cls(**plain)


class StepRecord(NamedTuple):
    "What one optimisation step saw and did."

    step: int  # counted from 0
    loss: float  # of the picture rendered in this step, before the scene changed
    psnr: float  # of the same picture, decibels
    lr: float  # used in this step
    n_gaussians: int  # after this step
    step_ms: float  # wall-clock milliseconds


@dataclass(frozen=True)
class TimingStats:
    "How long the steps of a run took; what happened between them is not counted."

    total_s: float = 0.0
    mean_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0
    steps_per_sec: float = 0.0

    @classmethod
    def from_history(cls, history: list[StepRecord]) -> "TimingStats":
        "The statistics of these steps; all zero where there are none."
        times = [record.step_ms for record in history]
        total = math.fsum(times) / 1000
        if not total:
            return cls()
        return cls(total, 1000 * total / len(times), min(times), max(times), len(times) / total)

    def summary(self) -> str:
        "One line for people."
        return (f"{self.total_s:.2f} s of training, {self.steps_per_sec:.1f} steps/s: "
                f"{self.mean_ms:.2f} ms a step ({self.min_ms:.2f} to {self.max_ms:.2f})")


@dataclass(frozen=True, eq=False)
class TrainResult:
    "Where training arrived: a scene of its own, which later steps of the trainer leave alone."

    scene: Gaussians2D
    ground_truth: GroundTruth
    history: list[StepRecord]
    timing: TimingStats
    config: TrainConfig

    @cached_property
    def image(self) -> Tensor:
        "(H, W, C) the final scene, rendered at the ground truth's size, not clamped."
        truth = self.ground_truth
        with torch.no_grad():
            return render(self.scene, truth.height, truth.width, self.config.blend, truth.background)

    @cached_property
    def psnr(self) -> float:
        "Decibels between the final picture and the ground truth, both clamped to [0, 1]."
        return psnr(self.image, self._target).item()

    @cached_property
    def ssim(self) -> float:
        "Structural similarity of the final picture and the ground truth, both clamped to [0, 1]."
        return ssim(self.image.clamp(0, 1), self._target.clamp(0, 1)).item()

    @property
    def _target(self) -> Tensor:
        return self.ground_truth.image.to(self.image)


ADAM_EPS = 1e-15
_CHANGEABLE = ("n_iterations", "lr", "lr_schedule", "lr_scale", "blend", "loss", "densify")


def _derived_seed(seed: int, purpose: str) -> int:
    "A seed for one purpose: the scene to find and the scene to start from must not be drawn from the same numbers."
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "big")


class Trainer:
    """One scene on its way to one picture. Iterate over it: every turn is one optimisation step and gives a `StepRecord`.

    `scene`, `ground_truth`, `config`, `optimizer`, `steps_done` and `history` may be read at any time, by anyone.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        scene: Gaussians2D,  # where to start; copied
        config: TrainConfig,  # its height and width give way to the ground truth's
    ):
        image, colors = ground_truth.image, scene.colors
        if image.shape[-1] != colors.shape[-1]:
            raise ValueError(f"expected Gaussians with {image.shape[-1]} channels, as the picture has, got {colors.shape[-1]}")
        self.device = resolve_device(config.device)
        self.config = dataclasses.replace(config, height=ground_truth.height, width=ground_truth.width)
        self.ground_truth = ground_truth
        self.scene = scene.clone().to(self.device)
        self.steps_done = 0
        self.history: list[StepRecord] = []
        self.generator = torch.Generator().manual_seed(_derived_seed(config.seed, "densify"))
        self.density = DensificationState(len(scene), self.device)  # positional gradients since the last round
        groups = [{"params": [getattr(self.scene, name)], "name": name} for name in PARAMETER_NAMES]
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, eps=ADAM_EPS, fused=True)
        like = dict(device=self.device, dtype=self.scene.means.dtype)
        self._target = image.to(**like)
        self._clamped_target = self._target.clamp(0, 1)
        self._error = torch.empty_like(self._target)
        self._background = torch.as_tensor(ground_truth.background).to(**like)
        by_reference = kernels_for(self.device, self.scene.means.dtype) is None
        compiled = by_reference and (self.device.type == "cuda" if config.compile == "auto" else config.compile)
        self._render = torch.compile(render) if compiled else render

    def step(self) -> StepRecord:
        "One optimisation step. Raises FloatingPointError, and leaves the scene as it is, if the loss or its gradient is not finite."
        start, config, scene = time.perf_counter(), self.config, self.scene
        lr = self._set_learning_rates()
        for group in self.optimizer.param_groups:
            group["params"][0].grad = None
        image = self._render(scene, config.height, config.width, config.blend, self._background)
        loss = config.loss(image, self._target)
        loss.backward()
        loss_value, psnr_value = self._measure(image, loss)
        self.optimizer.step()
        self._densify(image)
        self.steps_done += 1
        step_ms = 1000 * (time.perf_counter() - start)
        self.history.append(StepRecord(self.steps_done - 1, loss_value, psnr_value, lr, len(scene), step_ms))
        return self.history[-1]

    def __iter__(self) -> Iterator[StepRecord]:
        "Steps until `config.n_iterations` are done. A second loop goes on where the first one stopped."
        while self.steps_done < self.config.n_iterations:
            yield self.step()

    def _set_learning_rates(self) -> float:
        config = self.config
        lr = learning_rate(config.lr, config.lr_schedule, self.steps_done, config.n_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * config.lr_scale.get(group["name"], 1.0)
        return lr

    @torch.no_grad()
    def _measure(self, image: Tensor, loss: Tensor) -> tuple[float, float]:
        "Loss and PSNR as numbers, fetched from the device at once, with a check that the gradient is finite."
        error = torch.clamp(image, 0, 1, out=self._error).sub_(self._clamped_target).square_()
        slopes = torch.cat([g["params"][0].grad.reshape(-1) for g in self.optimizer.param_groups if g["params"][0].grad is not None])
        loss_value, mse, slope = torch.stack([loss.detach(), error.mean(dim=(1, 2)).mean(), slopes.sum()]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(slope)):
            what = f"loss is {loss_value}" if not math.isfinite(loss_value) else "gradient is not finite"
            raise FloatingPointError(
                f"step {self.steps_done}: the {what}. The scene is as the step before left it. "
                f"Expected finite numbers: try a smaller learning rate than lr={self.config.lr:g}")
        return loss_value, math.inf if mse == 0 else -10 * math.log10(mse)

    def _densify(self, image: Tensor) -> None:
        config, done = self.config, self.steps_done + 1
        if config.densify is None:
            return
        self.density.accumulate(self.scene)
        if config.densify.is_due(done, config.n_iterations):
            densify(self.scene, self.optimizer, self.density, config.densify, self.generator,
                    image.detach(), self._target, config.blend)

    def update(self, **changes) -> None:
        "Change the configuration from the next step on. What only a new Trainer could bring about is refused."
        refused = set(changes) - set(_CHANGEABLE)
        if refused:
            raise ValueError(f"expected changes of {', '.join(_CHANGEABLE)}; a new Trainer is needed for {', '.join(sorted(refused))}")
        config = dataclasses.replace(self.config, **changes)
        if self.config.densify is None and config.densify is not None:
            self.density.reset(len(self.scene))
        self.config = config

    @property
    def timing(self) -> TimingStats:
        "How long the steps took so far."
        return TimingStats.from_history(self.history)

    def result(self) -> TrainResult:
        "Where training is now. Callable at any time, also after an interrupt or an error."
        return TrainResult(self.scene.clone(), self.ground_truth, list(self.history), self.timing, self.config)

    def save(
        self,
        path: str | os.PathLike,  # usually ending in .safetensors; replaced in one step if it exists
    ) -> Path:
        "Write a checkpoint: all that the next step depends on, and the history. No pickle inside."
        truth = self.ground_truth
        tensors = _tensors_of("scene", self.scene) | {"truth.image": truth.image, "generator": self.generator.get_state()}
        if truth.scene is not None:
            tensors |= _tensors_of("truth.scene", truth.scene)
        for group in self.optimizer.param_groups:
            for key, value in self.optimizer.state.get(group["params"][0], {}).items():
                tensors[f"adam.{group['name']}.{key}"] = value
        tensors |= {f"density.{key}": value for key, value in self.density.state_dict().items()}
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(StepRecord._fields))
        about = dict(
            format=_FORMAT, version=_VERSION, steps_done=self.steps_done, config=self.config.to_dict(),
            domain=[self.scene.domain.x_dim, self.scene.domain.y_dim], truth_domain=[truth.domain.x_dim, truth.domain.y_dim],
            blend=truth.blend, background=list(truth.background))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return atomic_write(path, safetensors_bytes(tensors, metadata={_FORMAT: json.dumps(about)}))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        device: str | None = None,  # None takes the one in the saved configuration
    ) -> "Trainer":
        "Read a checkpoint. On the same machine, the steps that follow give the same bytes as if training had never stopped."
        tensors, about = _read_checkpoint(Path(path))
        config = TrainConfig.from_dict(about["config"] if device is None else about["config"] | {"device": str(device)})
        truth_domain = Domain2D(*about["truth_domain"])
        known = _scene_of("truth.scene", tensors, truth_domain) if "truth.scene.means" in tensors else None
        truth = GroundTruth(image=tensors["truth.image"], scene=known, domain=truth_domain,
                            blend=Blend(about["blend"]), background=tuple(about["background"]))
        trainer = cls(truth, _scene_of("scene", tensors, Domain2D(*about["domain"])), config)
        trainer.steps_done = about["steps_done"]
        trainer.generator.set_state(tensors["generator"])
        trainer.density.load_state_dict({key: tensors[f"density.{key}"] for key in trainer.density.state_dict()})
        for group in trainer.optimizer.param_groups:
            start = f"adam.{group['name']}."
            state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            if state:
                trainer.optimizer.state[group["params"][0]] = {key: value.to(trainer.device) for key, value in state.items()}
        whole = [f in ("step", "n_gaussians") for f in StepRecord._fields]
        trainer.history = [StepRecord(*(int(v) if w else v for v, w in zip(row, whole))) for row in tensors["history"].tolist()]
        return trainer


_FORMAT, _VERSION = "gs2d-checkpoint", 1


def _tensors_of(name: str, scene: Gaussians2D) -> dict[str, Tensor]:
    return {f"{name}.{parameter}": getattr(scene, parameter) for parameter in PARAMETER_NAMES}


def _scene_of(name: str, tensors: dict[str, Tensor], domain: Domain2D) -> Gaussians2D:
    return Gaussians2D(*(tensors[f"{name}.{parameter}"] for parameter in PARAMETER_NAMES), domain)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    "The tensors and the JSON of a checkpoint, or a clear error."
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint, got no file at {path}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(_FORMAT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a checkpoint in the safetensors format, got something else ({error})") from None
    if (about.get("format"), about.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: expected {_FORMAT} version {_VERSION}, got {about.get('format')} version {about.get('version')}")
    return tensors, about


def run(
    trainer: Trainer,
    progress: bool = True,  # a bar, and about ten lines in a run, on stderr
) -> TrainResult:
    "Take all remaining steps. Ctrl-C, or the notebook's interrupt button, ends it early with what was reached."
    from tqdm.auto import tqdm

    total = trainer.config.n_iterations
    every = max(1, total // 10)
    with tqdm(total=total, initial=trainer.steps_done, disable=not progress, unit="step", file=sys.stderr) as bar:
        try:
            for record in trainer:
                if not progress:
                    continue
                line = f"loss {record.loss:.4f}  PSNR {record.psnr:.2f} dB  lr {record.lr:.1e}  {record.n_gaussians} Gaussians"
                bar.set_postfix_str(line, refresh=False)
                bar.update()
                if trainer.steps_done % every == 0:
                    recent = TimingStats.from_history(trainer.history[-every:])
                    bar.write(f"step {trainer.steps_done:>{len(str(total))}}/{total}  {line}  {recent.mean_ms:.2f} ms/step", file=sys.stderr)
        except KeyboardInterrupt:
            if progress:
                bar.write(f"interrupted after {trainer.steps_done} of {total} steps: the result holds what was reached", file=sys.stderr)
    return trainer.result()


def train(
    config: TrainConfig = TrainConfig(),
    ground_truth: GroundTruth | None = None,  # None: a random scene drawn from config.seed
    progress: bool = True,  # a bar, and about ten lines in a run, on stderr
) -> TrainResult:
    "Find Gaussians that render to the ground truth. The same configuration gives the same bytes on the same machine's CPU."
    if ground_truth is None:
        ground_truth = GroundTruth.random(config.n_gaussians, config.height, config.width, seed=config.seed, blend=config.blend)
    start = dataclasses.replace(ground_truth, blend=config.blend)  # colours to start from depend on how they are blended
    scene = initialize_scene(start, config.init_level, config.n_gaussians, seed=_derived_seed(config.seed, "start"))
    return run(Trainer(ground_truth, scene, config), progress)
