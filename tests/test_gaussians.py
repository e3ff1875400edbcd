"""Gaussians: shapes, activations, errors, and how a scene is meant to look."""

import math

import pytest
import torch
from conftest import make_scene
from torch.testing import assert_close

from gs2d.gaussians import (
    CUTOFF_POWER, CUTOFF_STD, PARAMETER_NAMES, Blend, Domain2D, Gaussians2D, conics, covariances, gaussian_weights)
from gs2d.io.scene_record import record_of


def test_weight_is_one_at_the_centre_and_zero_beyond_the_cutoff():
    scene = make_scene()
    shapes = conics(scene.scales, scene.rotations)
    assert_close(gaussian_weights(scene.means, shapes, scene.means).diagonal(), torch.ones(len(scene)))
    axis = torch.stack([scene.rotations.cos(), scene.rotations.sin()], -1) * scene.scales[:, :1]
    for factor, inside in ((0.999, True), (1.001, False)):
        at = gaussian_weights(scene.means, shapes, scene.means + factor * CUTOFF_STD * axis).diagonal()
        assert bool((at > 0).all()) is inside and bool((at == 0).all()) is not inside
    assert math.isclose(math.exp(-CUTOFF_POWER / 2), 1 / 255)


def test_conics_invert_covariances():
    scene = make_scene(50).double()
    a, b, c = conics(scene.scales, scene.rotations).unbind(-1)
    inverse = torch.stack([torch.stack([a, b], -1), torch.stack([b, c], -1)], -2)
    assert_close(inverse @ covariances(scene.scales, scene.rotations), torch.eye(2).double().expand(50, 2, 2))


def test_rotation_is_counter_clockwise():
    sigma = covariances(torch.tensor([[2.0, 1.0]]), torch.tensor([math.pi / 4]))[0]
    assert sigma[0, 1] > 0  # the long axis points up and to the right


def test_domain_keeps_pixels_square_and_refuses_nonsense():
    domain = Domain2D.for_image(height=300, width=100)
    assert domain.x_dim == (-5, 5) and domain.y_dim == (-15, 15)
    assert domain.width == 10 and domain.height == 30
    for wrong in ((1, 1), (2, 1), (0, math.inf), (math.nan, 1), (1, 2, 3), "ab", None):
        with pytest.raises(ValueError, match="x_dim: expected"):
            Domain2D(x_dim=wrong)
    with pytest.raises(ValueError, match="height: expected a whole number of at least 1, got 0"):
        Domain2D.for_image(0, 5)


def test_parameters_are_trainable_and_independent_of_their_source():
    means = torch.zeros(2, 2)
    scene = Gaussians2D(means, torch.zeros(2, 2), torch.zeros(2), torch.zeros(2), torch.zeros(2, 3))
    means += 1
    assert [name for name, _ in scene.named_parameters()] == list(PARAMETER_NAMES)
    assert (scene.means == 0).all() and scene.means.requires_grad
    copy = scene.clone()
    with torch.no_grad():
        copy.means += 5
    assert (scene.means == 0).all() and len(copy) == 2
    assert_close(scene.opacities.detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize("name, value", [
    ("means", torch.zeros(2, 3)), ("log_scales", torch.zeros(2)), ("rotations", torch.zeros(2, 1)), ("opacity_logits", torch.zeros(3)),
    ("colors", torch.zeros(2)), ("means", torch.zeros(2, 2, dtype=torch.int64)), ("colors", torch.zeros(2, 3).double())])
def test_wrong_parameters_are_named(name, value):
    good = dict(means=torch.zeros(2, 2), log_scales=torch.zeros(2, 2), rotations=torch.zeros(2), opacity_logits=torch.zeros(2), colors=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=f"{name}.*") as caught:
        Gaussians2D(**{**good, name: value})
    assert "expected" in str(caught.value) and "got" in str(caught.value)


def test_it_shows_itself_whatever_its_size():
    for scene in (make_scene(3), make_scene(0), make_scene(2, domain=Domain2D.for_image(10, 2000))):
        assert scene._repr_png_().startswith(b"\x89PNG")
    assert "3 Gaussians" in repr(make_scene(3))


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_scene_carries_its_look(blend, channels):
    plain, background = make_scene(3, channels=channels), tuple(0.1 * k for k in range(channels))
    assert plain.blend is Blend.WEIGHTED and plain.background == (0.0,) * channels
    scene = make_scene(3, channels=channels, blend=blend.value, background=background)
    for one in (scene, scene.clone(), Gaussians2D.from_record(record_of(scene))):
        assert one.blend is blend and one.background == background
        assert f"{blend.value}" in repr(one)
    assert " on " not in repr(plain)


@pytest.mark.parametrize("look, words", [
    (dict(blend="foo"), "blend: expected one of .* got 'foo'"), (dict(background=(0, 0)), "background: expected 3 finite numbers"),
    (dict(background=(0, 0, math.nan)), "background: expected"), (dict(background="white"), "background: expected")])
def test_a_look_that_does_not_fit_is_refused(look, words):
    values = ([[0, 0]], [[1, 1]], [0], [1], [[1, 1, 1]])
    for make in (lambda: make_scene(3, **look), lambda: Gaussians2D.from_values(*values, **look)):
        with pytest.raises(ValueError, match=words):
            make()


def test_axes_are_the_root_of_the_covariance():
    scene = make_scene(20).double()
    axes = scene.axes()
    assert_close(axes @ axes.mT, covariances(scene.scales, scene.rotations))
    assert_close(axes.norm(dim=1), scene.scales)  # the columns are as long as one standard deviation


def test_gradients_in_normalised_device_coordinates():
    scene = make_scene(4, domain=Domain2D((-5, 5), (0, 40))).double()
    assert scene.ndc_gradient() is None
    middle, half = torch.tensor([0.0, 20.0]), torch.tensor([5.0, 20.0])
    loss = lambda means: (means.sin() * torch.arange(8.0).reshape(4, 2)).sum()
    loss(scene.means).backward()
    ndc = ((scene.means.detach() - middle) / half).requires_grad_()
    loss(ndc * half + middle).backward()
    assert_close(scene.ndc_gradient(), ndc.grad)
    assert_close(scene.ndc_directions(scene.ndc_gradient()), scene.means.grad)
