"""Fit a photograph, train on a scene whose truth is known, and look at scene files, from a terminal"""
# Thin on purpose: every command reads its options, calls the library, and writes files. Whatever goes wrong is one line on
# stderr and exit status 2. Nothing heavy is imported up here, so that --help answers at once.
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

OUT = "gs2d-out"  # where each run gets a folder of its own, named by the time
INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as shells expect
_UsageError = typer.BadParameter.__bases__[0]  # what typer raises for an option it does not know, or that lacks its value
_FAILURES = (OSError, ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError)  # of the input, the disk, the machine


def _explain(error: Exception) -> str:
    "One line about what went wrong."
    if isinstance(error, _UsageError):
        command = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return f"{error.format_message().rstrip('.')}{command}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str) -> None:
    typer.echo(f"gs2d: {line}", err=True)


class _Commands(TyperGroup):
    "Commands whose errors are one line on stderr and exit status 2."

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("stopped; nothing was written")
            raise typer.Exit(INTERRUPTED) from None

    def main(self, *args, **options):
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except (_UsageError, *_FAILURES) as error:
            _say(f"error: {_explain(error)}")
            status = 2
        sys.exit(status or 0)


main = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"gs2d {__version__}")
        raise typer.Exit()


@main.callback(invoke_without_command=True)
def gs2d(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Pictures from 2D Gaussians.

    \b
    Examples:
      gs2d fit                                 fit the portrait that matplotlib ships
      gs2d fit photo.jpg --n-gaussians 5000    fit your own picture
      gs2d render gs2d-out/…/scene.json --width 2000
      gs2d info gs2d-out/…/scene.json
      gs2d train --n-gaussians 20 --init-level noisy
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _new_folder() -> Path:
    "A new folder under gs2d-out/, named by the time; a second run within the same second gets -2."
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    Path(OUT).mkdir(exist_ok=True)
    for k in count(1):
        folder = Path(OUT) / (stamp if k == 1 else f"{stamp}-{k}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


@contextmanager
def _results_folder(
    out: Path | None,  # None: a new one under gs2d-out/
) -> Iterator[Path]:
    "A folder for results, tried by writing to it before any work is done. A new one that stays empty is removed again."
    existed = out is not None and out.exists()
    try:
        folder = _new_folder() if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written to, got {out or OUT} ({error.strerror})") from None
    try:
        yield folder
    finally:
        if not existed:
            with suppress(OSError):  # it has results in it
                folder.rmdir()


def _train_and_save(config, truth, out: Path | None, quiet: bool) -> None:
    "Train, save, and say how good it is and where; after Ctrl-C the same with what there is, and exit status 130."
    from .fit import save_results
    from .train import train

    with _results_folder(out) as folder:
        result = train(config, truth, progress=not quiet)
        try:
            save_results(result, folder)
        except OSError as error:
            raise ValueError(f"{folder}: not all results could be written ({_explain(error)})") from None
    steps = len(result.history)
    typer.echo(f"PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f}")
    typer.echo(f"{len(result.scene):,} Gaussians, {steps:,} steps, {result.timing.summary()}")
    typer.echo(f"results in {folder}")
    if steps < config.n_iterations:
        _say(f"stopped after {steps:,} of {config.n_iterations:,} steps; what there was is saved")
        raise typer.Exit(INTERRUPTED)


def _color(text: str) -> tuple[float, ...]:
    "Three numbers in [0, 1] with commas between them, or a name or #rrggbb that Pillow knows."
    from PIL import ImageColor

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        pass
    try:
        return tuple(level / 255 for level in ImageColor.getrgb(text)[:3])
    except ValueError:
        raise ValueError(f"--background: expected three numbers such as 0,0.5,1, or a colour such as white or #ff8800, got {text!r}") from None


_Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder for the results. [default: a new one under gs2d-out/, named by the time]")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. auto takes the fastest there is.")]
_Background = Annotated[str, typer.Option(metavar="COLOUR", help="Behind the Gaussians, and behind a picture that is transparent: three numbers such as 0,0.5,1, or white, or #ff8800.")]


@main.command()
def fit(
    photo: Annotated[Path | None, typer.Argument(show_default=False, help="Any picture that Pillow reads. [default: the portrait that matplotlib ships]")] = None,
    n_gaussians: Annotated[int | None, typer.Option(help="Gaussians at the end. [default: one for every 40 pixels]", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps. [default: 2000]", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    max_side: Annotated[int, typer.Option(help="Pixels of the longer side; a larger picture is shrunk to it.")] = 2048,
    blend: Annotated[str, typer.Option(help="additive, weighted or over.")] = "additive",
    loss: Annotated[str, typer.Option(help="l2 (highest PSNR), l1, or l1_ssim (0.15 L1 + 0.85 (1 - SSIM)).")] = "l2",
    background: _Background = "black",
    device: _Device = "auto",
    out: _Out = None,
    quiet: _Quiet = False,
) -> None:
    """Fit 2D Gaussians to a photograph.

    Writes render.png, target.png, comparison.png, scene.json, history.csv and metrics.json. Ctrl-C stops early, saves
    what there is, and exits with status 130.

    \b
    Examples:
      gs2d fit
      gs2d fit photo.jpg --max-side 512 --steps 500
      gs2d fit photo.jpg --n-gaussians 20000 --out results
    """
    from .fit import default_portrait, fit_config
    from .ground_truth import GroundTruth
    from .loss import L1SSIMLoss, l1_loss, l2_loss

    losses = {"l2": l2_loss, "l1": l1_loss, "l1_ssim": L1SSIMLoss()}
    if loss not in losses:
        raise ValueError(f"--loss: expected one of {', '.join(losses)}, got {loss!r}")
    truth = GroundTruth.from_image(photo or default_portrait(), max_side, _color(background), blend)
    config = fit_config(truth.height, truth.width, n_gaussians, steps, seed, truth.blend, losses[loss], device)
    if not quiet:
        _say(f"{photo or 'the default portrait'}, {truth.width}×{truth.height} pixels, {config.n_iterations:,} steps")
    _train_and_save(config, truth, out, quiet)


def _lr_scale(pairs: list[str]) -> dict[str, float]:
    "means=0.5 and the like as a dict."
    try:
        return {name: float(factor) for name, factor in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(f"--lr-scale: expected NAME=FACTOR such as means=0.5, got {' '.join(pairs)}") from None


def _train_config(options: dict):
    "A TrainConfig from the options that were given; what was not given keeps the default it has there."
    from .train import TrainConfig

    given = {name: value for name, value in options.items() if value is not None and value != []}
    plain = {name: given[name] for name in TrainConfig.__dataclass_fields__ if name in given}
    weights = {name: given[name] for name in ("l1_weight", "ssim_weight") if name in given}
    if weights and "loss" in given:
        raise ValueError("--loss: expected either --loss or --l1-weight and --ssim-weight, got both")
    plain |= {"loss": weights} if weights else {}
    growth = {name.removeprefix("densify_"): value for name, value in given.items() if name.startswith("densify_")}
    plain["densify"] = growth if given.get("densify", bool(growth)) else None
    plain["lr_scale"] = _lr_scale(given.get("lr_scale", []))
    if "compile" in plain:
        plain["compile"] = {"true": True, "false": False}.get(plain["compile"], plain["compile"])
    return TrainConfig.from_dict(plain)


def _option(text: str, *names: str) -> typer.Option:
    return typer.Option(*names, help=text, show_default=False)


@main.command()
def train(
    ctx: typer.Context,
    n_gaussians: Annotated[int | None, _option("Gaussians of the scene to find, and to start with. [100]")] = None,
    height: Annotated[int | None, _option("Pixels. [256]")] = None,
    width: Annotated[int | None, _option("Pixels. [256]")] = None,
    n_iterations: Annotated[int | None, _option("Optimisation steps. [1000]", "--n-iterations", "--steps")] = None,
    lr: Annotated[float | None, _option("Learning rate: Adam's step, in the units of each parameter. [0.01]")] = None,
    lr_schedule: Annotated[str | None, _option("cosine, exponential or constant. [cosine]")] = None,
    lr_scale: Annotated[list[str] | None, typer.Option(metavar="NAME=FACTOR", show_default=False, help="Multiply the learning rate of one parameter: means, log_scales, rotations, opacity_logits or colors; 0 freezes it. May be given several times.")] = None,
    init_level: Annotated[str | None, _option("exact, noisy, positions_only, random or content. [random]")] = None,
    blend: Annotated[str | None, _option("weighted, additive or over. [weighted]")] = None,
    loss: Annotated[str | None, _option("l1_loss or l2_loss, instead of the two weights below.")] = None,
    l1_weight: Annotated[float | None, _option("Weight of L1 in the loss. [0.15]")] = None,
    ssim_weight: Annotated[float | None, _option("Weight of 1 - SSIM in the loss. [0.85]")] = None,
    densify: Annotated[bool | None, typer.Option("--densify/--no-densify", show_default=False, help="Let the number of Gaussians change. [on if any option below is given]")] = None,
    densify_every_n_steps: Annotated[int | None, _option("Steps between two rounds. [100]")] = None,
    densify_max_gaussians: Annotated[int | None, _option("No round leaves more than this. [2000]")] = None,
    densify_strategy: Annotated[str | None, _option("gradient (clone and split) or error (add where the picture is wrong). [gradient]")] = None,
    densify_grad_threshold: Annotated[float | None, _option("Positional gradient that makes one densify. [0.0002]")] = None,
    densify_scale_threshold: Annotated[float | None, _option("Larger is split, smaller cloned; a fraction of the domain. [0.01]")] = None,
    densify_opacity_threshold: Annotated[float | None, _option("Fainter is removed. [0.005]")] = None,
    densify_split_factor: Annotated[float | None, _option("How much smaller the two parts of a split are. [1.6]")] = None,
    densify_clone_shift: Annotated[float | None, _option("How far downhill a clone starts, in standard deviations. [0.5]")] = None,
    densify_growth: Annotated[float | None, _option("error: new ones in a round, as a fraction of those there are. [0.5]")] = None,
    densify_start_step: Annotated[int | None, _option("No round before this step. [0]")] = None,
    densify_stop_fraction: Annotated[float | None, _option("No round after this fraction of the steps. [0.7]")] = None,
    seed: Annotated[int | None, _option("Of the scene to find, the start, and the growth. [0]")] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda, cuda:1 or mps. [auto]")] = None,
    compile: Annotated[str | None, _option("auto, true or false: torch.compile where there are no kernels. [auto]")] = None,
    out: _Out = None,
    quiet: _Quiet = False,
) -> None:
    """Train on a random scene whose every parameter is known.

    The options are the fields of TrainConfig, and of DensifyConfig with densify- before them. It writes the same six
    files as `gs2d fit`.

    \b
    Examples:
      gs2d train
      gs2d train --n-gaussians 20 --init-level noisy --steps 300
      gs2d train --lr-scale means=0.5 --lr-scale colors=0 --l1-weight 0.8 --ssim-weight 0.2
      gs2d train --densify-every-n-steps 50 --densify-max-gaussians 500
    """
    _train_and_save(_train_config(ctx.params), None, out, quiet)


def _size(file, height: int | None, width: int | None) -> tuple[int, int]:
    "Rows and columns of the picture: what is missing follows from the domain, or from the file where nothing is given."
    from .ground_truth import MAX_PIXELS

    for name, value in (("--height", height), ("--width", width)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {value}")
    aspect = file.scene.domain.width / file.scene.domain.height
    if height is None and width is None:
        height, width = file.height, file.width
    if height is None and width is None:
        width = max(1, round(512 * min(1.0, aspect)))
    height = max(1, round(width / aspect)) if height is None else height
    width = max(1, round(height * aspect)) if width is None else width
    if height * width > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {width}×{height}")
    return height, width


@main.command()
def render(
    scene: Annotated[Path, typer.Argument(metavar="SCENE.json", help="A scene file.")],
    width: Annotated[int | None, typer.Option(help="Pixels. [default: from the height, or the size it was fitted at]", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: from the width, or the size it was fitted at]", show_default=False)] = None,
    blend: Annotated[str | None, typer.Option(help="weighted, additive or over. [default: as the file says]", show_default=False)] = None,
    background: Annotated[str | None, typer.Option(metavar="COLOUR", help="Three numbers such as 0,0.5,1, or white, or #ff8800. [default: as the file says]", show_default=False)] = None,
    device: _Device = "auto",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The picture to write; its suffix names the format. [default: beside the scene, as .png]", show_default=False)] = None,
) -> None:
    """Render a scene file at any size.

    \b
    Examples:
      gs2d render scene.json
      gs2d render scene.json --width 2000 --out large.png
      gs2d render scene.json --width 300 --background white --out small.webp
    """
    import torch

    from . import renderer
    from .gaussians import load_scene
    from .ground_truth import save_picture
    from .train import resolve_device

    file = load_scene(scene)
    rows, columns = _size(file, height, width)
    behind = file.background if background is None else _color(background)
    with torch.no_grad():
        image = renderer.render(file.scene.to(resolve_device(device)), rows, columns, blend or file.blend, behind)
    path = save_picture(image, out or scene.with_suffix(".png"))
    typer.echo(f"{path}, {columns}×{rows} pixels, {len(file.scene):,} Gaussians")


def _span(values, unit: str = "") -> str:
    "Smallest, middle and largest of some numbers, for people."
    if not values.numel():
        return "none"
    return f"{values.min().item():.3g} to {values.max().item():.3g}{unit}, median {values.median().item():.3g}"


@main.command()
def info(
    scene: Annotated[Path, typer.Argument(metavar="SCENE.json", help="A scene file.")],
) -> None:
    """Say what a scene file holds.

    \b
    Example:
      gs2d info scene.json
    """
    from .gaussians import load_scene

    file = load_scene(scene)
    gaussians, domain = file.scene, file.scene.domain
    pixel = domain.width / file.width if file.width else None
    lines = {
        "Gaussians": f"{len(gaussians):,}, {gaussians.colors.shape[1]} channels, {scene.stat().st_size:,} bytes",
        "domain": f"x {domain.x_dim[0]:g} to {domain.x_dim[1]:g}, y {domain.y_dim[0]:g} to {domain.y_dim[1]:g}",
        "picture": f"{file.width}×{file.height} pixels" if file.width and file.height else "of any size",
        "blend": f"{file.blend}, background {' '.join(f'{value:g}' for value in file.background)}",
        "scales": _span(gaussians.scales.detach() / pixel, " pixels") if pixel else _span(gaussians.scales.detach(), " domain units"),
        "opacities": _span(gaussians.opacities.detach()),
        "colours": _span(gaussians.colors.detach()),
    }
    for name, text in lines.items():
        typer.echo(f"{name:<11}{text}")


if __name__ == "__main__":
    main(prog_name="gs2d")
