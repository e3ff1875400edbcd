"""Every set of kernels against the readable reference, the door to them, and what surrounds those of the CPU.

A new backend is one more entry of BACKENDS, and gets the whole suite.
"""
import gc
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_kernels import one as fuzz_one
from hypothesis import given, settings
from hypothesis import strategies as st

import gs2d
from gs2d import backward, loss
from gs2d.gaussians import Domain2D, Gaussians2D
from gs2d.kernels import cpu_loss, operators
from gs2d.kernels.operators import Kernels, kernels_of, registered
from gs2d.renderer import Blend, ScreenGaussians, project, rasterize, render

PACKAGE = Path(gs2d.__file__).parent
OPS = torch.ops.gs2d


@dataclass(frozen=True)
class Backend:
    "A type of device, and kernels for it."

    name: str
    device: str
    kernels: Callable[[], Kernels]

    def serving(self):
        return registered(self.device, self.kernels())

    def on(self, *tensors):
        "The same leaves on this device."
        return [tensor.detach().to(self.device).requires_grad_(tensor.requires_grad) for tensor in tensors]


BACKENDS = [Backend("cpu", "cpu", lambda: kernels_of("cpu"))]

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
each_blend = pytest.mark.parametrize("blend", list(Blend))


# ---- pictures


def scene(n, height, width, sigma, seed=0, channels=3, stretch=0.5, overhang=0.3, requires_grad=True):
    "n random Gaussians in pixels, some with their centre outside the image."
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float32)
    means = (torch.rand(n, 2, generator=g) * (1 + 2 * overhang) - overhang) * size
    p, q = (1 / (sigma * (stretch * torch.randn(n, 2, generator=g)).exp()) ** 2).unbind(-1)
    turn = torch.rand(n, generator=g) * math.pi
    c, s = turn.cos(), turn.sin()
    conics = torch.stack([c * c * p + s * s * q, c * s * (p - q), s * s * p + c * c * q], -1)
    colors = torch.randn(n, channels, generator=g)
    return [t.requires_grad_(requires_grad) for t in (means, conics, torch.rand(n, generator=g), colors)]


def draw(backend, leaves, height, width, blend, background=(0.0, 0.0, 0.0)):
    "The picture by a backend's kernels, or by the reference if it is None."
    if backend is None:
        return rasterize(ScreenGaussians(*leaves), height, width, blend, background, "reference")
    with backend.serving():
        return rasterize(ScreenGaussians(*leaves), height, width, blend, background)


def image_and_gradients(backend, leaves, height, width, blend, background):
    "Image, and the gradients of means, conics, opacities, colours and background."
    background = background.detach().clone().requires_grad_()
    image = draw(backend, leaves, height, width, blend, background)
    weights = torch.linspace(-1, 1, image.numel(), device=image.device).reshape(image.shape).cos()
    with (backend or BACKENDS[0]).serving():
        gradients = torch.autograd.grad((image * weights).sum(), (*leaves, background), allow_unused=True)
    return image.detach(), gradients


def assert_equals_reference(backend, leaves, height, width, blend, background):
    "Image to 1e-5 of its largest value (at least 1): float32 sums in another order. Gradients to 1e-4 of the largest entry."
    *leaves, background = backend.on(*leaves, background)
    ours, d_ours = image_and_gradients(backend, leaves, height, width, blend, background)
    theirs, d_theirs = image_and_gradients(None, leaves, height, width, blend, background)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    for name, a, b in zip((*ScreenGaussians._fields, "background"), d_ours, d_theirs):
        limit = 1e-4 * b.abs().max().item() if b.numel() else 0.0
        assert a.shape == b.shape and (a.numel() == 0 or (a - b).abs().max() <= max(limit, 1e-12)), name


sizes = st.sampled_from([(1, 1), (1, 29), (33, 1), (7, 5), (31, 33), (32, 16), (45, 67), (64, 64)])


@each_backend
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40), size=sizes, sigma=st.sampled_from([0.05, 0.4, 1.5, 6.0, 40.0, 500.0]), seed=st.integers(0, 10**6),
    blend=st.sampled_from(list(Blend)), channels=st.sampled_from([3, 3, 1, 2, 4, 7]), stretch=st.sampled_from([0.0, 0.4, 1.0]),
    overhang=st.sampled_from([0.0, 0.5, 3.0]), transparent=st.booleans(),
)
def test_kernels_equal_the_reference(backend, n, size, sigma, seed, blend, channels, stretch, overhang, transparent):
    leaves = scene(n, *size, sigma, seed, channels, stretch, overhang)
    if transparent and n:
        leaves[2] = torch.cat([torch.zeros(n // 2), leaves[2][n // 2 :].detach()]).requires_grad_()
    assert_equals_reference(backend, leaves, *size, blend, torch.linspace(0.2, 0.8, channels))


@each_backend
@each_blend
@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_any_number_of_channels(backend, blend, channels):
    leaves = scene(60, 40, 50, 5.0, seed=2, channels=channels)
    assert_equals_reference(backend, leaves, 40, 50, blend, torch.linspace(0.2, 0.8, channels))


@each_backend
@each_blend
def test_several_bands_and_both_ends_of_a_row(backend, blend):
    leaves = scene(150, 150, 133, 6.0, seed=3)
    assert_equals_reference(backend, leaves, 150, 133, blend, torch.tensor([0.1, 0.5, 0.9]))


@each_backend
@each_blend
def test_long_thin_diagonals_at_the_limit_of_float32(backend, blend):
    # scale 300 by 0.02 pixels: the correlation of the conic is within 1e-8 of one, so no interval can be trusted
    n, g = 20, torch.Generator().manual_seed(5)
    turn = torch.linspace(0.1, 3.0, n)
    p, q = torch.full((n,), 1 / 300.0**2), torch.full((n,), 1 / 0.3**2)
    c, s = turn.cos(), turn.sin()
    conics = torch.stack([c * c * p + s * s * q, c * s * (p - q), s * s * p + c * c * q], -1)
    leaves = [t.requires_grad_() for t in (torch.rand(n, 2, generator=g) * 60, conics, torch.rand(n, generator=g), torch.rand(n, 3, generator=g))]
    assert_equals_reference(backend, leaves, 60, 60, blend, torch.zeros(3))


@each_backend
@each_blend
def test_a_gaussian_that_is_not_finite_draws_nothing(backend, blend):
    good = scene(8, 20, 24, 3.0, requires_grad=False)
    bad = [t.clone() for t in scene(8, 20, 24, 3.0, requires_grad=False)]
    bad[0][0, 0], bad[1][1, 1], bad[1][2, 0], bad[0][3, 1], bad[1][4] = math.nan, math.nan, math.inf, -math.inf, torch.zeros(3) * math.nan
    for tensor in good:
        tensor[:5] = 0
    good[0][:5], good[1][:5] = -1e6, torch.tensor([1.0, 0.0, 1.0])
    background = torch.tensor([0.3, 0.2, 0.1])
    *good, background = backend.on(*good, background)
    expected = draw(backend, good, 20, 24, blend, background)
    assert torch.equal(draw(backend, backend.on(*bad), 20, 24, blend, background), expected)


@each_backend
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_extreme_numbers_are_drawn_as_by_the_reference_or_not_at_all(backend, seed):
    with backend.serving():
        fuzz_one(np.random.default_rng(seed))


def broken_scene(name, value):
    "Four Gaussians, the second with this value in this parameter; and the other three alone."
    g = torch.Generator().manual_seed(0)
    raw = [torch.randn(4, 2, generator=g), torch.randn(4, 2, generator=g), torch.randn(4, generator=g), torch.randn(4, generator=g),
           torch.rand(4, 3, generator=g)]
    k = ("means", "log_scales", "rotations", "opacity_logits", "colors").index(name)
    raw[k].reshape(4, -1)[1, -1] = value
    return raw, [tensor[[0, 2, 3]] for tensor in raw]


@each_blend
@pytest.mark.parametrize("name, value", [
    *(("log_scales", math.log(scale)) for scale in (1e-15, 1e-18, 1e-19, 3e-20, 1e-30, 1e-38)), ("log_scales", -math.inf), ("log_scales", math.inf),
    *((name, math.nan) for name in ("means", "log_scales", "rotations", "opacity_logits", "colors")),
    ("means", math.inf), ("means", 1e30), ("rotations", math.inf), ("colors", -math.inf)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gaussian_beyond_float32_is_as_if_it_were_not_there(backend, blend, name, value):
    whole, others = (Gaussians2D(*raw, blend=blend, background=(0.1, 0.2, 0.3)) for raw in broken_scene(name, value))
    images = [render(scene, 20, 24, backend=backend) for scene in (whole, others)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-6 if backend == "reference" else 0)
    for image in images:
        (image * torch.linspace(-1, 1, image.numel()).reshape(image.shape)).sum().backward()
    for a, b in zip(whole.parameters(), others.parameters()):
        assert not a.grad[1].any()  # exactly 0, and no NaN
        torch.testing.assert_close(a.grad[[0, 2, 3]], b.grad, rtol=1e-4, atol=1e-4)


@each_backend
@each_blend
def test_rows_of_what_is_far_away_or_endless_stay_inside_the_picture(backend, blend):
    for x in (5.0, 1e11, -1e12, 1e30, -1e30, 3e38):
        for y in (5.0, 1e12, -1e11, 1e30, -1e30, 3e38):
            for conic in ((1e-2, 1e-2, 1e-2), (0.0, 0.0, 0.0), (1.0, -1.0, 1.0), (1e-45, 1e-45, 1e-45), (1e12, 0.0, 1e-45), (1e38, 1e38, 1e38)):
                leaves = [torch.tensor([value]).requires_grad_() for value in ((x, y), conic, 0.5, (1.0, 1.0, 1.0))]
                ours, theirs = (draw(which, backend.on(*leaves), 40, 50, blend) for which in (backend, None))
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
                with backend.serving():
                    assert all(grad.isfinite().all() for grad in torch.autograd.grad(draw(backend, leaves, 40, 50, blend).sum(), leaves))


@each_backend
@pytest.mark.parametrize("far", [1e5, 1e9, 1e30])
def test_means_far_outside_are_safe(backend, far):
    leaves = scene(6, 16, 16, 3.0, requires_grad=False)
    leaves[0][:3] = torch.tensor([[far, 8.0], [-far, far], [8.0, -far]])
    leaves = backend.on(*leaves)
    ours, theirs = draw(backend, leaves, 16, 16, "additive"), draw(None, leaves, 16, 16, "additive")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@each_backend
@pytest.mark.parametrize("conic", [(0.0, 0.0, 0.0), (0.01, 0.0, 0.0), (1e12, 0.0, 1e12), (0.01, 0.02, 0.01), (1e-12, 0.0, 1e-12)])
def test_degenerate_conics_are_safe(backend, conic):
    leaves = scene(1, 40, 50, 3.0, requires_grad=False)
    leaves[1][:] = torch.tensor(conic)
    leaves[0][:] = torch.tensor([20.5, 10.5])
    leaves = backend.on(*leaves)
    ours, theirs = draw(backend, leaves, 40, 50, "additive"), draw(None, leaves, 40, 50, "additive")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each_backend
def test_the_cutoff_falls_on_the_same_pixels_as_in_the_reference(backend):
    # constant opacity and colour: a pixel decided differently would differ by 1/255, hundreds of times the tolerance
    leaves = scene(3000, 120, 160, 0.5, seed=9, requires_grad=False)
    leaves[2][:], leaves[3][:] = 1.0, 1.0
    leaves = backend.on(*leaves)
    ours, theirs = draw(backend, leaves, 120, 160, "additive"), draw(None, leaves, 120, 160, "additive")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours != 0, theirs != 0)


@each_backend
def test_over_keeps_its_gradient_behind_and_in_front_of_many_opaque_sheets(backend):
    n = 40  # 0.01 ** 40 is zero in float32
    means, conics = torch.full((n, 2), 2.5), torch.tensor([[1e-4, 0.0, 1e-4]]).repeat(n, 1)
    colors = torch.rand(n, 3, generator=torch.Generator().manual_seed(1))
    leaves = backend.on(*(t.requires_grad_() for t in (means, conics, torch.full((n,), 0.98), colors)))
    image, grads = image_and_gradients(backend, leaves, 5, 5, "over", torch.zeros(3, device=backend.device))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = image_and_gradients(None, exact, 5, 5, "over", torch.zeros(3, device=backend.device).double())
    torch.testing.assert_close(image.double(), expected[0], rtol=0, atol=1e-5)
    for a, b in zip(grads[:4], expected[1][:4]):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * b.abs().max()


def exact_gradients(screen, height, width, blend, background, wish):
    "In float64, by the lines written down in `gs2d.backward`, some rows of pixels at a time."
    found = [torch.zeros_like(tensor) for tensor in screen]
    for top in range(0, height, 128):
        part = wish[top : top + 128].double()
        moved = screen._replace(means=screen.means - torch.tensor([0.0, top], dtype=torch.float64))
        for total, new in zip(found, backward.rasterize_backward(moved, *part.shape[:2], blend, background, part)):
            total += new
    return found


def scene_in(dtype, raw, domain):
    return Gaussians2D(*(torch.tensor(value, dtype=torch.float32).to(dtype) for value in raw), domain)


def worst_relative_error(backend, size, blend, wish):
    "Of any single number in the gradients of a broad, turned Gaussian, from the picture back to the scene's parameters."
    height, width = size
    domain, background = Domain2D.for_image(height, width), (0.1, 0.3, 0.6)
    unit = domain.height / height * max(size)  # of the longer side
    raw = [[0.031 * domain.width, -0.017 * domain.height]], [[math.log(0.35 * unit), math.log(0.2 * unit)]], [0.6], [1.4], [[0.9, 0.2, 0.5]]
    scene, exact = (scene_in(dtype, raw, domain) for dtype in (torch.float32, torch.float64))
    with backend.serving():
        render(scene.to(backend.device), height, width, blend, background).backward(wish.to(backend.device))
    screen = project(exact, height, width)
    detached = ScreenGaussians(*(tensor.detach() for tensor in screen))
    torch.autograd.backward(screen, exact_gradients(detached, height, width, blend, background, wish))
    return max(((a.grad.cpu() - b.grad) / b.grad).abs().max().item() for a, b in zip(scene.parameters(), exact.parameters()))


def wishes(height, width):
    "Two gradients of a picture: a smooth one, as of a loss on a photograph, and one that is different in every pixel."
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = torch.stack([torch.cos(5 * x + 3 * y), torch.sin(4 * x * y) + 0.3, x - y * y], -1)
    yield smooth / (height * width)
    yield torch.randn(height, width, 3, generator=torch.Generator().manual_seed(0)) + 0.5


@each_backend
@each_blend
@pytest.mark.parametrize("size", [(512, 512), (8192, 256), (2048, 2048)], ids=str)
def test_gradients_of_a_broad_gaussian_stay_within_1e_4_of_float64_whatever_the_size(backend, blend, size):
    for wish in wishes(*size):
        error = worst_relative_error(backend, size, blend, wish)
        assert error < 1e-4, f"{error:.1e}"


@pytest.mark.skipif(not os.environ.get("GS2D_LARGE_TESTS"), reason="8192² takes 4 GB and a minute: set GS2D_LARGE_TESTS=1")
@each_backend
@each_blend
def test_gradients_of_a_broad_gaussian_at_8192(backend, blend):
    for wish in wishes(8192, 8192):
        error = worst_relative_error(backend, (8192, 8192), blend, wish)
        print(f"{blend.value}: {error:.1e}")
        assert error < 1e-4, f"{error:.1e}"


@each_backend
@each_blend
def test_the_background_has_a_gradient(backend, blend):
    leaves, found = backend.on(*scene(30, 20, 30, 3.0)), []
    for which in (backend, None):
        background = torch.tensor([0.2, 0.4, 0.6], device=backend.device, requires_grad=True)
        with backend.serving():
            image = draw(which, leaves, 20, 30, blend, background)
            weighted = image * torch.linspace(0, 1, 3, device=backend.device)
            found.append(torch.autograd.grad(weighted.sum(), background)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@each_backend
@each_blend
def test_finite_differences(backend, blend):
    "Each Gaussian covers the whole picture, so that no step crosses the cut-off, where the picture jumps."
    leaves = backend.on(*scene(8, 16, 18, 40.0, seed=4, overhang=0.0))
    weights = torch.linspace(-1, 1, 16 * 18 * 3, device=backend.device).reshape(16, 18, 3)
    value = lambda *tensors: (draw(backend, tensors, 16, 18, blend) * weights).sum()
    with backend.serving():
        gradients = torch.autograd.grad(value(*leaves), leaves)
    for k, gradient in enumerate(gradients):
        along = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(k)).to(backend.device)
        along = along * leaves[k].detach().abs().mean() * 1e-2  # a step of a percent: float32 leaves five digits of it
        moved = [[*leaves[:k], leaves[k].detach() + sign * along, *leaves[k + 1 :]] for sign in (1, -1)]
        difference = (value(*moved[0]) - value(*moved[1])).item() / 2
        torch.testing.assert_close((gradient * along).sum().item(), difference, rtol=2e-2, atol=2e-4 * 16 * 18)


@each_backend
def test_inputs_need_not_be_contiguous(backend):
    means, conics, opacities, colors = backend.on(*scene(30, 20, 30, 3.0, requires_grad=False))
    strided = means.T.contiguous().T, conics.T.contiguous().T, opacities.repeat_interleave(2)[::2], colors.T.contiguous().T
    plain = draw(backend, (means, conics, opacities, colors), 20, 30, "weighted")
    assert torch.equal(draw(backend, strided, 20, 30, "weighted"), plain)


@each_backend
@each_blend
@pytest.mark.parametrize("channels", [3, 4])
def test_what_is_saved_is_one_row_of_bytes(backend, blend, channels):
    leaves = backend.on(*scene(12, 16, 18, 3.0, channels=channels, requires_grad=False))
    with backend.serving():
        image, saved = OPS.rasterize(*leaves, torch.zeros(channels, device=backend.device), 16, 18, blend.value)
        size = kernels_of(backend.device).saved_size
    assert image.shape == (16, 18, channels) and (saved.dtype, saved.ndim) == (torch.uint8, 1)
    assert len(saved) == (size(12, channels, 16, 18, blend.value) if size else 0)


# ---- losses


def pictures(height, width, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, channels, generator=g)
    return (target + 0.2 * torch.randn(target.shape, generator=g)).requires_grad_(), target


def value_and_gradient(function, image):
    value = function(image)
    return value.detach(), torch.autograd.grad(value, image)[0]


def ssim(image, target, backend="auto"):
    "SSIM as a loss takes it: of pictures that are not clamped."
    if backend == "reference":
        return loss.ssim_map(image, target).mean((1, 2)).mean()
    return 1 - operators.photometric(image, target, 0.0, 1.0)


def photometric_by_reference(image, target, l1_weight, ssim_weight):
    similarity = ssim(image, target, backend="reference")
    return l1_weight * (image - target).abs().mean() + ssim_weight * (1 - similarity)


@each_backend
@pytest.mark.parametrize("size", [(11, 11), (12, 75), (64, 64), (65, 33), (97, 130), (140, 20)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ssim_equals_pytorch_msssim(backend, size, channels):
    from pytorch_msssim import ssim as independent

    image, target = backend.on(*pictures(*size, channels))
    batch = lambda x: x.permute(2, 0, 1)[None]
    with backend.serving():
        ours, d_ours = value_and_gradient(lambda x: ssim(x, target), image)
    theirs, d_theirs = value_and_gradient(lambda x: independent(batch(x), batch(target), data_range=1, win_size=11), image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (d_ours - d_theirs).abs().max() <= 1e-4 * d_theirs.abs().max()


@each_backend
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (10, 10), (9, 64), (80, 5), (66, 70)])
def test_ssim_equals_the_reference_also_below_eleven_pixels(backend, size):
    image, target = backend.on(*pictures(*size))
    with backend.serving():
        ours, d_ours = value_and_gradient(lambda x: ssim(x, target), image)
    theirs, d_theirs = value_and_gradient(lambda x: ssim(x, target, backend="reference"), image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (d_ours - d_theirs).abs().max() <= 1e-4 * d_theirs.abs().max() + 1e-9


@each_backend
@pytest.mark.parametrize("needy", [(True, True), (False, True)])
def test_ssim_is_differentiable_in_the_target_too(backend, needy):
    pair = [picture.detach().requires_grad_(needs) for picture, needs in zip(backend.on(*pictures(30, 40)), needy)]
    leaves = [picture for picture in pair if picture.requires_grad]
    with backend.serving():
        ours = torch.autograd.grad(ssim(*pair), leaves)
    theirs = torch.autograd.grad(ssim(*pair, backend="reference"), leaves)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@each_backend
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_photometric_is_l1_and_ssim(backend, channels):
    image, target = backend.on(*pictures(40, 50, channels))
    with backend.serving():
        value, ours = value_and_gradient(lambda x: operators.photometric(x, target, 0.3, 0.7), image)
    expected, theirs = value_and_gradient(lambda x: photometric_by_reference(x, target, 0.3, 0.7), image)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@each_backend
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 4), (90, 70, 3), (300, 260, 3)])
def test_the_squared_error_equals_plain_tensors(backend, size):
    g = torch.Generator().manual_seed(0)
    image, target = backend.on(1.5 * torch.rand(size, generator=g) - 0.25, torch.rand(size, generator=g))
    with backend.serving():
        ours, grad = value_and_gradient(lambda x: 3 * loss.l2_loss(x, target), image.clone().requires_grad_())
        score = loss.psnr(image, target)
    theirs = (image.double() - target.double()).square().mean()
    torch.testing.assert_close(ours.double(), 3 * theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, 6 * (image - target) / image.numel(), rtol=1e-6, atol=0)
    clamped = (image.clamp(0, 1).double() - target.double()).square().mean()
    torch.testing.assert_close(score.double(), -10 * clamped.log10(), rtol=1e-6, atol=0)
    image[-1, -1, -1] = math.nan
    with backend.serving():
        assert loss.l2_loss(image, target).isnan() and loss.psnr(image, target).isnan()


@each_backend
@pytest.mark.parametrize("place", [0, 16, 40])  # among whole vectors, and among the numbers that are left over
def test_psnr_of_a_nan_anywhere_is_one(backend, place):
    image, zeros = torch.zeros(2, 1, 41, 1, device=backend.device)
    image[0, place] = math.nan
    with backend.serving():
        assert loss.psnr(image, zeros).isnan() and loss.psnr(zeros, image).isnan()


@each_backend
def test_psnr_and_the_squared_error_keep_their_other_gradients(backend):
    image, target = (torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(k)) for k in range(2))
    image, target = backend.on(image.requires_grad_(), target.requires_grad_())
    for score in (loss.l2_loss, loss.psnr):
        with backend.serving():
            grads = torch.autograd.grad(score(image, target), (image, target))
        torch.testing.assert_close(grads[0], -grads[1])
        assert grads[0].abs().max() > 0


# ---- operators


@each_backend
@each_blend
@pytest.mark.parametrize("channels", [3, 4])
def test_opcheck(backend, blend, channels):
    *leaves, background = backend.on(*scene(12, 16, 18, 3.0, channels=channels), torch.rand(channels).requires_grad_())
    with backend.serving():
        torch.library.opcheck(OPS.rasterize.default, (*leaves, background, 16, 18, blend.value))
        plain = [t.detach() for t in (*leaves, background)]
        image, saved = OPS.rasterize(*plain, 16, 18, blend.value)
        for with_background in (False, True):
            arguments = (torch.ones_like(image), *plain, image, saved, blend.value, with_background)
            torch.library.opcheck(OPS.rasterize_backward.default, arguments)


@each_backend
@pytest.mark.parametrize("channels", [3, 4])
def test_opcheck_of_the_losses(backend, channels):
    image, target = backend.on(*pictures(16, 18, channels))
    with backend.serving():
        torch.library.opcheck(OPS.image_loss.default, (image, target, 0.15, 0.85, True))
        torch.library.opcheck(OPS.image_loss.default, (image.detach(), target, 0.15, 0.85, False))
        torch.library.opcheck(OPS.squared_error.default, (image, target, False, True))
        torch.library.opcheck(OPS.squared_error.default, (image.detach(), target, True, False))


@each_backend
def test_torch_compile_traces_through_without_a_break(backend):
    leaves, (_, target) = backend.on(*scene(12, 20, 24, 3.0)), pictures(20, 24)
    target = target.to(backend.device)

    def step(*leaves):
        image = rasterize(ScreenGaussians(*leaves), 20, 24, Blend.WEIGHTED, torch.zeros(3, device=backend.device))
        return operators.photometric(image, target) - ssim(image, target) + loss.l2_loss(image, target)

    with backend.serving():
        eager = torch.autograd.grad(step(*leaves), leaves)
        traced = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, traced):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- the door: what is missing is the reference's


def only(*names):
    "The CPU's kernels, but only some of them."
    return Kernels(**{name: getattr(kernels_of("cpu"), name) for name in names})


PARTIAL = [(), ("rasterize", "saved_size"), ("rasterize", "saved_size", "rasterize_backward"), ("image_loss",), ("squared_error",)]


@pytest.mark.parametrize("names", PARTIAL, ids="+".join)
def test_the_reference_serves_what_kernels_do_not(names):
    leaves, target = scene(20, 30, 40, 4.0), torch.rand(30, 40, 3, generator=torch.Generator().manual_seed(0))

    def everything():
        image = rasterize(ScreenGaussians(*leaves), 30, 40)
        values = loss.psnr(image, target), loss.L1SSIMLoss()(image, target), loss.l2_loss(image, target), loss.ssim(image, target)
        return [value.detach() for value in (image, *values)], torch.autograd.grad(sum(values), leaves)

    with registered("cpu", Kernels()):
        expected, d_expected = everything()
    with registered("cpu", only(*names)):
        assert operators.available("cpu") == set(names)
        found, d_found = everything()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(d_found, d_expected):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_kernels_that_only_draw_need_not_save_anything():
    calls = []

    def draws(*arguments):
        calls.append(arguments[-1])
        return kernels_of_before.rasterize(*arguments)[0], torch.empty(0, dtype=torch.uint8)

    kernels_of_before, leaves, target = kernels_of("cpu"), scene(20, 30, 40, 4.0), torch.zeros(30, 40, 3)
    expected = image_and_gradients(None, leaves, 30, 40, Blend.OVER, torch.zeros(3))[1]
    with registered("cpu", Kernels(rasterize=draws)):
        image = rasterize(ScreenGaussians(*leaves), 30, 40, Blend.OVER)
        assert calls == ["over"] and loss.psnr(image.detach(), target).isfinite()
        weights = torch.linspace(-1, 1, image.numel()).reshape(image.shape).cos()
        for a, b in zip(torch.autograd.grad((image * weights).sum(), leaves), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.library.opcheck(OPS.rasterize.default, (*leaves, torch.zeros(3), 30, 40, "over"))


@each_blend
def test_the_reference_is_the_default_of_every_operator(blend):
    leaves, (image, target) = scene(12, 16, 18, 3.0), pictures(16, 18)
    with registered("cpu", Kernels()):
        found, saved = OPS.rasterize(*leaves, torch.zeros(3), 16, 18, blend.value)
        assert len(saved) == 0 and torch.equal(found, draw(None, leaves, 16, 18, blend))
        torch.library.opcheck(OPS.rasterize.default, (*leaves, torch.zeros(3), 16, 18, blend.value))
        torch.library.opcheck(OPS.image_loss.default, (image, target, 0.15, 0.85, True))
        assert torch.equal(OPS.image_loss(image, target, 0.3, 0.7, True)[0], photometric_by_reference(image, target, 0.3, 0.7))


def test_traced_references_draw_the_same():
    leaves, (_, target) = scene(12, 20, 24, 3.0), pictures(20, 24)
    step = lambda *leaves: loss.L1SSIMLoss()(rasterize(ScreenGaussians(*leaves), 20, 24), target)
    with registered("cpu", Kernels()):
        eager = torch.autograd.grad(step(*leaves), leaves)
        traced = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, traced):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_other_dtypes_never_reach_a_kernel():
    def refuse(*arguments):
        raise AssertionError("a kernel was called")

    leaves = [t.double() for t in scene(3, 8, 8, 2.0)]
    target = torch.rand(8, 8, 3).double()
    with registered("cpu", Kernels(refuse, None, refuse, refuse, refuse)):
        image = rasterize(ScreenGaussians(*leaves), 8, 8)
        value = loss.L1SSIMLoss()(image, target) + loss.l2_loss(image, target) + loss.psnr(image, target)
        assert image.dtype == value.dtype == torch.float64
        torch.autograd.grad(value, leaves)


def test_what_is_available():
    assert operators.available("cpu") == {"rasterize", "saved_size", "rasterize_backward", "image_loss", "squared_error"}
    assert operators.available("cpu", torch.float64) == operators.available(torch.device("meta")) == frozenset()


def test_a_missing_module_warns_once_and_the_reference_serves(monkeypatch):
    monkeypatch.setattr(operators, "KERNELS", {"cpu": "gs2d.no_such_kernels"})
    monkeypatch.setattr(operators, "_registered", {})
    leaves = scene(3, 8, 8, 2.0)
    with pytest.warns(UserWarning, match="no_such_kernels"):
        image = rasterize(ScreenGaussians(*leaves), 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(image, rasterize(ScreenGaussians(*leaves), 8, 8, backend="reference"))
        assert torch.equal(image, rasterize(ScreenGaussians(*leaves), 8, 8))
        loss.psnr(image.detach(), torch.zeros(8, 8, 3))


def test_registering_ends_with_its_block():
    before = kernels_of("cpu")
    with pytest.raises(KeyError), registered("cpu", Kernels()):
        assert kernels_of("cpu") == Kernels()
        raise KeyError
    assert kernels_of("cpu") is before
    with pytest.raises(ValueError, match="expected rasterize beside"):
        Kernels(rasterize_backward=before.rasterize_backward)


# ---- threads, forks, caches of the CPU's


def everything(backend, seed):
    "Bytes of image and gradients in all modes, and of the losses."
    out = []
    for blend in Blend:
        *leaves, background = backend.on(*scene(1500, 200, 240, 8.0, seed), torch.full((3,), 0.5))
        image, grads = image_and_gradients(backend, leaves, 200, 240, blend, background)
        out += [image, *grads]
    image, target = backend.on(*pictures(200, 240, seed=seed))
    with backend.serving():
        out += value_and_gradient(lambda x: operators.photometric(x, target), image)
        out += value_and_gradient(lambda x: operators.squared_error(x, target), image)
    return b"".join(t.cpu().numpy().tobytes() for t in out)


@pytest.fixture
def keep_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_backend
def test_the_number_of_threads_changes_no_bit(backend, keep_thread_count):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(everything(backend, 0))
    assert found[0] == found[1] == found[2]


def test_two_threads_at_once_get_what_they_get_alone(keep_thread_count):
    torch.set_num_threads(2)
    alone, together = {seed: everything(BACKENDS[0], seed) for seed in (1, 2)}, {}

    def work(seed):
        torch.set_num_threads(2)
        for _ in range(3):
            together.setdefault(seed, set()).add(everything(BACKENDS[0], seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert together == {seed: {value} for seed, value in alone.items()}


def test_statistics_of_the_target_never_go_stale_and_do_not_keep_it_alive():
    image, target = pictures(30, 40)
    fresh = lambda: ssim(image, target.clone(), backend="reference")
    ssim(image, target)
    kept = cpu_loss._known_targets[id(target)][2]
    ssim(image, target)
    assert cpu_loss._known_targets[id(target)][2] is kept  # reused
    target.mul_(0.5)
    torch.testing.assert_close(ssim(image, target), fresh(), rtol=0, atol=1e-5)
    target.numpy()[:] = target.numpy()[::-1].copy()  # leaves the tensor's version number alone
    torch.testing.assert_close(ssim(image, target), fresh(), rtol=0, atol=1e-5)
    key = id(target)
    del target, fresh
    gc.collect()
    assert key not in cpu_loss._known_targets


def run_python(code, cwd=None, **environment):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
                          cwd=cwd, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_kernels_work_after_a_fork():
    run_python("""
        import os, torch
        from gs2d.renderer import ScreenGaussians, rasterize
        torch.set_num_threads(2)
        g = torch.Generator().manual_seed(0)
        n = 2000
        screen = ScreenGaussians(torch.rand(n, 2, generator=g) * 256, torch.tensor([[0.02, 0.0, 0.02]]).repeat(n, 1),
                                 torch.rand(n, generator=g), torch.rand(n, 3, generator=g))
        before = rasterize(screen, 256, 256)  # the pool has its threads now
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(rasterize(screen, 256, 256), before) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


@pytest.mark.parametrize("first, settings, held", [
    ("torch", {}, True), ("gs2d", {}, False), ("torch", {"OMP_WAIT_POLICY": "ACTIVE"}, False),
    ("torch", {"GOMP_SPINCOUNT": "10"}, False)])
def test_spinning_is_shortened_where_pytorch_came_first_and_nobody_decided(first, settings, held, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    run_python(f"""
        import {first}
        import os, threading
        from gs2d.kernels.threads import _pool
        names = lambda: [thread.name for thread in threading.enumerate()]
        assert "gs2d-openmp" not in names()  # not before two threads share work for the first time
        _pool.grow(0), _pool.grow(1), _pool.grow(2)
        assert names().count("gs2d-openmp") == {int(held)} and names().count("gs2d-kernels") == 2, names()
        assert ("OMP_WAIT_POLICY" in os.environ) == {first == "gs2d" or "OMP_WAIT_POLICY" in settings}
    """, **settings)


SMALL_RENDER = """
    import torch
    from gs2d.renderer import ScreenGaussians, rasterize
    screen = ScreenGaussians(torch.tensor([[4.0, 4.0]]), torch.tensor([[0.1, 0.0, 0.1]]), torch.ones(1), torch.ones(1, 3))
    assert rasterize(screen, 8, 8).sum() > 10
    from gs2d.kernels import cpu_raster
    print(cpu_raster.__file__, cpu_raster._splat_forward.stats.cache_path)
"""


def test_a_read_only_package_folder_and_one_announcement(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "site" / "gs2d", ignore=shutil.ignore_patterns("__pycache__"))
    # a plain file in the place of the cache folder is a folder that nobody can write to, not even root
    (tmp_path / "site" / "gs2d" / "kernels" / "__pycache__").write_text("")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    first, second = (run_python(SMALL_RENDER, tmp_path, **environment) for _ in range(2))
    assert first.stdout.startswith(str(tmp_path / "site")) and str(tmp_path / "cache") in first.stdout
    assert first.stderr.count("gs2d: compiling the CPU kernels once") == 1 and "gs2d:" not in second.stderr


def test_an_edit_of_what_is_built_into_a_kernel_compiles_it_anew(tmp_path):
    "numba compares the file of the kernel only; `total` stands in another one, and is part of the machine code."
    shutil.copytree(PACKAGE, tmp_path / "site" / "gs2d", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    code = "import torch; from gs2d import loss; print(loss.l2_loss(torch.ones(1, 32, 1), torch.zeros(1, 32, 1)).item())"
    first, again = (run_python(code, tmp_path, **environment) for _ in range(2))
    assert first.stdout == again.stdout == "1.0\n" and "gs2d: compiling" in first.stderr and again.stderr == ""
    edited = tmp_path / "site" / "gs2d" / "kernels" / "vectors.py"
    text = edited.read_text(encoding="utf-8")
    assert text.count("builder.fadd(v, ") == 1
    edited.write_text(text.replace("builder.fadd(v, ", "builder.fsub(v, "), encoding="utf-8")
    assert run_python(code, tmp_path, **environment).stdout == "0.0\n"


DAMAGE = """
    import os, sys
    from pathlib import Path
    import numpy as np
    import small
    from gs2d.kernels.threads import compiled

    def result():
        "As a new process would compute it, and whether the machine code came from the disk."
        work = compiled(small.work)
        value = work(np.arange(5.0))
        return value, sum(work.stats.cache_hits.values())

    def damages(good):
        yield b""
        for length in (1, 31, 32, 33, 100, len(good) // 2, len(good) - 1):
            yield good[:length]
        for place in range(0, len(good), max(1, len(good) // 25)):
            yield good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :]
        yield bytes(len(good))
        yield b"gs2d" * 100

    assert result() == (30.0, 0) and result() == (30.0, 1)
    files, tried = [path for path in Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*") if path.is_file()], 0
    assert files
    for path in files:
        good = path.read_bytes()
        for damaged in damages(good):
            path.write_bytes(damaged)
            assert result() == (30.0, 0), damaged[:40]  # compiled anew
            assert result() == (30.0, 1)  # and kept
            tried += 1
    print(tried)
"""


def test_damaged_machine_code_is_compiled_anew(tmp_path):
    (tmp_path / "small.py").write_text("def work(x):\n    return (x * x).sum()\n", encoding="utf-8")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{tmp_path}"}
    assert int(run_python(DAMAGE, tmp_path, **environment).stdout) > 30


ONE_KERNEL = """
    {before}
    import torch
    from gs2d import loss
    from gs2d.kernels import cpu_loss
    {between}
    print(loss.l2_loss(torch.ones(1, 32, 1), torch.zeros(1, 32, 1)).item())
"""
IN_THE_WAY = """import os, shutil
    folder = os.environ["NUMBA_CACHE_DIR"]
    shutil.rmtree(folder)
    {then}"""


@pytest.mark.parametrize("before, between, told", [
    ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))", "", 1),  # as on a full disk: the write fails
    ("", IN_THE_WAY.format(then=""), 0),  # the folder is gone: it is made again
    ("", IN_THE_WAY.format(then='open(folder, "w").close()'), 1),  # nobody can make it, not even root
], ids=["full", "deleted", "in the way"])
def test_a_cache_that_cannot_be_written_costs_time_and_one_line(tmp_path, before, between, told):
    pytest.importorskip("resource")
    done = run_python(ONE_KERNEL.format(before=before, between=between), tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout == "1.0\n"
    assert done.stderr.count("gs2d: cannot keep the compiled kernels in") == told
    assert done.stderr.count("\n") == 1 + told  # that it compiles, and why it will again
    assert not [path for path in tmp_path.rglob("*.sealed*") if path.stat().st_size <= 1000]


def test_processes_that_compile_at_once_leave_whole_files(tmp_path):
    code = textwrap.dedent(ONE_KERNEL.format(before="", between=""))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    together = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in together] == [b"1.0\n"] * 3
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files and all(name.endswith(".sealed") for name in files)
    assert run_python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")).stderr == ""  # nothing is compiled


def test_without_a_compiler_the_reference_serves_with_one_warning():
    done = run_python("""
        import warnings
        import numpy as np
        import gs2d
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = gs2d.fit_image(np.zeros((12, 16, 3), np.uint8), n_gaussians=5, steps=3, progress=False)
        assert result.image.shape == (12, 16, 3)
        assert [str(w.message) for w in caught if "NUMBA_DISABLE_JIT" in str(w.message)] == [str(w.message) for w in caught] and len(caught) == 1
    """, NUMBA_DISABLE_JIT="1")
    assert done.stderr == ""


def test_the_default_dtype_changes_no_number(tmp_path):
    "Scenes are float32 whatever PyTorch's default is, and random numbers are drawn as float32."
    run_python("""
        import numpy as np, torch, gs2d
        from gs2d.densify import DensifyConfig
        from gs2d.init_levels import InitLevel, initialize_scene
        from gs2d.train import TrainConfig, train

        picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)

        def numbers(scene):
            assert all(p.dtype == torch.float32 for p in scene.parameters())
            return [p.detach().numpy().tobytes() for p in scene.parameters()] + [scene._repr_png_()]

        def everything():
            for blend in gs2d.Blend:
                truth = gs2d.GroundTruth.random(6, 20, 24, seed=1, blend=blend)
                yield numbers(truth.scene), truth.image.numpy().tobytes()
                for level in InitLevel:
                    yield numbers(initialize_scene(truth, level, 6, seed=2))
                image = truth.image.flip(0).requires_grad_()
                value = gs2d.ssim(image, truth.image)
                yield value.item(), torch.autograd.grad(value, image)[0].numpy().tobytes(), gs2d.psnr(image, truth.image).item()
                truth.scene.save("scene.json")
                yield numbers(gs2d.load("scene.json"))
                fit = gs2d.fit_image(picture, n_gaussians=12, steps=12, seed=1, blend=blend, progress=False)
                yield numbers(fit.scene), fit.psnr, fit.ssim, fit.image.numpy().tobytes()
            numbers(train(TrainConfig(n_gaussians=9, height=20, width=24, n_iterations=20, densify=DensifyConfig(every_n_steps=5)), progress=False).scene)

        before = list(everything())
        torch.set_default_dtype(torch.float64)
        after = list(everything())
        assert before == after, [k for k, (a, b) in enumerate(zip(before, after)) if a != b]
    """, tmp_path)


def test_without_numba_the_reference_serves_with_one_warning():
    done = run_python("""
        import sys, warnings
        sys.modules["numba"] = None  # as if it were not installed
        import torch
        from gs2d.renderer import ScreenGaussians, rasterize
        screen = ScreenGaussians(torch.tensor([[4.0, 4.0]]), torch.tensor([[0.1, 0.0, 0.1]]), torch.ones(1), torch.ones(1, 3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = [rasterize(screen, 8, 8), rasterize(screen, 8, 8)]
        assert torch.equal(images[0], rasterize(screen, 8, 8, backend="reference"))
        assert len([w for w in caught if "numba" in str(w.message)]) == 1, caught
    """)
    assert done.returncode == 0


def test_importing_the_renderer_does_not_import_numba():
    run_python("import sys, gs2d.renderer, gs2d.loss; assert 'numba' not in sys.modules")
