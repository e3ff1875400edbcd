"""Gaussians and scene files: shapes, activations, errors, and round trips bit for bit."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from gs2d.gaussians import (
    CUTOFF_POWER, CUTOFF_STD, PARAMETER_NAMES, Domain2D, Gaussians2D, atomic_write, conics, covariances, gaussian_weights, load_scene)
from gs2d.renderer import Blend, render

FLAT = {
    "x_dim": [-5, 5], "y_dim": [-3, 3], "res_x": 100, "res_y": 60, "N": 2, "dims": 2,
    "alphas": [[0.9, 0.5, 0.1], [-0.1, 0.2, 0.3]], "centers": [[0, 1.5], [1, -1]], "sigmas": [[2, 0.4], [1, 1]], "thetas": [0.1, 0],
}


def make_scene(n=7, seed=0, domain=Domain2D()):
    g = torch.Generator().manual_seed(seed)
    return Gaussians2D(
        4 * torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), 3 * torch.randn(n, generator=g),
        2 * torch.randn(n, generator=g), torch.randn(n, 3, generator=g), domain)


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
    with pytest.raises(ValueError, match="0×5"):
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
def test_saved_scene_renders_the_same_bytes(tmp_path, blend):
    scene = make_scene(40, domain=Domain2D.for_image(30, 50))
    path = scene.save(tmp_path / "scene.json", height=30, width=50, blend=blend, background=(0.1, 0.2, 0.3))
    file = load_scene(path)
    assert (file.height, file.width, file.blend, file.background) == (30, 50, blend.value, (0.1, 0.2, 0.3))
    assert file.scene.domain == scene.domain
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(scene, name), getattr(file.scene, name)), name
    assert torch.equal(render(scene, 30, 50, blend), render(Gaussians2D.load(path), 30, 50, blend))


def test_extreme_opacities_render_the_same_after_the_round_trip(tmp_path):
    scene = make_scene(6)
    with torch.no_grad():
        scene.opacity_logits.copy_(torch.tensor([-200.0, -90, -20, 18, 30, 200]))
    again = Gaussians2D.load(scene.save(tmp_path / "scene.json"))
    assert torch.equal(scene.opacities, again.opacities)
    assert torch.equal(render(scene, 9, 9), render(again, 9, 9))


def test_empty_scene_survives_the_round_trip(tmp_path):
    again = load_scene(make_scene(0).save(tmp_path / "empty.json"))
    assert len(again.scene) == 0 and again.scene.colors.shape == (0, 3)


def test_flat_file_is_an_additive_scene_with_y_up(tmp_path):
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(FLAT))
    file = load_scene(path)
    assert file.blend == "additive" and (file.height, file.width) == (60, 100)
    assert torch.equal(file.scene.opacities, torch.ones(2))
    assert_close(file.scene.colors.detach(), torch.tensor(FLAT["alphas"]))
    image = render(file.scene, file.height, file.width, file.blend)
    assert image[:30].sum() > 3 * image[30:].sum()  # the strong one is at y = +1.5: in the upper half


def test_saved_file_has_the_documented_keys(tmp_path):
    document = json.loads(make_scene(2).save(tmp_path / "s.json", height=4, width=8).read_text())
    assert set(document) == set(FLAT) | {"format", "version", "blend", "background", "opacities", "colors"}
    assert (document["res_x"], document["res_y"], document["N"]) == (8, 4, 2)


@pytest.mark.parametrize("change, message", [
    ({"thetas": [0.1]}, "'thetas' of shape"), ({"centers": [[0, 1], [1]]}, "'centers'"), ({"sigmas": [[1, math.nan], [1, 1]]}, "row 0"),
    ({"centers": [[0, 0], [math.inf, 0]]}, "row 1"), ({"N": 3}, "N is|shape"), ({"N": "two"}, "'N'"), ({"N": -1}, "'N'"), ({"N": None}, "N"),
    ({"alphas": None}, "alphas"), ({"sigmas": [[0, 1], [1, 1]]}, "scales"), ({"opacities": [0.5, 1.5], "colors": [[1, 1, 1]] * 2}, "opacities"),
    ({"blend": "multiply"}, "blend"), ({"format": "other"}, "format"), ({"version": 99}, "version"), ({"x_dim": [5, -5]}, "x_dim"), ({"res_x": 0}, "res_x"),
    ({"alphas": "red"}, "alphas"), ({"background": [1]}, "background")])
def test_broken_scene_files_are_refused_with_their_name(tmp_path, change, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**FLAT, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_scene(path)
    assert str(path) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "3"])
def test_files_that_are_no_scene(tmp_path, text):
    path = tmp_path / "no.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="expected a"):
        load_scene(path)


def test_saving_nan_is_refused_and_loses_nothing(tmp_path):
    scene, path = make_scene(2), tmp_path / "s.json"
    before = scene.save(path).read_bytes()
    with torch.no_grad():
        scene.colors[0, 0] = math.nan
    with pytest.raises(ValueError, match="colors: expected finite"):
        scene.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_no_half_file(tmp_path):
    path = atomic_write(tmp_path / "a", b"one")
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="existing folder"):
        atomic_write(tmp_path / "missing" / "a", b"")
