"""gs2d.loss against pencil and paper, a loop in numpy, pytorch-msssim and scikit-image."""
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from pytorch_msssim import ssim as torch_oracle
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.testing import assert_close

from gs2d.loss import SSIM_C1, SSIM_C2, L1SSIMLoss, l1_loss, l2_loss, psnr, ssim, ssim_map

FUNCTIONS = [l1_loss, l2_loss, psnr, ssim, L1SSIMLoss()]
SIZES = [(11, 11, 3), (13, 12, 1), (24, 37, 4), (41, 12, 3), (64, 65, 3)]
TINY = [(1, 1, 3), (1, 9, 1), (2, 2, 3), (3, 20, 3), (10, 10, 4)]


def pair(shape, dtype=torch.float64, seed=0, noise=0.1):
    "A random picture and a noisy copy, which strays a little outside [0, 1]."
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (target + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype), target.to(dtype)


def portrait(blur=False):
    "A real photograph, 75×64, and a copy that went through a quarter of the pixels."
    picture = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).resize((64, 75))
    if blur:
        picture = picture.resize((32, 37)).resize((64, 75))
    return torch.from_numpy(np.asarray(picture) / 255.0)


def photographs():
    photo = portrait()
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "blur": (portrait(blur=True), photo),
        "noise": ((photo + 0.1 * noise).clamp(0, 1), photo),
        "shift": (photo.roll(1, 1), photo),
        "brighter": (photo + 0.1, photo),
        "negative": (1 - photo, photo),
        "pale": (0.95 + 0.01 * portrait(blur=True), 0.95 + 0.01 * photo),
    }


def shown(*pictures):
    "As they would be shown: the scores clamp."
    return (picture.clamp(0, 1) for picture in pictures)


def by_scikit(image, target):
    image, target = shown(image, target)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1)
    return structural_similarity(image.detach().numpy(), target.detach().numpy(), **options).item()


def by_msssim(image, target):
    image, target = (picture.permute(2, 0, 1)[None] for picture in shown(image, target))
    return torch_oracle(image, target, data_range=1.0, win_size=11, win_sigma=1.5).item()


def by_loops(image, target):
    "SSIM from its definition, window by window, for pictures of any size."
    image, target = (picture.numpy() for picture in shown(image, target))
    height, width, channels = image.shape
    size = max(k for k in range(1, 12, 2) if k <= min(height, width))
    x = np.arange(size) - size // 2
    weights = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(height - size + 1):
        for j in range(width - size + 1):
            for c in range(channels):
                a, b = (picture[i : i + size, j : j + size, c] for picture in (image, target))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                both = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
                values.append(luminance * (2 * covariance + SSIM_C2) / (both + SSIM_C2))
    return float(np.mean(values))


# SSIM

@pytest.mark.parametrize("shape", SIZES)
def test_ssim_of_random_pictures_equals_both_libraries(shape):
    image, target = pair(shape)
    value = ssim(image, target).item()
    assert value == pytest.approx(by_scikit(image, target), abs=1e-12)
    assert value == pytest.approx(by_msssim(image, target), abs=2e-6)  # its window is float32


@pytest.mark.parametrize("name", photographs())
def test_ssim_of_photographs_equals_both_libraries(name):
    image, target = photographs()[name]
    value = ssim(image, target).item()
    assert value == pytest.approx(by_scikit(image, target), abs=1e-12)
    assert value == pytest.approx(by_msssim(image, target), abs=1e-4 if name == "pale" else 2e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", photographs())
def test_float32_is_within_rounding_of_float64(name, backend):
    # the variances are differences of numbers near 1, rounded by 6e-8, over C2 = 9e-4
    image, target = photographs()[name]
    value = ssim(image.float(), target.float(), backend=backend)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(ssim(image, target).item(), abs=1e-4 if name == "pale" else 1e-5)


@pytest.mark.parametrize("shape", TINY + [(13, 12, 3)])
def test_ssim_of_tiny_pictures_equals_the_loops(shape):
    image, target = pair(shape, seed=2)
    assert ssim(image, target).item() == pytest.approx(by_loops(image, target), abs=1e-12)


@pytest.mark.parametrize("shape", TINY + SIZES)
def test_the_two_backends_agree_in_value_and_in_both_gradients(shape):
    image, target = (picture.requires_grad_() for picture in pair(shape, torch.float32, seed=3))
    values, gradients = {}, {}
    for backend in ("auto", "reference"):
        values[backend] = ssim(image, target, backend=backend)
        assert values[backend].shape == ()
        gradients[backend] = torch.autograd.grad(values[backend], (image, target))
    assert_close(values["auto"], values["reference"], rtol=0, atol=2e-6)
    for ours, readable in zip(gradients["auto"], gradients["reference"]):
        assert_close(ours, readable, rtol=0, atol=1e-4 * readable.abs().max().item() + 1e-7)


def test_the_map_covers_the_valid_region_and_its_mean_is_the_score():
    image, target = pair((20, 17, 3))
    values = ssim_map(image, target)
    assert values.shape == (10, 7, 3)
    assert_close(ssim_map(*shown(image, target)).mean(), ssim(image, target))
    assert ssim_map(*pair((6, 9, 2))).shape == (2, 5, 2)


def test_the_map_sees_damage_only_where_its_window_reaches():
    target = portrait()
    image = target.clone()
    image[30, 40] += 0.5
    damaged = (ssim_map(image, target) < 1 - 1e-9).any(-1).nonzero()
    assert damaged.min(0).values.tolist() == [20, 30] and damaged.max(0).values.tolist() == [30, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", TINY + SIZES)
def test_identical_pictures_have_ssim_one(shape, dtype):
    picture, _ = pair(shape, dtype, noise=3.0)
    assert ssim(picture, picture.clone(), backend="reference").item() == pytest.approx(1, abs=1e-6)
    assert ssim(picture, picture.clone()).item() == pytest.approx(1, abs=1e-6)


def test_ssim_by_hand():
    flat = lambda value: torch.full((12, 12, 1), value, dtype=torch.float64)
    assert ssim(flat(0.2), flat(0.4)).item() == pytest.approx(0.1601 / 0.2001, abs=1e-12)
    assert ssim(flat(0.0), flat(1.0)).item() == pytest.approx(0.0001 / 1.0001, abs=1e-12)
    assert ssim(flat(0.2)[:1, :1], flat(0.4)[:1, :1]).item() == pytest.approx(0.1601 / 0.2001, abs=1e-12)
    assert ssim(portrait(), 1 - portrait()) < 0


def test_ssim_is_symmetric_and_has_no_up_or_left():
    image, target = pair((20, 31, 3))
    value = ssim(image, target)
    assert_close(ssim(target, image), value)
    assert_close(ssim(image.flip(0), target.flip(0)), value)
    assert_close(ssim(image.transpose(0, 1), target.transpose(0, 1)), value)
    assert_close(ssim(image.flip(2), target.flip(2)), value)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ssim_stays_finite_far_outside_the_range(backend):
    image, target = pair((24, 24, 3), torch.float32)
    image = (1000 + image).requires_grad_()  # float32 variances drown in rounding here
    value = ssim(image, target, backend=backend)
    value.backward()
    assert value.isfinite() and image.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 0.3])
def test_flat_pictures_have_finite_gradients(value):
    image = torch.full((14, 14, 3), value, requires_grad=True)
    L1SSIMLoss()(image, torch.zeros(14, 14, 3)).backward()
    assert image.grad.isfinite().all()


# L1, L2, PSNR

def test_l1_and_l2_by_hand():
    off = torch.tensor([[0.1, -0.1], [0.1, -0.5]], dtype=torch.float64)[..., None]
    assert l1_loss(off, torch.zeros_like(off)).item() == pytest.approx(0.2)
    assert l2_loss(off, torch.zeros_like(off)).item() == pytest.approx(0.07)


@pytest.mark.parametrize("shape", TINY + SIZES)
def test_l1_and_l2_are_means_over_everything(shape):
    image, target = pair(shape)
    difference = (image - target).numpy()
    assert l1_loss(image, target).item() == pytest.approx(np.abs(difference).mean(), rel=1e-12)
    assert l2_loss(image, target).item() == pytest.approx((difference**2).mean(), rel=1e-12)


@pytest.mark.parametrize("off_by, decibels", [(1, 0), (0.1, 20), (0.01, 40), (1 / 255, 48.130804)])
def test_psnr_by_hand(off_by, decibels):
    black = torch.zeros(3, 4, 3, dtype=torch.float64)
    assert psnr(black + off_by, black).item() == pytest.approx(decibels, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounding_to_256_levels_costs_58_9_decibels(seed):
    # the error is uniform in half a level either way, so its mean square is a twelfth of a squared level
    exact = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert psnr((255 * exact).round() / 255, exact).item() == pytest.approx(10 * math.log10(12 * 255**2), abs=0.1)


def test_psnr_of_photographs_equals_scikit_image():
    for image, target in photographs().values():
        image = image.clamp(0, 1)
        expected = peak_signal_noise_ratio(target.numpy(), image.numpy(), data_range=1.0)
        assert psnr(image, target).item() == pytest.approx(expected, abs=1e-9)


def test_psnr_clamps_what_the_losses_do_not():
    white, over = torch.ones(2, 2, 3), torch.full((2, 2, 3), 1.25)
    assert psnr(over, white) == math.inf
    assert l1_loss(over, white) == 0.25 and l2_loss(over, white) == 0.0625
    assert psnr(-white, white) == 0


def test_identical_pictures():
    for dtype in (torch.float32, torch.float64):
        photo = portrait().to(dtype)
        assert l1_loss(photo, photo) == 0 and l2_loss(photo, photo) == 0 and psnr(photo, photo) == math.inf


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_symmetric(function):
    image, target = pair((17, 13, 3))
    assert_close(function(image, target), function(target, image))


@pytest.mark.parametrize("score", [psnr, ssim])
def test_scores_are_those_of_the_picture_that_is_shown(score):
    image, target = pair((20, 17, 3))
    assert image.amax() > 1 or image.amin() < 0
    assert_close(score(image, target), score(*shown(image, target)), rtol=0, atol=0)
    assert_close(score(image + (image > 1), target), score(image, target), rtol=0, atol=0)  # brighter than white is white


# L1SSIMLoss

def test_the_mixture_is_the_weighted_sum():
    image, target = pair((17, 13, 3))
    l1, structure = l1_loss(image, target), 1 - ssim_map(image, target).mean()  # a loss does not clamp
    assert L1SSIMLoss() == L1SSIMLoss(0.15, 0.85)
    assert_close(L1SSIMLoss()(image, target), 0.15 * l1 + 0.85 * structure)
    assert_close(L1SSIMLoss(0.8, 0.2)(image, target), 0.8 * l1 + 0.2 * structure)
    assert_close(L1SSIMLoss(2, 0)(image, target), 2 * l1)
    assert_close(L1SSIMLoss(0, 3)(image, target), 3 * structure)
    assert L1SSIMLoss()(target, target).item() == pytest.approx(0, abs=1e-12)


def test_the_mixture_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        L1SSIMLoss().l1_weight = 1.0
    assert len({L1SSIMLoss(), L1SSIMLoss(0.15, 0.85), L1SSIMLoss(0.8, 0.2)}) == 2


@pytest.mark.parametrize(
    "weights, error, says",
    [
        ((-0.1, 0.5), ValueError, "l1_weight: expected a finite number of at least 0, got -0.1"),
        ((0.5, math.nan), ValueError, "ssim_weight: expected a finite number of at least 0, got nan"),
        ((math.inf, 0.5), ValueError, "l1_weight: expected a finite number of at least 0, got inf"),
        ((0, 0.0), ValueError, "expected at least one weight above 0"),
        (("0.8", 0.2), TypeError, "l1_weight: expected a number, got '0.8'"),
        ((0.8, None), TypeError, "ssim_weight: expected a number, got None"),
        ((True, 0.2), TypeError, "l1_weight: expected a number, got True"),
    ],
)
def test_weights_are_checked(weights, error, says):
    with pytest.raises(error, match=says):
        L1SSIMLoss(*weights)


# bad input

@pytest.mark.parametrize("function", [*FUNCTIONS, ssim_map], ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize(
    "image, target, error, says",
    [
        (torch.zeros(4, 5, 3), torch.zeros(4, 5, 1), ValueError, r"shape \(4, 5, 3\), got \(4, 5, 1\)"),
        (torch.zeros(4, 5, 3), torch.zeros(5, 4, 3), ValueError, r"shape \(4, 5, 3\), got \(5, 4, 3\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5), ValueError, r"image: expected \(H, W, C\).*got \(4, 5\)"),
        (torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 5), ValueError, r"expected \(H, W, C\).*got \(1, 3, 4, 5\)"),
        (torch.zeros(0, 5, 3), torch.zeros(0, 5, 3), ValueError, r"at least one pixel, got \(0, 5, 3\)"),
        (torch.zeros(4, 5, 3), np.zeros((4, 5, 3)), TypeError, "target: expected a torch tensor, got ndarray"),
        (torch.zeros(4, 5, 3).byte(), torch.zeros(4, 5, 3), TypeError, "image: expected float32 or float64.*torch.uint8"),
        (torch.zeros(4, 5, 3).half(), torch.zeros(4, 5, 3).half(), TypeError, "image: expected .*got torch.float16"),
        (torch.zeros(4, 5, 3).double(), torch.zeros(4, 5, 3), TypeError, "dtype torch.float64, got torch.float32"),
        (torch.zeros(4, 5, 3), torch.zeros(4, 5, 3, device="meta"), ValueError, "device cpu, got meta"),
    ],
)
def test_pictures_that_cannot_be_compared(function, image, target, error, says):
    with pytest.raises(error, match=says):
        function(image, target)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="expected one of 'auto', 'reference', got 'fast'"):
        ssim(*pair((12, 12, 3)), backend="fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_one_nan_makes_the_number_nan(function, dtype):
    image, target = pair((15, 16, 3), dtype)
    image[7, 7, 1] = math.nan
    assert function(image, target).isnan() and function(target, image).isnan()


# gradients

@pytest.mark.parametrize("shape", [(12, 13, 2), (4, 3, 1), (1, 1, 3)])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_gradients_equal_finite_differences(function, shape):
    generator = torch.Generator().manual_seed(5)
    inputs = [(0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_by_hand():
    image, target = pair((4, 5, 3))
    image.requires_grad_()
    (slope,) = torch.autograd.grad(l1_loss(image, target), image)
    assert_close(slope, (image - target).sign().detach() / 60)
    (slope,) = torch.autograd.grad(l2_loss(image, target), image)
    assert_close(slope, 2 * (image - target).detach() / 60)


@pytest.mark.parametrize("loss", [l1_loss, l2_loss, L1SSIMLoss(), L1SSIMLoss(0, 1)], ids=lambda value: getattr(value, "__name__", str(value)))
def test_descending_the_gradient_lowers_the_loss(loss):
    target = portrait()
    image = portrait(blur=True).requires_grad_()
    before = loss(image, target)
    (slope,) = torch.autograd.grad(before, image)
    assert loss(image - 1e-3 * slope / slope.abs().max(), target) < before


def test_same_bytes_with_any_number_of_threads():
    threads = torch.get_num_threads()
    image, target = pair((203, 151, 3), torch.float32)
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            x = image.clone().requires_grad_()
            values = [l1_loss(x, target), l2_loss(x, target), psnr(x, target), ssim(x, target, backend="reference")]
            (slope,) = torch.autograd.grad(sum(values), x)
            results.append([*(value.detach() for value in values), slope])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
