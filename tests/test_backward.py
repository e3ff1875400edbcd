"""gs2d.backward against autograd, finite differences and loops; in float64, where a wrong digit shows."""
import math

import pytest
import torch
from torch.testing import assert_close

import gs2d.backward as backward
from gs2d.backward import (
    blend_additive_backward, blend_over_backward, blend_weighted_backward, conics_backward,
    conics_backward_through_covariance, gaussian_weights_backward, l1_backward, l2_backward, loss_backward,
    project_backward, rasterize_backward, render_backward, ssim_backward,
)
from gs2d.gaussians import CUTOFF_POWER, CUTOFF_STD, PARAMETER_NAMES, Domain2D, Gaussians2D, conics, gaussian_weights
from gs2d.loss import L1SSIMLoss, l1_loss, l2_loss, ssim
from gs2d.renderer import MAX_ALPHA, WEIGHT_EPS, Blend, ScreenGaussians, pixel_centers, project, rasterize, render

BLENDS = list(Blend)
BACKGROUND = (0.2, 0.5, 0.9)
BLEND_BACKWARDS = {
    Blend.WEIGHTED: blend_weighted_backward, Blend.ADDITIVE: blend_additive_backward, Blend.OVER: blend_over_backward,
}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads)]


def by_differences(function, inputs, h=1e-6):
    slopes = [torch.zeros_like(x) for x in inputs]
    for k, x in enumerate(inputs):
        for j in range(x.numel()):
            nudge = torch.zeros_like(x)
            nudge.view(-1)[j] = h
            up, down = (function(*inputs[:k], x + step, *inputs[k + 1:]) for step in (nudge, -nudge))
            slopes[k].view(-1)[j] = (up - down) / (2 * h)
    return slopes


def assert_gradients(function, inputs, by_hand, differences=True):
    "Sixteen digits less what a long sum costs from autograd; half of them from central differences."
    inputs = [x.detach() for x in inputs]
    assert len(by_hand) == len(inputs)
    for hand, x, exact in zip(by_hand, inputs, by_autograd(function, inputs)):
        assert hand.shape == x.shape and hand.dtype == x.dtype and not hand.requires_grad
        assert_close(hand, exact, rtol=1e-9, atol=1e-11 * max(1.0, exact.abs().max().item() if exact.numel() else 0.0))
    if differences:
        for hand, nudged in zip(by_hand, by_differences(function, inputs)):
            size = max(1e-3, hand.abs().max().item()) if hand.numel() else 1.0
            assert_close(hand, nudged, rtol=0, atol=1e-6 * size)


def distance_to_cut(screen, height, width):
    dx, dy = (pixel_centers(height, width, torch.float64).reshape(-1, 1, 2) - screen.means.detach()).unbind(-1)
    a, b, c = screen.conics.detach().unbind(-1)
    return (a * dx**2 + 2 * b * dx * dy + c * dy**2 - CUTOFF_POWER).abs().min().item()


def make_scene(n=5, seed=0, domain=Domain2D.for_image(9, 12), dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=draw)
    means = (rand(n, 2) - 0.5) * torch.tensor([domain.width, domain.height])
    scene = Gaussians2D.from_values(means, 0.4 + 1.2 * rand(n, 2), 6 * rand(n), 0.2 + 0.7 * rand(n), rand(n, 3), domain)
    return scene.to(dtype)


def screen_function(height, width, blend, wish):
    return lambda *screen: (rasterize(ScreenGaussians(*screen), height, width, blend, BACKGROUND, backend="reference") * wish).sum()


def scene_function(domain, height, width, blend, wish):
    "The wish-weighted sum of the picture as a function of the five parameters."
    def total(*parameters):
        scene = Gaussians2D(*parameters, domain)
        for name, tensor in zip(PARAMETER_NAMES, parameters):  # keep the graph: plain tensors in place of the parameters
            delattr(scene, name)
            setattr(scene, name, tensor)
        return (render(scene, height, width, blend, BACKGROUND, backend="reference") * wish).sum()
    return total


# ---- one Gaussian and its weight


def test_one_pixel_by_pencil():
    means, shape = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.5, 0.125, 0.25]], dtype=torch.float64)
    point, one = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    grad_means, grad_conics = gaussian_weights_backward(means, shape, point, one)
    w = math.exp(-1)  # q = ½ + ½ + 1
    assert_close(grad_means[0].tolist(), [0.75 * w, 0.625 * w])
    assert_close(grad_conics[0].tolist(), [-0.5 * w, -2 * w, -2 * w])


def test_weights():
    means = torch.tensor([[3.0, 4.0], [6.5, 3.0], [9.0, 7.0], [-40.0, 3.0]], dtype=torch.float64)
    shapes = conics(torch.tensor([[2.0, 1.0], [1.5, 1.5], [3.0, 0.8], [2.0, 2.0]]).double(), torch.tensor([0.5, 0.0, -0.8, 1.0]).double())
    points, wish = pixel_centers(8, 10, torch.float64).reshape(-1, 2), numbers(80, 4)
    assert distance_to_cut(ScreenGaussians(means, shapes, None, None), 8, 10) > 1e-3
    total = lambda means, shapes: (gaussian_weights(means, shapes, points) * wish).sum()
    grads = gaussian_weights_backward(means, shapes, points, wish)
    assert_gradients(total, (means, shapes), grads)
    assert all((grad[3] == 0).all() for grad in grads)  # wholly elsewhere


def test_weights_that_end_at_zero():
    means, floor = torch.tensor([[3.0, 4.0], [6.5, 3.0]], dtype=torch.float64), Blend.WEIGHTED.floor
    shapes = conics(torch.tensor([[1.2, 0.8], [0.9, 1.1]]).double(), torch.tensor([0.5, 0.0]).double())
    points, wish = pixel_centers(8, 10, torch.float64).reshape(-1, 2), numbers(80, 2)
    total = lambda means, shapes: (gaussian_weights(means, shapes, points, floor) * wish).sum()
    assert_gradients(total, (means, shapes), gaussian_weights_backward(means, shapes, points, wish, floor))


def test_nothing_flows_beyond_the_cutoff():
    origin, shape, one = torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0, 1.0]]).double(), torch.ones(1, 1).double()
    for distance, expected in [(CUTOFF_STD - 1e-4, (CUTOFF_STD - 1e-4) * math.exp(-(CUTOFF_STD - 1e-4) ** 2 / 2)), (CUTOFF_STD + 1e-4, 0.0)]:
        grad, _ = gaussian_weights_backward(origin, shape, torch.tensor([[distance, 0.0]]).double(), one)
        assert_close(grad[0, 0].item(), expected)


def test_weights_of_extreme_shapes_stay_finite():
    "Thinner than a pixel, larger than the image, on a pixel's centre."
    means = torch.tensor([[2.3, 2.5], [2.0, 2.0], [2.5, 2.5]], dtype=torch.float64)
    shapes = conics(torch.tensor([[0.02, 5.0], [500.0, 900.0], [0.3, 0.3]]).double(), torch.tensor([0.1, 1.0, 0.0]).double())
    points, wish = pixel_centers(5, 5, torch.float64).reshape(-1, 2), numbers(25, 3)
    assert_gradients(lambda m, s: (gaussian_weights(m, s, points) * wish).sum(), (means, shapes), gaussian_weights_backward(means, shapes, points, wish), differences=False)


# ---- blends


def blend_function(blend, background, g):
    def total(strengths, colors):
        if blend is Blend.ADDITIVE:
            image = background + strengths @ colors
        elif blend is Blend.WEIGHTED:
            image = (strengths @ colors + WEIGHT_EPS * background) / (strengths.sum(-1, keepdim=True) + WEIGHT_EPS)
        else:
            image, left = torch.zeros_like(g), torch.ones_like(g[:, :1])
            for i in range(strengths.shape[1]):
                alpha = strengths[:, i:i + 1].clamp(max=MAX_ALPHA)
                image, left = image + left * alpha * colors[i], left * (1 - alpha)
            image = image + left * background
        return (image * g).sum()
    return total


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("pixels, n, channels", [(7, 4, 3), (1, 1, 1), (3, 9, 2)])
def test_blends(blend, pixels, n, channels):
    strengths, colors = numbers(pixels, n).abs().clamp(0, 0.98), numbers(n, channels, seed=1)
    strengths[0, 0] = 1.2  # beyond the cap of over
    background, g = numbers(channels, seed=2), numbers(pixels, channels, seed=3)
    assert_gradients(blend_function(blend, background, g), (strengths, colors), BLEND_BACKWARDS[blend](strengths, colors, background, g))


@pytest.mark.parametrize("blend", BLENDS)
def test_blends_of_nothing(blend):
    grad_s, grad_c = BLEND_BACKWARDS[blend](torch.zeros(4, 0), torch.zeros(0, 3), torch.ones(3), torch.ones(4, 3))
    assert grad_s.shape == (4, 0) and grad_c.shape == (0, 3)


def test_weighted_pulls_towards_the_better_colour():
    "White on a mud that should be brighter: more white, less black; and only differences of colours count."
    strengths, colors, black, g = torch.full((1, 2), 0.5), torch.tensor([[1.0], [0.0]]), torch.zeros(1), torch.tensor([[-1.0]])
    grad_s, _ = blend_weighted_backward(strengths, colors, black, g)
    assert grad_s[0, 0] < 0 < grad_s[0, 1]
    shifted, _ = blend_weighted_backward(strengths, colors + 3, black + 3, g)
    assert_close(shifted, grad_s, rtol=1e-5, atol=1e-6)


def test_over_by_pencil():
    half, colors = torch.full((1, 3), 0.5), torch.tensor([[1.0], [0.0], [1.0]])
    grad_s, grad_c = blend_over_backward(half, colors, torch.zeros(1), torch.ones(1, 1))
    assert grad_s[0].tolist() == [0.75, -0.25, 0.25]
    assert grad_c[:, 0].tolist() == [0.5, 0.25, 0.125]


def test_over_at_and_beyond_the_cap():
    strengths = torch.tensor([[MAX_ALPHA, 1.0, 0.5]], dtype=torch.float64)
    colors, background, g = numbers(3, 3), numbers(3, seed=1), numbers(1, 3, seed=2)
    grads = blend_over_backward(strengths, colors, background, g)
    assert grads[0][0, 1] == 0 and grads[0][0, 0] != 0  # as torch.clamp has it
    assert_gradients(blend_function(Blend.OVER, background, g), (strengths, colors), grads, differences=False)


def test_over_behind_many_opaque_layers():
    "Where the transmittance underflows in float32, the layers in front must keep their gradients."
    strengths, ramp = torch.full((2, 60), 0.995), torch.linspace(1, 0, 60)[:, None]
    strengths[:, ::2] = 0.98
    grad_s, grad_c = blend_over_backward(strengths, ramp, torch.zeros(1), torch.ones(2, 1))
    exact_s, exact_c = blend_over_backward(strengths.double(), ramp.double(), torch.zeros(1).double(), torch.ones(2, 1).double())
    assert (grad_s[:, 0] > 0.01).all() and (grad_s[:, 1::2] == 0).all()
    assert_close((grad_s, grad_c), (exact_s.float(), exact_c.float()), rtol=1e-4, atol=1e-7)


# ---- the rasteriser


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("height, width", [(8, 10), (1, 1), (1, 7), (5, 1)])
def test_rasterize(blend, height, width):
    means = torch.tensor([[3.0, 4.0], [0.8, 0.6], [9.0, 7.0], [-40.0, 3.0], [-1.0, 0.4]], dtype=torch.float64)
    shapes = conics(torch.tensor([[2.0, 1.0], [1.5, 1.5], [3.0, 0.8], [2.0, 2.0], [9.0, 4.0]]).double(), numbers(5))
    screen = ScreenGaussians(means, shapes, torch.tensor([0.9, 0.5, 0.7, 0.8, 0.0]).double(), numbers(5, 3, seed=1))
    wish = numbers(height, width, 3, seed=2)
    assert distance_to_cut(screen, height, width) > 1e-3
    grads = rasterize_backward(screen, height, width, blend, BACKGROUND, wish)
    assert isinstance(grads, ScreenGaussians)
    assert_gradients(screen_function(height, width, blend, wish), screen, grads)
    assert all((grad[3] == 0).all() for grad in grads)  # off the image: no pixel asks it for anything


@pytest.mark.parametrize("blend", BLENDS)
def test_rasterize_in_pieces(blend, monkeypatch):
    scene, wish = make_scene(7), numbers(11, 13, 3)
    screen = project(scene, 11, 13)
    whole = rasterize_backward(screen, 11, 13, blend.value, torch.tensor(BACKGROUND, dtype=torch.float64), wish)
    for pairs in (1, 100):
        monkeypatch.setattr(backward, "_PAIRS_PER_PIECE", pairs)
        assert_close(tuple(rasterize_backward(screen, 11, 13, blend, BACKGROUND, wish)), tuple(whole), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blend", BLENDS)
def test_no_gaussians(blend):
    grads = render_backward(make_scene(0), 4, 5, blend, BACKGROUND, numbers(4, 5, 3))
    assert {name: tuple(grad.shape) for name, grad in grads.items()} == {
        "means": (0, 2), "log_scales": (0, 2), "rotations": (0,), "opacity_logits": (0,), "colors": (0, 3)}


# ---- shapes, and home to the parameters


@pytest.mark.parametrize("route", [conics_backward, conics_backward_through_covariance])
def test_conics(route):
    scales = torch.tensor([[2.0, 1.0], [1.5, 1.5], [3.0, 0.8], [0.2, 0.5]], dtype=torch.float64)
    rotations, wish = torch.tensor([0.5, 0.3, -0.8, 4.0]).double(), numbers(4, 3)
    grads = route(scales, rotations, wish)
    assert_gradients(lambda scales, rotations: (conics(scales, rotations) * wish).sum(), (scales, rotations), grads)
    assert abs(grads[1][1]) < 1e-12  # a round Gaussian looks the same however it is turned


def test_conics_of_a_needle():
    "4000 times as long as wide: the direct route keeps its digits; the products of matrices lose some of the small entry's."
    scales, rotations, wish = torch.tensor([[1e-2, 40.0]]).double(), torch.tensor([1.0]).double(), numbers(1, 3)
    exact = by_autograd(lambda scales, rotations: (conics(scales, rotations) * wish).sum(), (scales, rotations))
    assert_close(conics_backward(scales, rotations, wish), tuple(exact), rtol=1e-11, atol=0)
    for grad, judge in zip(conics_backward_through_covariance(scales, rotations, wish), exact):
        assert_close(grad, judge, rtol=0, atol=1e-9 * judge.abs().max().item())


def test_growing_both_scales_shrinks_the_conic_twice_as_fast():
    scales, rotations, wish = numbers(6, 2).exp(), numbers(6, seed=1), numbers(6, 3, seed=2)
    grad_scales, _ = conics_backward(scales, rotations, wish)
    assert_close((scales * grad_scales).sum(-1), -2 * (conics(scales, rotations) * wish).sum(-1), rtol=1e-9, atol=1e-9)


def test_project_alone():
    scene = make_scene(4, seed=3, domain=Domain2D((-1.0, 3.0), (2.0, 9.0)))
    wish = ScreenGaussians(numbers(4, 2), numbers(4, 3, seed=1), numbers(4, seed=2), numbers(4, 3, seed=3))
    total = sum((part * w).sum() for part, w in zip(project(scene, 30, 20), wish))
    exact = torch.autograd.grad(total, [getattr(scene, name) for name in PARAMETER_NAMES])
    by_hand = project_backward(scene, 30, 20, wish)
    assert tuple(by_hand) == PARAMETER_NAMES
    assert_close(tuple(by_hand.values()), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blend", BLENDS)
def test_render(blend):
    scene, wish = make_scene(5, seed=1), numbers(9, 12, 3)
    with torch.no_grad():
        scene.means[4] += 100.0  # off the image
    parameters = [getattr(scene, name) for name in PARAMETER_NAMES]
    assert distance_to_cut(project(scene, 9, 12), 9, 12) > 1e-3
    by_hand = render_backward(scene, 9, 12, blend, BACKGROUND, wish)
    total = scene_function(scene.domain, 9, 12, blend, wish)
    exact = torch.autograd.grad((render(scene, 9, 12, blend, BACKGROUND, backend="reference") * wish).sum(), parameters)
    assert_close(tuple(by_hand.values()), exact, rtol=1e-9, atol=1e-11)
    for hand, nudged in zip(by_hand.values(), by_differences(total, [p.detach() for p in parameters])):
        assert_close(hand, nudged, rtol=0, atol=1e-6 * hand.abs().max().item())
    assert all(getattr(scene, name).grad is None for name in PARAMETER_NAMES)


@pytest.mark.parametrize("blend", BLENDS)
def test_render_in_float32(blend):
    scene, wish = make_scene(40, dtype=torch.float32), numbers(30, 40, 3).float()
    parameters = [getattr(scene, name) for name in PARAMETER_NAMES]
    exact = torch.autograd.grad((render(scene, 30, 40, blend, BACKGROUND, backend="reference") * wish).sum(), parameters)
    for hand, machine in zip(render_backward(scene, 30, 40, blend, BACKGROUND, wish).values(), exact):
        assert hand.dtype == torch.float32
        assert_close(hand, machine, rtol=0, atol=1e-4 * machine.abs().max().item())


# ---- losses


@pytest.mark.parametrize("shape", [(13, 12, 2), (11, 11, 1), (24, 17, 3), (1, 1, 3), (4, 20, 1), (6, 6, 2)])
def test_ssim(shape):
    image, target = numbers(*shape).sigmoid(), numbers(*shape, seed=1).sigmoid()
    assert_gradients(lambda x: ssim(x, target, backend="reference"), (image,), (ssim_backward(image, target),), differences=image.numel() < 400)


def test_ssim_of_one_pixel_by_pencil():
    slope = ssim_backward(torch.full((1, 1, 1), 0.5).double(), torch.ones(1, 1, 1).double()).item()
    assert_close(slope, (2 - 2 * (1.0001 / 1.2501) * 0.5) / 1.2501)


def test_ssim_gradient_vanishes_at_the_target_and_survives_flat_pictures():
    picture = numbers(16, 15, 3).sigmoid()
    assert ssim_backward(picture, picture).abs().max() < 1e-12
    flat, target = torch.full((14, 14, 1), 0.3).double(), torch.full((14, 14, 1), 0.6).double()
    grad = ssim_backward(flat, target)
    assert grad.isfinite().all() and (grad > 0).all()  # too dark everywhere: brighter everywhere
    assert_close(grad.sum().item(), sum(by_differences(lambda v: ssim(flat + v, target), [torch.zeros(1).double()])).item(), rtol=1e-6, atol=0)


def test_ssim_in_float32_with_flat_bright_halves():
    "Where a picture is flat the variance is all rounding, and large terms cancel: three digits of float32 must remain."
    image, target = numbers(20, 24, 3).sigmoid().float(), numbers(20, 24, 3, seed=1).sigmoid().float()
    image[:, 12:], target[:, 12:] = 0.93, 0.95
    exact, = by_autograd(lambda x: ssim(x, target.double(), backend="reference"), (image.double(),))
    assert_close(ssim_backward(image, target), exact.float(), rtol=0, atol=1e-3 * exact.abs().max().item())


def test_plain_losses():
    image, target = numbers(6, 5, 3), numbers(6, 5, 3, seed=1)
    assert_gradients(lambda x: l1_loss(x, target), (image,), (l1_backward(image, target),))
    assert_gradients(lambda x: l2_loss(x, target), (image,), (l2_backward(image, target),))
    assert (l1_backward(image, image) == 0).all()


@pytest.mark.parametrize("loss", [L1SSIMLoss(), L1SSIMLoss(0.8, 0.2), L1SSIMLoss(1.0, 0.0), L1SSIMLoss(0.0, 1.0)])
def test_weighted_loss(loss):
    image, target = numbers(12, 13, 1).sigmoid(), numbers(12, 13, 1, seed=1).sigmoid()
    assert_gradients(lambda x: loss(x, target), (image,), (loss_backward(loss, image, target),))


# ---- all of it


def test_descent_without_autograd():
    "Hand-written gradients alone, autograd off: the loss falls to less than half, and every first step is autograd's."
    truth, scene, loss = make_scene(6, seed=5), make_scene(6, seed=5), L1SSIMLoss()
    target = render(truth, 24, 32, backend="reference").detach()
    with torch.no_grad():
        for k, parameter in enumerate(scene.parameters()):
            parameter += 0.2 * numbers(*parameter.shape, seed=k)
    exact = torch.autograd.grad(loss(render(scene, 24, 32, backend="reference"), target), [getattr(scene, name) for name in PARAMETER_NAMES])
    adam, losses = torch.optim.Adam(scene.parameters(), lr=0.02), []
    with torch.no_grad():
        for step in range(40):
            image = render(scene, 24, 32, backend="reference")
            grads = render_backward(scene, 24, 32, Blend.WEIGHTED, (0.0, 0.0, 0.0), loss_backward(loss, image, target))
            if step == 0:
                assert_close(tuple(grads.values()), exact, rtol=1e-8, atol=1e-11)
            for name, grad in grads.items():
                getattr(scene, name).grad = grad
            adam.step()
            losses.append(loss(image, target).item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_is_told_what_was_expected():
    screen, one = project(make_scene(3), 4, 5), torch.ones(1, 1)
    for call, message in [
        (lambda: gaussian_weights_backward(torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(7, 2), torch.zeros(3, 7)), r"grad_weights: expected shape \(7, 3\), got \(3, 7\)"),
        (lambda: blend_weighted_backward(torch.zeros(7, 3), torch.zeros(2, 3), torch.zeros(3), torch.zeros(7, 3)), r"colors: expected shape \(3, 3\), got \(2, 3\)"),
        (lambda: rasterize_backward(screen, 4, 5, "over", BACKGROUND, numbers(5, 4, 3)), r"grad_image: expected shape \(4, 5, 3\), got \(5, 4, 3\)"),
        (lambda: rasterize_backward(screen, 4, 5, "multiply", BACKGROUND, numbers(4, 5, 3)), "multiply"),
        (lambda: conics_backward(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2)), r"grad_conics: expected shape \(3, 3\), got \(3, 2\)"),
        (lambda: project_backward(make_scene(2), 4, 5, screen), r"grad_screen.means: expected shape \(2, 2\), got \(3, 2\)"),
        (lambda: l1_backward(one[None], one), r"target: expected shape \(1, 1, 1\), got \(1, 1\)"),
        (lambda: ssim_backward(one[None], one), r"target: expected shape \(1, 1, 1\), got \(1, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
