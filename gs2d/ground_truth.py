import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .gaussians import Domain2D, Gaussians2D, atomic_write
from .renderer import Blend, render

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open a file; 4 bytes × 3 channels of it are 2 GB


def _spread_positions(n: int, domain: Domain2D, generator: torch.Generator) -> Tensor:
    "(N, 2) centres, each in its own cell of a grid of at least n cells: random, but never all in one corner."
    columns = min(n, max(1, math.ceil(math.sqrt(n * domain.width / domain.height))))
    rows = math.ceil(n / columns)
    cells = torch.randperm(rows * columns, generator=generator)[:n]
    jitter = 0.1 + 0.8 * torch.rand(n, 2, generator=generator)
    x = domain.x_dim[0] + (cells % columns + jitter[:, 0]) / columns * domain.width
    y = domain.y_dim[0] + (cells // columns + jitter[:, 1]) / rows * domain.height
    return torch.stack([x, y], -1)


def _vivid_colors(n: int, generator: torch.Generator) -> Tensor:
    "(N, 3) colours of any hue, saturated enough to be seen on black, grey and white."
    hue, saturation, value = torch.rand(3, n, 1, generator=generator)
    saturation, value = 0.5 + 0.5 * saturation, 0.6 + 0.4 * value
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def random_scene(
    n_gaussians: int,  # at least 1
    height: int,  # pixels of the picture it is meant for: gives the domain, and the smallest size that a pixel can see
    width: int,
    seed: int = 0,
) -> Gaussians2D:
    "A scene of varied Gaussians in the domain of a picture: spread out, 1 to 3 times as long as wide, turned any way, vivid."
    if n_gaussians < 1:
        raise ValueError(f"n_gaussians: expected at least 1, got {n_gaussians}")
    domain, generator = Domain2D.for_image(height, width), torch.Generator().manual_seed(seed)
    means = _spread_positions(n_gaussians, domain, generator)
    spacing = math.sqrt(domain.width * domain.height / max(n_gaussians, 4))
    size, ratio, opacity = torch.rand(3, n_gaussians, generator=generator)
    size = spacing * 0.2 * 2.5**size
    stretch = 3 ** (ratio / 2)
    scales = torch.stack([size * stretch, size / stretch], -1).clamp(min=0.5 * domain.width / width)
    rotations = math.pi * (torch.rand(n_gaussians, generator=generator) - 0.5)
    return Gaussians2D.from_values(
        means, scales, rotations, 0.6 + 0.35 * opacity, _vivid_colors(n_gaussians, generator), domain)


def _inks(scene: Gaussians2D, height: int, width: int, background: tuple[float, ...]) -> None:
    "Turn the colours of `scene` into inks for an additive picture that stays in [0, 1]: in place."
    base = torch.tensor(background)
    with torch.no_grad():
        scene.colors -= base
        total = render(scene, height, width, Blend.ADDITIVE)
        highest, lowest = total.amax((0, 1)), -total.amin((0, 1))
        room = torch.cat([(1 - base) / highest.clamp(min=1e-6), base / lowest.clamp(min=1e-6)])
        fits = room[torch.cat([highest, lowest]) > 1e-6]
        scene.colors *= min(1.0, math.floor(64 * fits.amin().item()) / 64) if len(fits) else 1.0


def _to_array(picture: np.ndarray) -> np.ndarray:
    "(H, W, 1|3|4) float32 in [0, 1] from an array, or a clear error."
    expected = "expected a picture of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    shape = picture.shape
    if len(shape) == 2:
        picture = picture[..., None]
    elif len(shape) != 3 or shape[2] not in (1, 3, 4):
        hint = "; channels come last: permute(1, 2, 0) turns (C, H, W) around" if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        hint = "; pass one picture of the batch" if len(shape) == 4 else hint
        raise ValueError(f"{expected}, got {tuple(shape)}{hint}")
    if picture.size == 0:
        raise ValueError(f"{expected} with at least one pixel, got {tuple(shape)}")
    if picture.dtype == bool:
        return picture.astype(np.float32)
    if picture.dtype in (np.uint8, np.uint16):
        return picture.astype(np.float32) / np.float32(np.iinfo(picture.dtype).max)
    if picture.dtype.kind != "f":
        raise TypeError(f"expected uint8, uint16, bool, or floating-point numbers in [0, 1], got {picture.dtype}")
    if not np.isfinite(picture).all():
        raise ValueError(f"expected finite numbers in [0, 1], got {int((~np.isfinite(picture)).sum())} that are NaN or infinite")
    low, high = float(picture.min()), float(picture.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise ValueError(f"expected floating-point numbers in [0, 1], got {low:g} to {high:g}; divide or clamp them first")
    return picture.astype(np.float32).clip(0, 1)


def _decode(image: Image.Image, what: str) -> np.ndarray:
    "(H, W, 1|3|4) float32 in [0, 1] from a Pillow image of any mode, turned upright by its EXIF tag."
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{what}: expected at least 1×1 pixels, got {height}×{width}")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what}: expected at most {MAX_PIXELS:,} pixels, got {height}×{width}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16, I;16B, …: 16 bits of grey; I: 32 bits that hold 16
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{what}: expected 16-bit grey from 0 to 65535, got {values.min()} to {values.max()}")
        return _to_array(values.astype(np.uint16))
    if image.mode == "F":
        return _to_array(np.asarray(image))
    clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    clear = clear or (image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"))
    if image.mode == "La":
        image = image.convert("LA")
    return _to_array(np.asarray(image.convert("RGBA" if clear else "L" if image.mode in ("1", "L") else "RGB")))


def _open(path: Path) -> np.ndarray:
    "Decode a picture file, every way it can fail turned into one clear line."
    if not path.exists():
        raise FileNotFoundError(f"expected a picture file, got a path where there is none: {path}")
    if path.is_dir():
        raise ValueError(f"expected a picture file, got a folder: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height <= MAX_PIXELS:
                    image.load()
                return _decode(image, str(path))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: expected at most {MAX_PIXELS:,} pixels, got more ({error})") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture, or not in a format that Pillow reads") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path}: expected a whole picture, got one that is truncated or damaged ({error})") from None


def check_background(background) -> tuple[float, float, float]:
    "The background as three floats in [0, 1], or a clear error."
    try:
        values = tuple(float(v) for v in background)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(0 <= v <= 1 for v in values):
        raise ValueError(f"background: expected three numbers in [0, 1], got {background!r}")
    return values


def _composite(pixels: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    "(H, W, 1|3) from (H, W, 1|3|4): α·colour + (1 - α)·background, on the stored values."
    if pixels.shape[2] < 4:
        return pixels
    color, alpha = pixels[..., :3], pixels[..., 3:]
    return alpha * color + (1 - alpha) * np.asarray(background, np.float32)


def _shrink(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    "Resize with Lanczos so that the longer side has at most `max_side` pixels; never enlarge."
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side: expected at least 1 pixel, got {max_side}")
    height, width = pixels.shape[:2]
    if max_side is None or max(height, width) <= max_side:
        return pixels
    size = tuple(max(1, round(side * max_side / max(height, width))) for side in (width, height))
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., k])).resize(size, Image.Resampling.LANCZOS) for k in range(pixels.shape[2])]
    return np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)


def load_picture(
    picture,  # a path, a Pillow image, a numpy array or a torch tensor
    max_side: int | None = None,  # pixels of the longer side at most; None keeps the size
    background: tuple[float, float, float] = (0.0, 0.0, 0.0),  # what shows through where the picture is transparent
) -> Tensor:  # (H, W, 3) float32 in [0, 1], row 0 on top
    """Whatever somebody calls a picture, as the tensor that training needs.

    Arrays are (H, W) or (H, W, 1|3|4); uint8, uint16, bool, or floating point in [0, 1]. The stored (sRGB) values are
    taken as they are. Raises FileNotFoundError, TypeError or ValueError saying what was expected and what came.
    """
    background = check_background(background)
    if isinstance(picture, (str, os.PathLike)):
        pixels = _open(Path(picture))
    elif isinstance(picture, Image.Image):
        pixels = _decode(picture, "picture")
    elif isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        pixels = _to_array((picture.float() if picture.is_floating_point() else picture).numpy())
    elif isinstance(picture, np.ndarray):
        pixels = _to_array(picture)
    else:
        raise TypeError(f"expected a path, a Pillow image, a numpy array or a torch tensor, got {type(picture).__name__}")
    pixels = _shrink(_composite(pixels, background), max_side)
    return torch.from_numpy(np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C"))


def to_pil(
    image: Tensor,  # (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), nominally in [0, 1]
) -> Image.Image:  # 8 bits a channel
    "The picture as a Pillow image: clamped to [0, 1], then rounded to the nearest of 256 levels."
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or image.numel() == 0:
        raise ValueError(f"expected an image of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {tuple(image.shape)}")
    image = image.detach().cpu().float()
    if image.isnan().any():
        raise ValueError(f"expected numbers in the image, got {int(image.isnan().sum())} that are NaN")
    levels = (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()
    return Image.fromarray(levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)


def save_picture(
    image: Tensor,  # (H, W, 3), nominally in [0, 1]
    path: str | os.PathLike,  # the suffix names the format: .png, .jpg, .webp, .tiff, .bmp, …
) -> Path:
    "Write the image in the format that the suffix names, whole or not at all."
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: expected a suffix that names a picture format, such as .png, .jpg or .webp, got {path.suffix!r}")
    buffer = io.BytesIO()
    try:
        to_pil(image).save(buffer, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    except OSError as error:
        raise ValueError(f"{path}: {kind} cannot hold this picture ({error}); .png can") from None
    return atomic_write(path, buffer.getvalue())


@dataclass(frozen=True, eq=False, repr=False)
class GroundTruth:
    "What a fit aims at: a picture, how it is blended, and the scene that made it where that is known."

    image: Tensor  # (H, W, 3) float32 in [0, 1], row 0 on top
    scene: Gaussians2D | None  # None for a photograph
    domain: Domain2D
    blend: Blend = Blend.WEIGHTED
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def random(
        cls,
        n_gaussians: int,  # at least 1
        height: int,  # pixels
        width: int,  # pixels
        seed: int = 0,
        blend: Blend = Blend.WEIGHTED,
        background: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> "GroundTruth":
        "The rendering of a random scene, every parameter of which is known. The same seed gives the same scene."
        blend, background = Blend(blend), check_background(background)
        scene = random_scene(n_gaussians, height, width, seed)
        if blend == Blend.ADDITIVE:
            _inks(scene, height, width, background)
        with torch.no_grad():
            image = render(scene, height, width, blend, background)
        return cls(image, scene, scene.domain, blend, background)

    @classmethod
    def from_image(
        cls,
        picture,  # whatever `load_picture` takes
        max_side: int | None = None,  # pixels of the longer side at most; None keeps the size
        background: tuple[float, float, float] = (0.0, 0.0, 0.0),
        blend: Blend = Blend.WEIGHTED,  # how the fit will blend
    ) -> "GroundTruth":
        "A picture to fit. No scene is known; x spans (-5, 5) and y follows the picture's proportions."
        image = load_picture(picture, max_side, background)
        return cls(image, None, Domain2D.for_image(*image.shape[:2]), Blend(blend), check_background(background))

    @property
    def height(self) -> int:
        "Rows of the picture, pixels."
        return self.image.shape[0]

    @property
    def width(self) -> int:
        "Columns of the picture, pixels."
        return self.image.shape[1]

    def to(self, device: torch.device | str) -> "GroundTruth":
        "The same on another device; the original stays where it is."
        scene = None if self.scene is None else self.scene.clone().to(device)
        return GroundTruth(self.image.to(device), scene, self.domain, self.blend, self.background)

    def to_pil(self) -> Image.Image:
        "The picture as an 8-bit Pillow image."
        return to_pil(self.image)

    def save(self, path: str | os.PathLike) -> Path:
        "Write the picture in the format that the suffix of `path` names (see `save_picture`)."
        return save_picture(self.image, path)

    def __repr__(self) -> str:
        known = "no known scene" if self.scene is None else f"{len(self.scene)} known Gaussians"
        return f"GroundTruth({self.height}×{self.width} pixels, {known}, blend={self.blend.value}, background={self.background})"

    def _repr_png_(self) -> bytes:
        "The picture Jupyter shows."
        buffer = io.BytesIO()
        self.to_pil().save(buffer, "PNG")
        return buffer.getvalue()
