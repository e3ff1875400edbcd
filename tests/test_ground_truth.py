"""Ground truths: known scenes are visible, reproducible and in range, and hand on how they look."""
import io
import math

import pytest
import torch
from conftest import colors
from PIL import Image

from gs2d.gaussians import Blend, Domain2D
from gs2d.ground_truth import GroundTruth, random_scene
from gs2d.renderer import render


# ── known scenes ──────────────────────────────────────────────────────────────

@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("background", [(0, 0, 0), (1, 1, 1), (0.2, 0.5, 0.9)])
@pytest.mark.parametrize("n", [1, 20, 300])
def test_random_is_a_float32_picture_in_range_of_its_own_scene(blend, background, n):
    truth = GroundTruth.random(n, 24, 40, seed=n, blend=blend, background=background)
    assert truth.image.dtype == torch.float32 and truth.image.shape == (24, 40, 3) and not truth.image.requires_grad
    assert (truth.height, truth.width, len(truth.scene)) == (24, 40, n)
    assert -1e-5 <= truth.image.min() and truth.image.max() <= 1 + 1e-5
    assert truth.image.std() > 0.01  # a picture, not a plain field
    again = render(truth.scene, 24, 40, truth.blend, truth.background)
    assert torch.equal(again, truth.image)
    assert truth.domain == truth.scene.domain and truth.domain.y_dim == pytest.approx((-3.0, 3.0))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_scene():
    a, b, c = (GroundTruth.random(20, 32, 32, seed=s) for s in (7, 7, 8))
    assert torch.equal(a.image, b.image)
    assert all(torch.equal(x, y) for x, y in zip(a.scene.parameters(), b.scene.parameters()))
    assert not torch.equal(a.image, c.image)


def test_random_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    GroundTruth.random(5, 8, 8)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("n, height, width", [(30, 48, 64), (218, 64, 64), (100, 40, 50)])
def test_a_larger_picture_shows_the_same_scene_where_each_gaussian_has_19_pixels(n, height, width):
    assert height * width / n >= 0.75 / 0.04  # (½ √3 / 0.2)²
    for seed in range(5):
        small, large = random_scene(n, height, width, seed), random_scene(n, 2 * height, 2 * width, seed)
        assert all(torch.equal(x, y) for x, y in zip(small.parameters(), large.parameters()))


def test_in_smaller_pictures_only_thin_axes_differ_and_they_are_half_a_pixel():
    small, large = random_scene(1000, 64, 64), random_scene(1000, 128, 128)
    differ = small.log_scales != large.log_scales
    assert 0.2 < differ.float().mean() < 0.4
    torch.testing.assert_close(small.scales[differ], torch.full((int(differ.sum()),), 0.5 * 10 / 64))
    assert (large.scales[differ] < small.scales[differ]).all()
    for name in ("means", "rotations", "opacity_logits", "colors"):
        assert torch.equal(getattr(small, name), getattr(large, name))


@pytest.mark.parametrize("n, height, width", [(1, 32, 32), (40, 48, 48), (40, 24, 96), (500, 16, 16)])
def test_random_gaussians_lie_in_the_domain_and_are_not_thinner_than_half_a_pixel(n, height, width):
    scene = random_scene(n, height, width, seed=1)
    x, y = scene.means.detach().unbind(-1)
    assert (x.abs() < scene.domain.x_dim[1]).all() and (y.abs() < scene.domain.y_dim[1]).all()
    scales = scene.scales.detach()
    assert scales.min() >= 0.5 * scene.domain.width / width * (1 - 1e-6)
    assert (scales[:, 0] / scales[:, 1]).max() <= 3 * (1 + 1e-5)


def test_every_random_gaussian_is_visible():
    scene = random_scene(40, 48, 48, seed=0)
    with torch.no_grad():
        whole = render(scene, 48, 48)
        for i in range(40):
            rest = scene.clone()
            rest.opacity_logits[i] = -100.0
            assert (render(rest, 48, 48) - whole).abs().max() > 10 / 255


@pytest.mark.parametrize("arguments", [(0, 8, 8), (-1, 8, 8), (3, 0, 8), (3, 8, -2)])
def test_random_refuses_counts_and_sizes_below_one(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        GroundTruth.random(*arguments)


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 2), (0, 0, math.nan), "white", "010", 0.5])
def test_background_is_three_numbers_in_range(background):
    for make in (lambda: GroundTruth.random(3, 8, 8, background=background), lambda: GroundTruth.from_image(colors(), background=background)):
        with pytest.raises(ValueError, match="three numbers"):
            make()


# ── the object ────────────────────────────────────────────────────────────────

def test_from_image_has_square_pixels_and_no_scene():
    truth = GroundTruth.from_image(colors(600, 512), max_side=60)
    assert truth.scene is None and (truth.height, truth.width) == (60, 51)
    assert truth.domain.width / 51 == pytest.approx(truth.domain.height / 60)
    assert truth.domain.x_dim == (-5, 5) and truth.blend == Blend.WEIGHTED
    assert "no known scene" in repr(truth) and len(repr(truth)) < 120


def test_from_image_keeps_blend_and_background():
    truth = GroundTruth.from_image(colors(channels=4), background=(1, 0, 0), blend="additive")
    assert truth.blend is Blend.ADDITIVE and truth.background == (1.0, 0.0, 0.0)


def test_it_is_frozen_and_shows_itself():
    truth = GroundTruth.random(5, 8, 8)
    with pytest.raises(AttributeError):
        truth.blend = Blend.OVER
    assert Image.open(io.BytesIO(truth._repr_png_())).size == (8, 8)
    assert "5 known Gaussians" in repr(truth)


def test_to_another_device_leaves_the_original():
    truth = GroundTruth.random(5, 8, 8)
    moved = truth.to("meta")
    assert moved.image.device.type == moved.scene.device.type == "meta"
    assert truth.image.device.type == truth.scene.device.type == "cpu"
    assert GroundTruth.from_image(colors()).to("meta").scene is None


@pytest.mark.parametrize("blend", list(Blend))
def test_a_known_scene_carries_the_look_of_its_picture(blend):
    truth = GroundTruth.random(5, 8, 8, blend=blend.value, background=(0.2, 0.5, 0.9))
    for one in (truth, truth.scene, truth.to("cpu").scene, truth.scene.clone()):
        assert one.blend is blend and one.background == (0.2, 0.5, 0.9)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_no_background_is_zero_in_every_channel(channels):
    truth = GroundTruth(torch.zeros(4, 6, channels), None, Domain2D(), "over")
    assert truth.background == (0.0,) * channels and truth.blend is Blend.OVER


@pytest.mark.parametrize("look, words", [
    (dict(blend="foo"), "blend: expected one of"), (dict(background=(0, 0)), "background: expected 3 finite"), (dict(background=(0, 0, math.inf)), "background: expected")])
def test_a_look_that_does_not_fit_the_picture_is_refused(look, words):
    with pytest.raises(ValueError, match=words):
        GroundTruth(torch.zeros(4, 6, 3), None, Domain2D(), **look)


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**63, ValueError), (True, TypeError), (1.5, TypeError)])
def test_a_seed_is_a_whole_number(seed, error):
    with pytest.raises(error, match="seed: expected a whole number"):
        random_scene(3, 8, 8, seed)
