"""The reference renderer: against a triple loop, against finite differences, and within its memory."""

import math
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import gs2d.renderer as renderer
from gs2d.gaussians import CUTOFF_POWER, PARAMETER_NAMES, Domain2D, Gaussians2D
from gs2d.renderer import MAX_ALPHA, WEIGHT_EPS, Blend, ScreenGaussians, pixel_centers, project, rasterize, render

BLENDS = list(Blend)


def make_scene(n, seed=0, domain=Domain2D()):
    g = torch.Generator().manual_seed(seed)
    rand = torch.rand(n, 9, generator=g)
    return Gaussians2D.from_values(
        (rand[:, :2] - 0.5) * torch.tensor([domain.width, domain.height]),
        0.1 + 1.5 * rand[:, 2:4], 6 * rand[:, 4], rand[:, 5], rand[:, 6:], domain)


def oracle(screen, height, width, blend, background):
    "Pixel by pixel and Gaussian by Gaussian, in Python's 64-bit numbers."
    image = torch.zeros(height, width, len(background))
    gaussians = list(zip(*(tensor.tolist() for tensor in screen)))
    for i in range(height):
        for j in range(width):
            ink, total, light = [0.0] * len(background), 0.0, 1.0
            for (mx, my), (a, b, c), opacity, color in gaussians:
                dx, dy = j + 0.5 - mx, i + 0.5 - my
                power = a * dx * dx + 2 * b * dx * dy + c * dy * dy
                weight = math.exp(-power / 2) if power <= 2 * math.log(255) else 0.0
                if blend is Blend.WEIGHTED:
                    weight = max(0.0, (weight - 1 / 255) / (1 - 1 / 255))
                alpha = opacity * weight
                if blend is Blend.OVER:
                    alpha = min(alpha, MAX_ALPHA)
                    alpha, light = light * alpha, light * (1 - alpha)
                total += alpha
                ink = [k + alpha * v for k, v in zip(ink, color)]
            if blend is Blend.WEIGHTED:
                ink = [(k + WEIGHT_EPS * b) / (total + WEIGHT_EPS) for k, b in zip(ink, background)]
            else:
                ink = [k + (light if blend is Blend.OVER else 1.0) * b for k, b in zip(ink, background)]
            image[i, j] = torch.tensor(ink)
    return image


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (13, 6)])
def test_equals_the_triple_loop(blend, backend, height, width):
    scene, background = make_scene(12, domain=Domain2D.for_image(height, width)), (0.2, -0.3, 0.9)
    image = render(scene, height, width, blend, background, backend).detach()
    expected = oracle(project(scene, height, width), height, width, blend, background)
    assert image.shape == (height, width, 3) and image.dtype == torch.float32
    assert_close(image, expected, rtol=0, atol=1e-5)


class Raw:
    "The five raw tensors as they are, so that gradcheck's own tensors are differentiated."

    def __init__(self, means, log_scales, rotations, opacity_logits, colors):
        self.means, self.rotations, self.colors, self.domain = means, rotations, colors, Domain2D()
        self.scales, self.opacities = log_scales.exp(), opacity_logits.sigmoid()


def disc(radius, dtype=torch.float32):
    "One white, opaque, round Gaussian whose cut-off is `radius` pixels from the middle of a pixel."
    conic = torch.tensor([[CUTOFF_POWER / radius**2, 0.0, CUTOFF_POWER / radius**2]], dtype=dtype)
    return ScreenGaussians(torch.full((1, 2), 0.5, dtype=dtype), conic, torch.ones(1, dtype=dtype), torch.ones(1, 3, dtype=dtype))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_isolated_weighted_gaussian_has_no_rim(backend):
    "Just inside the cut-off a white Gaussian on black is under one grey level; the sums keep the field's cut at 1/255."
    for radius in (20.005, 60.01):
        row = {blend: rasterize(disc(radius), 1, 80, blend, backend=backend)[0, :, 0] for blend in BLENDS}
        last = int(radius)
        assert all((values[last + 1 :] == 0).all() for values in row.values())
        assert 0 < row[Blend.WEIGHTED][last] < 1 / 255 and row[Blend.WEIGHTED][0] > 0.98
        assert row[Blend.ADDITIVE][last] >= 1 / 255 and row[Blend.OVER][last] >= 1 / 255
        assert (row[Blend.WEIGHTED].diff() <= 0).all()


@pytest.mark.parametrize("sigma", [8.0, 11.0])
def test_growing_lights_up_as_much_as_the_gradient_says(sigma):
    "The edge sweeps over pixels while a Gaussian grows. A hard cut hides what they jump by from every derivative."
    scene = Gaussians2D.from_values([[0, 0]], [[sigma, sigma]], [0], [1], [[1, 1, 1]], Domain2D((-40, 40), (-40, 40))).double()

    def light(nudge):
        with torch.no_grad():
            moved = scene.clone()
            moved.log_scales += nudge
            return render(moved, 80, 80, backend="reference").sum().item()

    render(scene, 80, 80, backend="reference").sum().backward()
    coarse = (light(0.5 / sigma) - light(-0.5 / sigma)) * sigma  # half a pixel each way
    assert math.isclose(scene.log_scales.grad.sum().item(), coarse, rel_tol=0.01)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_gradcheck(monkeypatch, blend, chunk):
    monkeypatch.setattr(renderer, "PAIRS_PER_CHUNK", chunk)
    raw = [getattr(make_scene(4, seed=3), name).detach().double().requires_grad_() for name in PARAMETER_NAMES]
    background = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *r: render(Raw(*r[:5]), 4, 5, blend, r[5]), (*raw, background))


@pytest.mark.parametrize("blend", BLENDS)
def test_no_gaussians_show_the_background(blend):
    background = (0.25, 0.5, 0.75)
    for backend in ("reference", "auto"):
        assert_close(render(make_scene(0), 3, 4, blend, background, backend).detach(), torch.tensor(background).expand(3, 4, 3))


@pytest.mark.parametrize("blend", BLENDS)
def test_a_pixel_out_of_reach_shows_the_background(blend):
    lonely = Gaussians2D.from_values([[4, 4]], [[0.1, 0.1]], [0], [1], [[1, 1, 1]])
    assert_close(render(lonely, 20, 20, blend, (0.2, 0.4, 0.6))[-1, 0].detach(), torch.tensor([0.2, 0.4, 0.6]))


def test_y_points_up_and_x_to_the_right():
    upper_right = Gaussians2D.from_values([[3, 4]], [[0.5, 0.5]], [0], [1], [[1, 1, 1]])
    image = render(upper_right, 40, 40, Blend.ADDITIVE).detach()[..., 0]
    i, j = divmod(int(image.argmax()), 40)
    assert (i, j) in {(3, 31), (3, 32), (4, 31), (4, 32)}


def test_a_larger_picture_does_not_shift():
    scene = Gaussians2D.from_values([[1.3, -0.7]], [[0.8, 0.5]], [0.4], [1], [[1, 1, 1]])

    def centre(size):
        image = render(scene, size, size, Blend.ADDITIVE).detach()[..., 0].double()
        points = pixel_centers(size, size, torch.float64) / size
        return (points * image[..., None]).sum((0, 1)) / image.sum()

    assert_close(centre(40), centre(80), rtol=0, atol=2e-4)


def test_order_matters_only_for_over():
    scene = make_scene(5)
    back_to_front = Gaussians2D(*(getattr(scene, name).flip(0) for name in PARAMETER_NAMES))
    change = {b: (render(scene, 20, 20, b) - render(back_to_front, 20, 20, b)).abs().max().item() for b in Blend}
    assert change[Blend.WEIGHTED] < 1e-5 and change[Blend.ADDITIVE] < 1e-5 and change[Blend.OVER] > 1e-2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_number_of_channels(channels):
    scene = make_scene(5)
    colors = torch.rand(5, channels)
    scene = Gaussians2D(scene.means, scene.log_scales, scene.rotations, scene.opacity_logits, colors)
    for blend in BLENDS:
        reference = render(scene, 9, 7, blend, (0.5,) * channels, "reference")
        assert reference.shape == (9, 7, channels)
        assert_close(render(scene, 9, 7, blend, (0.5,) * channels), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [
    dict(height=0), dict(width=-3), dict(height=2.5), dict(height="8"), dict(blend="multiply"), dict(background=(0, 0)),
    dict(background=0.5), dict(backend="gpu")])
def test_bad_input_is_named(wrong):
    with pytest.raises((TypeError, ValueError), match="expected .* got"):
        render(make_scene(2), **{"height": 8, "width": 8, **wrong})


def test_screen_shapes_are_checked():
    screen = project(make_scene(3), 8, 8)
    with pytest.raises(ValueError, match="expected means"):
        rasterize(screen._replace(opacities=screen.opacities[:2]), 8, 8)


def test_reference_memory_is_bounded():
    "1,000 Gaussians on 512×600 would take 1.2 GB for one table, and autograd keeps several; ours may use 400 MB in all."
    resource = pytest.importorskip("resource", reason="this platform does not report peak memory")
    code = """
import resource, torch
from gs2d.gaussians import Gaussians2D
from gs2d.renderer import render
r = torch.rand(1000, 9)
scene = Gaussians2D.from_values(10 * r[:, :2] - 5, r[:, 2:4] + .05, r[:, 4], r[:, 5], r[:, 6:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
render(scene, 512, 600, backend="reference").sum().backward()
assert scene.means.grad.isfinite().all()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    assert int(done.stdout) * unit < 400e6


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_hair_thin_gaussian_does_not_flash(blend, backend):
    "With an axis ratio of a million, rounding can make the exponent positive; no weight may exceed 1."
    needle = Gaussians2D(torch.zeros(9, 2), torch.tensor([[5.0, -9.0]] * 9), torch.linspace(0.1, 1.4, 9), torch.full((9,), 20.0), torch.ones(9, 3))
    for one in range(9):
        single = Gaussians2D(*(getattr(needle, name)[one : one + 1] for name in PARAMETER_NAMES))
        image = render(single, 64, 64, blend, backend=backend)
        assert image.max() <= 1 + 1e-6
        assert all(g.isfinite().all() for g in torch.autograd.grad(image.sum(), list(single.parameters())))


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch.compile warns of itself
def test_torch_compile_traces_through_the_kernels():
    scene = make_scene(6)
    expected = render(scene, 16, 16)  # also loads the kernels
    assert_close(torch.compile(render, fullgraph=True)(scene, 16, 16), expected)
