"The compiled kernels against the readable reference, and everything that surrounds them: threads, forks, caches, operators."
import gc
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gs2d import cpu_kernels, loss
from gs2d.renderer import Blend, ScreenGaussians, kernels_for, rasterize

PACKAGE = Path(cpu_kernels.__file__).parent
OPS = torch.ops.gs2d
MODES = {Blend.ADDITIVE: 0, Blend.WEIGHTED: 1, Blend.OVER: 2}


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


def image_and_gradients(leaves, height, width, blend, background, backend):
    image = rasterize(ScreenGaussians(*leaves), height, width, blend, background, backend)
    weights = torch.linspace(-1, 1, image.numel()).reshape(image.shape).cos()
    return image.detach(), torch.autograd.grad((image * weights).sum(), leaves, allow_unused=True)


def assert_kernels_equal_reference(leaves, height, width, blend, background):
    "Image to 1e-5 of its largest value (at least 1): float32 sums in another order. Gradients to 1e-4 of the largest entry."
    ours, d_ours = image_and_gradients(leaves, height, width, blend, background, "auto")
    theirs, d_theirs = image_and_gradients(leaves, height, width, blend, background, "reference")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    for name, a, b in zip(ScreenGaussians._fields, d_ours, d_theirs):
        limit = 1e-4 * b.abs().max().item() if b.numel() else 0.0
        assert a.shape == b.shape and (a.numel() == 0 or (a - b).abs().max() <= max(limit, 1e-12)), name


sizes = st.sampled_from([(1, 1), (1, 29), (33, 1), (7, 5), (31, 33), (32, 16), (45, 67), (64, 64)])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40), size=sizes, sigma=st.sampled_from([0.05, 0.4, 1.5, 6.0, 40.0, 500.0]), seed=st.integers(0, 10**6),
    blend=st.sampled_from(list(Blend)), channels=st.sampled_from([3, 3, 1, 2, 4]), stretch=st.sampled_from([0.0, 0.4, 1.0]),
    overhang=st.sampled_from([0.0, 0.5, 3.0]), transparent=st.booleans(),
)
def test_kernels_equal_the_reference(n, size, sigma, seed, blend, channels, stretch, overhang, transparent):
    leaves = scene(n, *size, sigma, seed, channels, stretch, overhang)
    if transparent and n:
        leaves[2] = torch.cat([torch.zeros(n // 2), leaves[2][n // 2 :].detach()]).requires_grad_()
    assert_kernels_equal_reference(leaves, *size, blend, torch.linspace(0.2, 0.8, channels))


@pytest.mark.parametrize("blend", list(Blend))
def test_several_bands_and_both_ends_of_a_row(blend):
    leaves = scene(150, 150, 133, 6.0, seed=3)
    assert_kernels_equal_reference(leaves, 150, 133, blend, torch.tensor([0.1, 0.5, 0.9]))


@pytest.mark.parametrize("blend", list(Blend))
def test_long_thin_diagonals_at_the_limit_of_float32(blend):
    # scale 300 by 0.02 pixels: the correlation of the conic is within 1e-8 of one, so no interval can be trusted
    n, g = 20, torch.Generator().manual_seed(5)
    turn = torch.linspace(0.1, 3.0, n)
    p, q = torch.full((n,), 1 / 300.0**2), torch.full((n,), 1 / 0.3**2)
    c, s = turn.cos(), turn.sin()
    conics = torch.stack([c * c * p + s * s * q, c * s * (p - q), s * s * p + c * c * q], -1)
    leaves = [t.requires_grad_() for t in (torch.rand(n, 2, generator=g) * 60, conics, torch.rand(n, generator=g), torch.rand(n, 3, generator=g))]
    assert_kernels_equal_reference(leaves, 60, 60, blend, torch.zeros(3))


@pytest.mark.parametrize("blend", list(Blend))
def test_a_gaussian_that_is_not_finite_draws_nothing(blend):
    good = scene(8, 20, 24, 3.0, requires_grad=False)
    bad = [t.clone() for t in scene(8, 20, 24, 3.0, requires_grad=False)]
    bad[0][0, 0], bad[1][1, 1], bad[1][2, 0], bad[0][3, 1], bad[1][4] = math.nan, math.nan, math.inf, -math.inf, torch.zeros(3) * math.nan
    for tensor in good:
        tensor[:5] = 0
    good[0][:5], good[1][:5] = -1e6, torch.tensor([1.0, 0.0, 1.0])
    background = torch.tensor([0.3, 0.2, 0.1])
    expected = rasterize(ScreenGaussians(*good), 20, 24, blend, background)
    assert torch.equal(rasterize(ScreenGaussians(*bad), 20, 24, blend, background), expected)


@pytest.mark.parametrize("far", [1e5, 1e9, 1e30])
def test_means_far_outside_are_safe(far):
    leaves = scene(6, 16, 16, 3.0, requires_grad=False)
    leaves[0][:3] = torch.tensor([[far, 8.0], [-far, far], [8.0, -far]])
    ours = rasterize(ScreenGaussians(*leaves), 16, 16, "additive")
    torch.testing.assert_close(ours, rasterize(ScreenGaussians(*leaves), 16, 16, "additive", backend="reference"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("conic", [(0.0, 0.0, 0.0), (0.01, 0.0, 0.0), (1e12, 0.0, 1e12), (0.01, 0.02, 0.01), (1e-12, 0.0, 1e-12)])
def test_degenerate_conics_are_safe(conic):
    leaves = scene(1, 40, 50, 3.0, requires_grad=False)
    leaves[1][:] = torch.tensor(conic)
    leaves[0][:] = torch.tensor([20.5, 10.5])
    ours = rasterize(ScreenGaussians(*leaves), 40, 50, "additive")
    theirs = rasterize(ScreenGaussians(*leaves), 40, 50, "additive", backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_cutoff_falls_on_the_same_pixels_as_in_the_reference():
    # constant opacity and colour: a pixel decided differently would differ by 1/255, hundreds of times the tolerance
    leaves = scene(3000, 120, 160, 0.5, seed=9, requires_grad=False)
    leaves[2][:], leaves[3][:] = 1.0, 1.0
    ours = rasterize(ScreenGaussians(*leaves), 120, 160, "additive")
    theirs = rasterize(ScreenGaussians(*leaves), 120, 160, "additive", backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours != 0, theirs != 0)


def test_over_keeps_its_gradient_behind_and_in_front_of_many_opaque_sheets():
    n = 40  # 0.01 ** 40 is zero in float32
    means, conics = torch.full((n, 2), 2.5), torch.tensor([[1e-4, 0.0, 1e-4]]).repeat(n, 1)
    leaves = [t.requires_grad_() for t in (means, conics, torch.full((n,), 0.98), torch.rand(n, 3, generator=torch.Generator().manual_seed(1)))]
    image, grads = image_and_gradients(leaves, 5, 5, "over", torch.zeros(3), "auto")
    expected = image_and_gradients([t.detach().double().requires_grad_() for t in leaves], 5, 5, "over", torch.zeros(3), "reference")
    torch.testing.assert_close(image.double(), expected[0], rtol=0, atol=1e-5)
    for a, b in zip(grads, expected[1]):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("blend", list(Blend))
def test_the_background_has_a_gradient(blend):
    leaves, found = scene(30, 20, 30, 3.0), []
    for backend in ("auto", "reference"):
        background = torch.tensor([0.2, 0.4, 0.6], requires_grad=True)
        image = rasterize(ScreenGaussians(*leaves), 20, 30, blend, background, backend)
        found.append(torch.autograd.grad((image * torch.linspace(0, 1, 3)).sum(), background)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_inputs_need_not_be_contiguous():
    means, conics, opacities, colors = scene(30, 20, 30, 3.0, requires_grad=False)
    strided = ScreenGaussians(means.T.contiguous().T, conics.T.contiguous().T, opacities.repeat_interleave(2)[::2], colors.T.contiguous().T)
    assert torch.equal(rasterize(strided, 20, 30), rasterize(ScreenGaussians(means, conics, opacities, colors), 20, 30))


def test_other_dtypes_are_refused_and_the_renderer_never_sends_them():
    screen = ScreenGaussians(*(t.double() for t in scene(3, 8, 8, 2.0, requires_grad=False)))
    with pytest.raises(TypeError, match="expected float32 on the CPU"):
        cpu_kernels.rasterize(screen, 8, 8, Blend.WEIGHTED, torch.zeros(3))
    assert kernels_for("cpu", torch.float64) is None and kernels_for("cpu", torch.float32) is cpu_kernels


# ---- SSIM


def pictures(height, width, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, channels, generator=g)
    return (target + 0.2 * torch.randn(target.shape, generator=g)).requires_grad_(), target


def value_and_gradient(function, image):
    value = function(image)
    return value.detach(), torch.autograd.grad(value, image)[0]


@pytest.mark.parametrize("size", [(11, 11), (12, 75), (64, 64), (65, 33), (97, 130), (140, 20)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ssim_equals_pytorch_msssim(size, channels):
    from pytorch_msssim import ssim as independent

    image, target = pictures(*size, channels)
    batch = lambda x: x.permute(2, 0, 1)[None]
    ours, d_ours = value_and_gradient(lambda x: loss.ssim(x, target), image)
    theirs, d_theirs = value_and_gradient(lambda x: independent(batch(x), batch(target), data_range=1, win_size=11), image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (d_ours - d_theirs).abs().max() <= 1e-4 * d_theirs.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (10, 10), (9, 64), (80, 5), (66, 70)])
def test_ssim_equals_the_reference_also_below_eleven_pixels(size):
    image, target = pictures(*size)
    ours, d_ours = value_and_gradient(lambda x: loss.ssim(x, target), image)
    theirs, d_theirs = value_and_gradient(lambda x: loss.ssim(x, target, backend="reference"), image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (d_ours - d_theirs).abs().max() <= 1e-4 * d_theirs.abs().max() + 1e-9


def test_ssim_is_differentiable_in_the_target_too():
    image, target = pictures(30, 40)
    image, target = image.detach().requires_grad_(), target.requires_grad_()
    ours = torch.autograd.grad(cpu_kernels.ssim(image, target), (image, target))
    theirs = torch.autograd.grad(loss.ssim(image, target, backend="reference"), (image, target))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_photometric_is_l1_and_ssim(channels):
    image, target = pictures(40, 50, channels)
    value = cpu_kernels.photometric(image, target, 0.3, 0.7)
    expected = 0.3 * (image - target).abs().mean() + 0.7 * (1 - loss.ssim(image, target, backend="reference"))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(value, image), torch.autograd.grad(expected, image)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 4), (90, 70, 3), (300, 260, 3)])
def test_the_squared_error_equals_plain_tensors(size):
    g = torch.Generator().manual_seed(0)
    image, target = 1.5 * torch.rand(size, generator=g) - 0.25, torch.rand(size, generator=g)
    ours, grad = value_and_gradient(lambda x: 3 * loss.l2_loss(x, target), image.clone().requires_grad_())
    theirs = (image.double() - target.double()).square().mean()
    torch.testing.assert_close(ours.double(), 3 * theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, 6 * (image - target) / image.numel(), rtol=1e-6, atol=0)
    clamped = (image.clamp(0, 1).double() - target.double()).square().mean()
    torch.testing.assert_close(loss.psnr(image, target).double(), -10 * clamped.log10(), rtol=1e-6, atol=0)
    image[-1, -1, -1] = math.nan
    assert loss.l2_loss(image, target).isnan() and loss.psnr(image, target).isnan()


@pytest.mark.parametrize("place", [0, 16, 40])  # among whole vectors, and among the numbers that are left over
def test_psnr_of_a_nan_anywhere_is_one(place):
    image = torch.zeros(1, 41, 1)
    image[0, place] = math.nan
    assert loss.psnr(image, torch.zeros(1, 41, 1)).isnan() and loss.psnr(torch.zeros(1, 41, 1), image).isnan()


def test_psnr_and_the_squared_error_keep_their_other_gradients():
    image, target = (torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(2))
    for score in (loss.l2_loss, loss.psnr):
        grads = torch.autograd.grad(score(image, target), (image, target))
        torch.testing.assert_close(grads[0], -grads[1])
        assert grads[0].abs().max() > 0


def test_statistics_of_the_target_never_go_stale_and_do_not_keep_it_alive():
    image, target = pictures(30, 40)
    fresh = lambda: loss.ssim(image, target.clone(), backend="reference")
    loss.ssim(image, target)
    kept = cpu_kernels._known_targets[id(target)][2]
    loss.ssim(image, target)
    assert cpu_kernels._known_targets[id(target)][2] is kept  # reused
    target.mul_(0.5)
    torch.testing.assert_close(loss.ssim(image, target), fresh(), rtol=0, atol=1e-5)
    target.numpy()[:] = target.numpy()[::-1].copy()  # leaves the tensor's version number alone
    torch.testing.assert_close(loss.ssim(image, target), fresh(), rtol=0, atol=1e-5)
    key = id(target)
    del target, fresh
    gc.collect()
    assert key not in cpu_kernels._known_targets


# ---- operators


@pytest.mark.parametrize("mode", MODES.values())
def test_opcheck(mode):
    leaves = scene(12, 16, 18, 3.0)
    background = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    torch.library.opcheck(OPS.rasterize.default, (*leaves, background, 16, 18, mode))
    saved = [t.detach() for t in OPS.rasterize(*leaves, background, 16, 18, mode)]
    grad = torch.ones(16, 18, 3)
    torch.library.opcheck(OPS.rasterize_backward.default, (grad, *saved, background.detach(), mode))


def test_opcheck_of_the_loss():
    image, target = pictures(16, 18)
    torch.library.opcheck(OPS.image_loss.default, (image, target, 0.15, 0.85, 3, True))
    torch.library.opcheck(OPS.image_loss.default, (image.detach(), target, 0.15, 0.85, 3, False))
    torch.library.opcheck(OPS.squared_error.default, (image, target, False, True))
    torch.library.opcheck(OPS.squared_error.default, (image.detach(), target, True, False))


def test_torch_compile_traces_through_without_a_break():
    leaves, (_, target) = scene(12, 20, 24, 3.0), pictures(20, 24)

    def step(*leaves):
        image = cpu_kernels.rasterize(ScreenGaussians(*leaves), 20, 24, Blend.WEIGHTED, torch.zeros(3))
        return cpu_kernels.photometric(image, target) - cpu_kernels.ssim(image, target)

    eager = torch.autograd.grad(step(*leaves), leaves)
    traced = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, traced):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- threads, forks, caches


def everything(seed):
    "Bytes of image and gradients in all modes, and of the loss."
    out = []
    for blend in Blend:
        image, grads = image_and_gradients(scene(1500, 200, 240, 8.0, seed), 200, 240, blend, torch.full((3,), 0.5), "auto")
        out += [image, *grads]
    image, target = pictures(200, 240, seed=seed)
    value, grad = value_and_gradient(lambda x: cpu_kernels.photometric(x, target), image)
    squared = value_and_gradient(lambda x: cpu_kernels.squared_error(x, target), image)
    return b"".join(t.numpy().tobytes() for t in (*out, value, grad, *squared))


@pytest.fixture
def keep_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(keep_thread_count):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(everything(0))
    assert found[0] == found[1] == found[2]


def test_two_threads_at_once_get_what_they_get_alone(keep_thread_count):
    torch.set_num_threads(2)
    alone, together = {seed: everything(seed) for seed in (1, 2)}, {}

    def work(seed):
        torch.set_num_threads(2)
        for _ in range(3):
            together.setdefault(seed, set()).add(everything(seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert together == {seed: {value} for seed, value in alone.items()}


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
        from gs2d.cpu_kernels import _pool
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
    import gs2d.cpu_kernels
    print(gs2d.cpu_kernels.__file__, gs2d.cpu_kernels._splat_forward.stats.cache_path)
"""


def test_a_read_only_package_folder_and_one_announcement(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "site" / "gs2d", ignore=shutil.ignore_patterns("__pycache__"))
    # a plain file in the place of the cache folder is a folder that nobody can write to, not even root
    (tmp_path / "site" / "gs2d" / "__pycache__").write_text("")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    first, second = (run_python(SMALL_RENDER, tmp_path, **environment) for _ in range(2))
    assert first.stdout.startswith(str(tmp_path / "site")) and str(tmp_path / "cache") in first.stdout
    assert first.stderr.count("gs2d: compiling the CPU kernels once") == 1 and "gs2d:" not in second.stderr


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
