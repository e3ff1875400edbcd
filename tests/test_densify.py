"""Densification: what a round does to the scene, to the picture, and to every row of the optimiser."""
import dataclasses
import math

import pytest
import torch

from gs2d.densify import (
    DensificationState, DensifyConfig, DensifyStrategy, clone_offsets, densify, shared_opacity_logits, split_offsets, visible_ink)
from gs2d.gaussians import PARAMETER_NAMES, Domain2D, Gaussians2D
from gs2d.renderer import Blend, render

ADAMS = [dict(), dict(foreach=True), dict(fused=True), dict(amsgrad=True)]
SUMS = [Blend.WEIGHTED, Blend.ADDITIVE]


def make_scene(n=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return Gaussians2D(
        4 * torch.rand(n, 2, generator=g) - 2, 0.5 * torch.randn(n, 2, generator=g) - 1, torch.randn(n, generator=g),
        torch.randn(n, generator=g), torch.rand(n, 3, generator=g)).to(dtype)


def make_adam(scene, **options):
    return torch.optim.Adam([{"params": [p], "name": name, "lr": 0.01} for name, p in scene.named_parameters()], **options)


def some_steps(scene, optimizer, state, target, n=3, blend=Blend.WEIGHTED):
    for _ in range(n):
        optimizer.zero_grad()
        image = render(scene, *target.shape[:2], blend, backend="reference")
        (image - target).square().mean().backward()
        state.accumulate(scene)
        optimizer.step()
    return image.detach()


def pulled(n, *, pulls=None, scene=None, seed=0):
    "A scene of n and a state in which Gaussian i is pulled by pulls[i] along x (NDC)."
    scene = make_scene(n, seed) if scene is None else scene
    state = DensificationState(n)
    pulls = torch.ones(n) if pulls is None else torch.as_tensor(pulls)
    scene.means.grad = torch.stack([pulls / (scene.domain.width / 2), torch.zeros(n)], -1).to(scene.means)
    state.accumulate(scene)
    return scene, state


def target_image(seed=5, size=(20, 24)):
    return torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed))


def find(rows, table):
    "For each row, the index of the equal row of the table, or -1."
    return [next((i for i, row in enumerate(table) if torch.equal(row, wanted)), -1) for wanted in rows]


# The state

def test_state_averages_over_the_steps_with_a_finite_gradient():
    scene = make_scene(3)
    scene.domain = Domain2D((-2.0, 2.0), (-6.0, 6.0))
    state = DensificationState(3)
    nan = float("nan")
    for gradient in ([[1.5, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [nan, 1.0], [0.0, 0.0]], [[0.5, 0.0], [math.inf, 0.0], [0.0, 0.0]]):
        scene.means.grad = torch.tensor(gradient)
        state.accumulate(scene)
    torch.testing.assert_close(state.mean_norms, torch.tensor([2.0, 6.0, 0.0]))  # ×2 along x, ×6 along y
    assert state.counts.tolist() == [2, 1, 0]
    torch.testing.assert_close(state.vectors, torch.tensor([[4.0, 0.0], [0.0, 6.0], [0.0, 0.0]]))


def test_state_goes_into_a_checkpoint_and_back():
    scene, state = pulled(4, pulls=[1.0, 2.0, 3.0, 4.0])
    other = DensificationState(9)
    other.load_state_dict({name: tensor.clone() for name, tensor in state.state_dict().items()})
    for a, b in zip(state.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    other.accumulate(scene)  # a copy: the first one must not change with it
    assert state.counts.tolist() == [1] * 4 and other.counts.tolist() == [2] * 4
    with pytest.raises(ValueError, match="norms"):
        other.load_state_dict({"counts": torch.zeros(2), "vectors": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"vectors: expected a tensor of shape \(2, 2\)"):
        other.load_state_dict({"counts": torch.zeros(2), "norms": torch.zeros(2), "vectors": torch.zeros(3, 2)})
    assert len(other) == 4  # a refused state leaves the old one


def test_state_wants_the_scene_it_was_made_for():
    with pytest.raises(ValueError, match="expected a scene of 3 Gaussians, got 4"):
        DensificationState(3).accumulate(make_scene(4))
    state = DensificationState(4)
    state.accumulate(make_scene(4))  # no gradient yet: nothing to add
    assert state.counts.sum() == 0


# The parts

@pytest.mark.parametrize("blend", Blend)
def test_shared_opacity(blend):
    o = torch.tensor([1e-6, 0.01, 0.3, 0.9, 0.999], dtype=torch.float64)
    shared = shared_opacity_logits(o.logit(), blend).sigmoid()
    together = 1 - (1 - shared) ** 2 if blend is Blend.OVER else 2 * shared
    torch.testing.assert_close(together, o, rtol=1e-9, atol=1e-15)  # the OVER formula cancels at o = 1e-6


def test_shared_opacity_survives_extreme_logits():
    logits = torch.tensor([-60.0, 0.0, 40.0])
    for blend in Blend:
        assert shared_opacity_logits(logits, blend).isfinite().all()


def test_clone_goes_downhill_by_standard_deviations():
    scene = Gaussians2D.from_values([[0.0, 0.0]] * 3, [[2.0, 0.5]] * 3, [0.0, math.pi / 2, 0.7], [0.5] * 3, [[1.0, 1.0, 1.0]] * 3)
    offsets = clone_offsets(scene, torch.tensor([[-3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]), 0.5).detach()
    along = 1.0 * torch.tensor([math.cos(0.7), math.sin(0.7)])  # no gradient: half of 2, along the longer axis
    torch.testing.assert_close(offsets, torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.0]), along]))


def test_children_have_the_parents_variance_along_the_axis():
    scene = make_scene(20, dtype=torch.float64)
    d = split_offsets(scene, 1.6).norm(dim=-1)
    std = scene.scales.amax(-1)
    torch.testing.assert_close(d**2 + (std / 1.6) ** 2, std**2)


def test_visible_ink_in_a_sum_is_opacity_times_colour():
    scene = Gaussians2D.from_values([[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2, [0.0] * 2, [0.001, 0.9], [[0.0, -500.0, 0.0], [1e-4, 0.0, 0.0]])
    assert (visible_ink(scene, Blend.ADDITIVE) >= 0.005).tolist() == [True, False]
    assert (visible_ink(scene, Blend.OVER) >= 0.005).tolist() == [False, True]


# One round

@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("options", ADAMS)
def test_moments_row_by_row(options, blend):
    scene, target = make_scene(12), target_image()
    optimizer, state = make_adam(scene, **options), DensificationState(12)
    some_steps(scene, optimizer, state, target, blend=blend)
    with torch.no_grad():  # two large ones, three small ones, one too faint; the rest at rest
        scene.log_scales[:2], scene.log_scales[2:] = 0.5, -3.0
        scene.opacity_logits[5], scene.colors[5] = -20.0, 0.1
    state.reset(12)
    state.norms[:6], state.counts[:] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 9.0]), 1
    state.vectors[:, 0] = 1.0
    old = {name: getattr(scene, name).detach().clone() for name in PARAMETER_NAMES}
    moments = {name: {k: v.clone() for k, v in optimizer.state[getattr(scene, name)].items()} for name in PARAMETER_NAMES}

    report = densify(scene, optimizer, state, DensifyConfig(scale_threshold=0.05), blend=blend)
    assert report == (3, 2, 1, 0, 16) and len(scene) == len(state) == 16 and state.counts.sum() == 0

    # colours are copied untouched and all different, so they tell where each row comes from
    source = find(scene.colors.detach(), old["colors"])
    stay, doubled = [2, 3, 4, 6, 7, 8, 9, 10, 11], [2, 3, 4, 0, 1]
    assert sorted(source) == sorted(stay + [2, 3, 4, 0, 0, 1, 1])
    if blend is Blend.OVER:
        assert source == sorted(source)  # twins and children stay at their parent's depth
    else:
        assert source == stay + [2, 3, 4, 0, 1, 0, 1]
    for name in PARAMETER_NAMES:
        new, group = optimizer.state[getattr(scene, name)], next(g for g in optimizer.param_groups if g["name"] == name)
        assert len(group["params"]) == 1 and group["params"][0] is getattr(scene, name) and group["lr"] == 0.01
        assert torch.equal(new["step"], moments[name]["step"]) and new["step"] == 3
        for key in set(new) - {"step"}:
            for i, parent in enumerate(source):
                wanted = torch.zeros_like(moments[name][key][0]) if parent in (0, 1) else moments[name][key][parent]
                assert torch.equal(new[key][i], wanted)
    assert len(optimizer.state) == 5  # the old parameters are forgotten
    untouched = [i for i, parent in enumerate(source) if parent >= 6]
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(scene, name).detach()[untouched], old[name][6:])

    some_steps(scene, optimizer, state, target, n=2, blend=blend)  # training goes on, from the new parameters
    assert optimizer.state[scene.means]["step"] == 5
    assert all(getattr(scene, name).isfinite().all() for name in PARAMETER_NAMES)
    assert not torch.equal(scene.means.detach()[untouched], old["means"][6:])


@pytest.mark.parametrize("blend", SUMS)
def test_a_clone_in_place_does_not_change_a_sum(blend):
    scene, state = pulled(8)
    before = render(scene, 30, 30, blend, backend="reference").detach()
    assert densify(scene, None, state, DensifyConfig(scale_threshold=1, clone_shift=0), blend=blend).n_cloned == 8
    torch.testing.assert_close(render(scene, 30, 30, blend, backend="reference"), before, rtol=1e-5, atol=1e-5)


def test_a_clone_in_place_does_not_change_the_centre_under_over():
    scene = Gaussians2D.from_values([[0.0, 0.0]], [[1.0, 1.0]], [0.0], [0.8], [[1.0, 0.5, 0.2]])
    _, state = pulled(1, scene=scene)
    before = render(scene, 31, 31, Blend.OVER, backend="reference")[15, 15].detach()
    densify(scene, None, state, DensifyConfig(scale_threshold=1, clone_shift=0), blend=Blend.OVER)
    torch.testing.assert_close(render(scene, 31, 31, Blend.OVER, backend="reference")[15, 15], before)


def test_an_exact_clone_stays_and_a_nudged_one_leaves():
    truth = Gaussians2D.from_values([[-1.5, 0.0], [1.5, 0.4]], [[0.75, 0.75]] * 2, [0.0] * 2, [0.95] * 2, [[1.0, 0.6, 0.1], [0.1, 0.5, 1.0]])
    target = render(truth, 24, 24, Blend.ADDITIVE).detach()
    apart = {}
    for shift in (0.0, 0.5):
        scene = Gaussians2D.from_values([[0.3, 0.1]], [[1.2, 1.2]], [0.0], [0.5], [[0.5, 0.5, 0.5]])
        optimizer, state = make_adam(scene), DensificationState(1)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        some_steps(scene, optimizer, state, target, 30, Blend.ADDITIVE)
        densify(scene, optimizer, state, DensifyConfig(scale_threshold=1, clone_shift=shift, grad_threshold=0), blend=Blend.ADDITIVE)
        some_steps(scene, optimizer, state, target, 80, Blend.ADDITIVE)
        apart[shift] = (scene.means[0] - scene.means[1]).norm().item()
    assert apart[0.0] < 1e-2 and apart[0.5] > 1.0  # rounding alone must not part them, a nudge must


def test_the_cap_is_hard_and_takes_the_hardest_pulled_first():
    for cap in (1, 12, 15, 24, 100):
        scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
        report = densify(scene, make_adam(scene), state, DensifyConfig(max_gaussians=cap, scale_threshold=1, opacity_threshold=0))
        assert report.n_gaussians == len(scene) == max(12, min(cap, 24)) and report.n_pruned == 0
    scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
    colors = scene.colors.detach().clone()
    densify(scene, None, state, DensifyConfig(max_gaussians=14, scale_threshold=1, opacity_threshold=0))
    assert sorted(find(scene.colors.detach()[12:], colors)) == [10, 11]
    scene, state = pulled(12)  # ties: the first rows
    densify(scene, None, state, DensifyConfig(max_gaussians=14, scale_threshold=1, opacity_threshold=0))
    assert find(scene.colors.detach()[12:], colors) == [0, 1]


def test_only_those_over_the_threshold_grow():
    scene, state = pulled(4, pulls=[1e-4, 1.99e-4, 2.01e-4, 0.0])
    assert densify(scene, None, state, DensifyConfig(grad_threshold=2e-4, opacity_threshold=0)) == (0, 1, 0, 0, 5)
    scene, state = make_scene(4), DensificationState(4)  # never seen: nothing to go by, even with a threshold of zero
    assert densify(scene, None, state, DensifyConfig(grad_threshold=0, opacity_threshold=0)) == (0, 0, 0, 0, 4)


def test_pruning_never_empties_the_scene():
    scene, state = pulled(5, pulls=[0.0] * 5)
    with torch.no_grad():
        scene.opacity_logits.copy_(torch.tensor([-30.0, -20.0, -10.0, -25.0, -40.0]))
        color = scene.colors[2].clone()
    assert densify(scene, make_adam(scene), state, DensifyConfig()) == (0, 0, 4, 0, 1)
    assert torch.equal(scene.colors[0], color)


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_what_is_not_finite_is_pruned(name):
    scene, state = pulled(6)
    with torch.no_grad():
        getattr(scene, name)[2] = float("nan")
        getattr(scene, name)[4] = float("inf")
    assert densify(scene, None, state, DensifyConfig(opacity_threshold=0)).n_pruned == 2
    assert all(getattr(scene, n).isfinite().all() for n in PARAMETER_NAMES)


def test_frozen_parameters_stay_frozen_and_an_untouched_optimizer_is_fine():
    scene, state = pulled(3)
    scene.colors.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in scene.parameters() if p.requires_grad])  # one group, no names, no step yet
    densify(scene, optimizer, state, DensifyConfig())
    assert not scene.colors.requires_grad and scene.means.requires_grad
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in scene.parameters() if p.requires_grad]


def test_float64_and_an_empty_scene():
    scene, state = pulled(4, scene=make_scene(4, dtype=torch.float64))
    densify(scene, None, state, DensifyConfig())
    assert all(getattr(scene, name).dtype == torch.float64 for name in PARAMETER_NAMES)
    empty = Gaussians2D(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0), torch.zeros(0), torch.zeros(0, 3))
    for strategy in DensifyStrategy:
        args = torch.Generator(), torch.zeros(4, 4, 3), torch.ones(4, 4, 3)
        assert densify(empty, None, DensificationState(0), DensifyConfig(strategy=strategy), *args) == (0, 0, 0, 0, 0)


# Growing where the error is

def by_error(image, target, scene=None, blend=Blend.WEIGHTED, seed=0, optimizer=None, **config):
    scene = make_scene(10) if scene is None else scene
    config = DensifyConfig(strategy="error", opacity_threshold=0, **config)
    generator = torch.Generator().manual_seed(seed)
    return scene, densify(scene, optimizer, DensificationState(len(scene)), config, generator, image, target, blend)


@pytest.mark.parametrize("blend", Blend)
def test_new_gaussians_stand_on_the_wrong_pixels(blend):
    target, image = target_image(), target_image()
    image[3, 20] += 0.5  # row 3 from the top, column 20
    image[15, 2] -= 1.0
    scene = make_scene(10)
    scene.domain = Domain2D.for_image(20, 24)
    optimizer, state = make_adam(scene), DensificationState(10)
    some_steps(scene, optimizer, state, target)
    scene, report = by_error(image, target, scene, blend, optimizer=optimizer, growth=2.0)
    assert report == (0, 0, 0, 20, 30)
    new = slice(0, 20) if blend is Blend.OVER else slice(10, 30)  # in front, or at the end
    x, y = scene.means.detach()[new].T
    column, row = ((x + 5) / 10 * 24).long(), ((scene.domain.y_dim[1] - y) / scene.domain.height * 20).long()
    places = [tuple(p) for p in zip(row.tolist(), column.tolist())]
    assert places.count((3, 20)) == 4 and places.count((15, 2)) == 16  # squared errors 1 : 4
    colors = scene.colors.detach()[new]
    for color, (i, j) in zip(colors, places):
        torch.testing.assert_close(color, target[i, j] - image[i, j] if blend is Blend.ADDITIVE else target[i, j])
    assert (scene.opacities[new] == 0.5).all()
    assert not optimizer.state[scene.means]["exp_avg"][new].any()  # starts from zero


def test_new_gaussians_are_never_smaller_than_half_a_pixel():
    target = torch.ones(4, 4, 3)
    scene, _ = by_error(torch.zeros(4, 4, 3), target, make_scene(400), growth=0.1)
    torch.testing.assert_close(scene.scales.detach()[400:], torch.full((40, 2), 0.5 * 10 / 4))


def test_error_respects_growth_and_cap_and_seed():
    target = target_image()
    wrong = torch.zeros_like(target)
    assert by_error(wrong, target, growth=0.25)[1].n_added == 3
    assert by_error(wrong, target, max_gaussians=12)[1].n_gaussians == 12
    assert by_error(wrong, target, max_gaussians=4)[1].n_gaussians == 10  # over the cap already: no growth, no cull
    a, b, c = (by_error(wrong, target, seed=seed)[0].means for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_error_that_is_zero_or_not_finite_adds_nothing_there():
    target = target_image()
    assert by_error(target, target)[1].n_added == 0
    image = target.clone()
    image[0, 0], image[1, 1] = float("nan"), float("inf")
    assert by_error(image, target)[1].n_added == 0
    image[5, 6] += 0.1
    scene, report = by_error(image, target)
    assert report.n_added == 5 and all(getattr(scene, n).isfinite().all() for n in PARAMETER_NAMES)


def test_the_draw_matches_the_squared_error_in_the_long_run():
    target = torch.zeros(2, 3, 3)
    image = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0]])[..., None].expand(2, 3, 3)
    scene, report = by_error(image, target, make_scene(100), growth=15.0)
    x, y = scene.means.detach()[100:].T
    pixel = ((5 - y) / 10 * 2).long() * 3 + ((x + 5) / 10 * 3).long()
    expected = torch.tensor([0, 1, 4, 9, 0, 1]) / 15 * report.n_added
    assert (torch.bincount(pixel, minlength=6) - expected).abs().max() <= 1  # systematic sampling: off by one at most


# What bad input gets

@pytest.mark.parametrize("wrong", [
    dict(every_n_steps=0), dict(every_n_steps=1.5), dict(max_gaussians=0), dict(max_gaussians=True), dict(strategy="guess"),
    dict(grad_threshold=-1.0), dict(grad_threshold=float("nan")), dict(scale_threshold="big"), dict(opacity_threshold=1.5),
    dict(split_factor=1.0), dict(split_factor=math.inf), dict(clone_shift=-0.1), dict(growth=-1), dict(start_step=-1), dict(stop_fraction=2.0)])
def test_config_says_what_it_expected(wrong):
    (name, _), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: expected"):
        DensifyConfig(**wrong)


def test_config_is_frozen_takes_names_and_knows_when():
    config = DensifyConfig(every_n_steps=100, max_gaussians=500, strategy="error", start_step=150)
    assert config.strategy is DensifyStrategy.ERROR
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_gaussians = 3
    assert [step for step in range(1001) if config.is_due(step, 1000)] == [200, 300, 400, 500]
    assert DensifyConfig(**dataclasses.asdict(config)) == config


def test_densify_says_what_it_expected():
    scene, state = pulled(4)
    with pytest.raises(ValueError, match="expected the state of 4 Gaussians, got one of 3"):
        densify(scene, None, DensificationState(3), DensifyConfig())
    with pytest.raises(ValueError, match="holds none of its parameters"):
        densify(scene, make_adam(make_scene(4)), state, DensifyConfig())
    with pytest.raises(ValueError, match="got no generator, target"):
        densify(scene, None, state, DensifyConfig(strategy="error"), image=torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="of one shape"):
        densify(scene, None, state, DensifyConfig(strategy="error"), torch.Generator(), torch.zeros(2, 2, 3), torch.zeros(3, 2, 3))
    assert len(scene) == 4 and state.counts.sum() == 4  # a refused call changes nothing
