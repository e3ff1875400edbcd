"""Densification: what a round does to the scene, to the picture, and to every row of the optimiser."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from gs2d.densify import (
    DensificationState, DensifyConfig, ErrorGrowth, Rows, clone_offsets, densify, error_under, growth_from_dict,
    growth_to_dict, replace_rows, shared_opacity_logits, split_offsets, split_share, visible_ink)
from gs2d.gaussians import MAX_ALPHA, PARAMETER_NAMES, Blend, Domain2D, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.renderer import render
from gs2d.train import TrainConfig, make_trainer

ADAMS = [dict(), dict(foreach=True), dict(fused=True), dict(amsgrad=True)]
SUMS = [Blend.WEIGHTED, Blend.ADDITIVE]


def make_scene(n=12, seed=0, dtype=torch.float32, **look):
    "Gaussians near the middle of the picture, of middling sizes."
    g = torch.Generator().manual_seed(seed)
    return Gaussians2D(
        4 * torch.rand(n, 2, generator=g) - 2, 0.5 * torch.randn(n, 2, generator=g) - 1, torch.randn(n, generator=g),
        torch.randn(n, generator=g), torch.rand(n, 3, generator=g), **look).to(dtype)


def make_adam(scene, **options):
    groups = [{"params": [parameter], "name": name, "lr": 0.01} for name, parameter in scene.named_parameters()]
    return torch.optim.Adam(groups, **options)


def moments_of(optimizer, scene):
    "A copy of the optimiser's state, by the names of the parameters."
    return {name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
            for name, parameter in scene.named_parameters()}


def some_steps(scene, optimizer, state, target, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        image = render(scene, *target.shape[:2], backend="reference")
        (image - target).square().mean().backward()
        state.accumulate(scene.ndc_gradient(), image.detach(), target)
        optimizer.step()
    return image.detach()


def pulled(n, *, pulls=None, scene=None, seed=0):
    "A scene of n and a state in which Gaussian i is pulled by pulls[i] along x (NDC)."
    scene = make_scene(n, seed) if scene is None else scene
    state = DensificationState(n)
    pulls = torch.ones(n) if pulls is None else torch.as_tensor(pulls)
    scene.means.grad = torch.stack([pulls / (scene.domain.width / 2), torch.zeros(n)], -1).to(scene.means)
    state.accumulate(scene.ndc_gradient())
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
    for gradient in ([[1.5, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [nan, 1.0], [0.0, 0.0]],
                     [[0.5, 0.0], [math.inf, 0.0], [0.0, 0.0]]):
        scene.means.grad = torch.tensor(gradient)
        state.accumulate(scene.ndc_gradient())
    torch.testing.assert_close(state.mean_norms, torch.tensor([2.0, 6.0, 0.0]))  # ×2 along x, ×6 along y
    assert state.counts.tolist() == [2, 1, 0]
    torch.testing.assert_close(state.vectors, torch.tensor([[4.0, 0.0], [0.0, 6.0], [0.0, 0.0]]))


def test_state_goes_into_a_checkpoint_and_back():
    scene, state = pulled(4, pulls=[1.0, 2.0, 3.0, 4.0])
    other = DensificationState(9)
    other.load_state_dict({name: tensor.clone() for name, tensor in state.state_dict().items()})
    for a, b in zip(state.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    other.accumulate(scene.ndc_gradient())  # a copy: the first one must not change with it
    assert state.counts.tolist() == [1] * 4 and other.counts.tolist() == [2] * 4
    assert "generator" in state.state_dict()
    with pytest.raises(ValueError, match="norms"):
        other.load_state_dict({"counts": torch.zeros(2), "vectors": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"vectors: expected a tensor of shape \(2, 2\)"):
        other.load_state_dict({"counts": torch.zeros(2), "norms": torch.zeros(2), "vectors": torch.zeros(3, 2)})
    assert len(other) == 4  # a refused state leaves the old one


def test_state_wants_the_scene_it_was_made_for():
    with pytest.raises(ValueError, match=r"expected gradients of shape \(3, 2\), got \(4, 2\)"):
        DensificationState(3).accumulate(torch.zeros(4, 2))
    state = DensificationState(4)
    assert make_scene(4).ndc_gradient() is None
    state.accumulate(make_scene(4).ndc_gradient())  # no gradient yet: nothing to add
    assert state.counts.sum() == 0


def test_state_keeps_the_last_picture_until_the_next_step_or_round():
    scene, state = pulled(4)
    first, second, target = torch.zeros(2, 2, 3), torch.ones(2, 2, 3), torch.full((2, 2, 3), 0.5)
    state.accumulate(scene.ndc_gradient(), first, target)
    state.accumulate(scene.ndc_gradient(), second, target)
    assert state.image is second and state.target is target
    state.reset(4)
    assert state.image is None and state.target is None


def test_a_states_generator_continues_from_a_checkpoint_and_over_rounds():
    one, other = DensificationState(3, seed=5), DensificationState(3, seed=6)
    torch.rand(7, generator=one.generator)
    other.load_state_dict(one.state_dict())
    draws = [torch.rand(4, generator=state.generator) for state in (one, other)]
    assert torch.equal(*draws)
    one.reset(3)  # a round does not start it again
    assert not torch.equal(torch.rand(4, generator=one.generator), draws[0])


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**63, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_states_seed_is_checked(seed, error):
    with pytest.raises(error, match="seed: expected a whole number"):
        DensificationState(3, seed=seed)


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
    scene = Gaussians2D.from_values(
        [[0.0, 0.0]] * 3, [[2.0, 0.5]] * 3, [0.0, math.pi / 2, 0.7], [0.5] * 3, [[1.0, 1.0, 1.0]] * 3)
    offsets = clone_offsets(scene, torch.tensor([[-3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]), 0.5).detach()
    along = 1.0 * torch.tensor([math.cos(0.7), math.sin(0.7)])  # no gradient: half of 2, along the longer axis
    torch.testing.assert_close(offsets, torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.0]), along]))


def two_bells(factor, d, share):
    "A bell of standard deviation 1, and the sum of two of 1 / factor at ± d, on a line. Float64."
    x = torch.linspace(-8, 8, 3201, dtype=torch.float64)
    return torch.exp(-x**2 / 2), share * sum(torch.exp(-((x - at) * factor) ** 2 / 2) for at in (d, -d))


@pytest.mark.parametrize("factor", [1.05, 1.25, 1.6, 2.0, 2.2])
def test_no_other_place_or_share_of_the_children_is_nearer_to_the_parent(factor):
    scene = make_scene(5, dtype=torch.float64)
    d, share = (split_offsets(scene, factor).norm(dim=-1) / scene.scales.amax(-1))[0].item(), split_share(factor)
    assert d == pytest.approx(math.sqrt(2 * math.log(factor)) / factor) and share < 1

    def off(d, share):
        parent, children = two_bells(factor, d, share)
        return (parent - children).square().sum().item()

    for other, other_share in ((d + 0.01, share), (d - 0.01, share), (d, share + 0.01), (d, share - 0.01)):
        assert off(d, share) < off(other, other_share)
    parent, children = two_bells(factor, d, share)
    half_way = torch.exp(torch.tensor(-(d * factor) ** 2 / 2)).item()
    assert half_way == pytest.approx(1 / factor) and children[1600].item() == pytest.approx(2 * share / factor)
    torch.testing.assert_close(children @ children, children @ parent)  # what is left over has no parent in it


def test_children_are_never_more_opaque_than_their_parent():
    assert split_share(50.0) == 1.0 > split_share(2.2)


def test_a_share_of_an_opacity():
    o = torch.tensor([1e-6, 0.01, 0.3, 0.9, 0.999], dtype=torch.float64)
    for share in (0.25, 0.5, 0.75, 1.0):
        torch.testing.assert_close(shared_opacity_logits(o.logit(), Blend.WEIGHTED, share).sigmoid(), share * o)
    child = shared_opacity_logits(o.logit(), Blend.OVER, 0.75, 0.6).sigmoid()
    torch.testing.assert_close(1 - (1 - 0.6 * child[:4]) ** 2, 2 * 0.75 * 0.6 * o[:4])
    assert child[4] == pytest.approx(MAX_ALPHA), "nothing is more opaque than that"


@pytest.mark.parametrize("blend", Blend)
def test_error_under_is_the_weight_in_a_pixel_times_the_error_there(blend):
    scene, target = make_scene(6, blend=blend), target_image()
    image = render(scene, *target.shape[:2], backend="reference").detach()
    wrong = (image - target).square().sum(-1)
    one_at_a_time = []
    for i in range(6):
        ink = scene.clone()
        with torch.no_grad():
            ink.colors.zero_()[i] = 1
        one_at_a_time.append((render(ink, *target.shape[:2], backend="reference")[..., 0] * wrong).sum().detach())
    torch.testing.assert_close(error_under(scene, image, target), torch.stack(one_at_a_time), rtol=1e-4, atol=1e-5)
    assert scene.colors.grad is None and scene.means.grad is None
    image[2, 3] = float("nan")
    assert error_under(scene, image, target).isfinite().all()


def test_visible_ink_in_a_sum_is_opacity_times_colour():
    scene = Gaussians2D.from_values(
        [[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2, [0.0] * 2, [0.001, 0.9], [[0.0, -500.0, 0.0], [1e-4, 0.0, 0.0]])
    expected = {Blend.ADDITIVE: [True, False], Blend.OVER: [False, True], Blend.WEIGHTED: [False, True]}
    for blend, visible in expected.items():
        scene.blend = blend
        assert (visible_ink(scene) >= 0.005).tolist() == visible


# One round

@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("options", ADAMS)
def test_moments_row_by_row(options, blend):
    scene, target = make_scene(12, blend=blend), target_image()
    optimizer, state = make_adam(scene, **options), DensificationState(12)
    some_steps(scene, optimizer, state, target)
    with torch.no_grad():  # two large ones, three small ones, one too faint; the rest at rest
        scene.log_scales[:2], scene.log_scales[2:] = 0.5, -3.0
        scene.opacity_logits[5], scene.colors[5] = -20.0, 0.1
    state.reset(12)
    state.norms[:6], state.counts[:] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 9.0]), 1
    state.vectors[:, 0] = 1.0
    old = {name: getattr(scene, name).detach().clone() for name in PARAMETER_NAMES}
    moments = moments_of(optimizer, scene)

    report = densify(scene, optimizer, state, DensifyConfig(scale_threshold=0.05))
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
        new = optimizer.state[getattr(scene, name)]
        group = next(group for group in optimizer.param_groups if group["name"] == name)
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

    some_steps(scene, optimizer, state, target, n=2)  # training goes on, from the new parameters
    assert optimizer.state[scene.means]["step"] == 5
    assert all(getattr(scene, name).isfinite().all() for name in PARAMETER_NAMES)
    assert not torch.equal(scene.means.detach()[untouched], old["means"][6:])


@pytest.mark.parametrize("blend", SUMS)
def test_a_clone_in_place_does_not_change_a_sum(blend):
    scene, state = pulled(8, scene=make_scene(8, blend=blend))
    before = render(scene, 30, 30, blend, backend="reference").detach()
    assert densify(scene, None, state, DensifyConfig(scale_threshold=1, clone_shift=0, growth=1)).n_cloned == 8
    torch.testing.assert_close(render(scene, 30, 30, blend, backend="reference"), before, rtol=1e-5, atol=1e-5)


def test_a_clone_in_place_does_not_change_the_centre_under_over():
    scene = Gaussians2D.from_values([[0.0, 0.0]], [[1.0, 1.0]], [0.0], [0.8], [[1.0, 0.5, 0.2]], blend=Blend.OVER)
    _, state = pulled(1, scene=scene)
    before = render(scene, 31, 31, Blend.OVER, backend="reference")[15, 15].detach()
    densify(scene, None, state, DensifyConfig(scale_threshold=1, clone_shift=0))
    torch.testing.assert_close(render(scene, 31, 31, Blend.OVER, backend="reference")[15, 15], before)


def test_an_exact_clone_stays_and_a_nudged_one_leaves():
    truth = Gaussians2D.from_values(
        [[-1.5, 0.0], [1.5, 0.4]], [[0.75, 0.75]] * 2, [0.0] * 2, [0.95] * 2, [[1.0, 0.6, 0.1], [0.1, 0.5, 1.0]])
    target = render(truth, 24, 24, Blend.ADDITIVE).detach()
    apart = {}
    for shift in (0.0, 0.5):
        scene = Gaussians2D.from_values([[0.3, 0.1]], [[1.2, 1.2]], [0.0], [0.5], [[0.5, 0.5, 0.5]], blend="additive")
        optimizer, state = make_adam(scene), DensificationState(1)
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        some_steps(scene, optimizer, state, target, 30)
        densify(scene, optimizer, state, DensifyConfig(scale_threshold=1, clone_shift=shift, grad_threshold=0))
        some_steps(scene, optimizer, state, target, 80)
        apart[shift] = (scene.means[0] - scene.means[1]).norm().item()
    assert apart[0.0] < 1e-2 and apart[0.5] > 1.0  # rounding alone must not part them, a nudge must


def test_the_cap_is_hard_and_takes_the_hardest_pulled_first():
    for cap in (1, 12, 15, 24, 100):
        scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
        config = DensifyConfig(max_gaussians=cap, scale_threshold=1, opacity_threshold=0, growth=1)
        report = densify(scene, make_adam(scene), state, config)
        assert report.n_gaussians == len(scene) == max(12, min(cap, 24)) and report.n_pruned == 0
    scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
    colors = scene.colors.detach().clone()
    densify(scene, None, state, DensifyConfig(max_gaussians=14, scale_threshold=1, opacity_threshold=0))
    assert sorted(find(scene.colors.detach()[12:], colors)) == [10, 11]
    scene, state = pulled(12)  # ties: the first rows
    densify(scene, None, state, DensifyConfig(max_gaussians=14, scale_threshold=1, opacity_threshold=0))
    assert find(scene.colors.detach()[12:], colors) == [0, 1]


def test_a_round_grows_by_a_fraction_at_most_hardest_pulled_first():
    for growth, n in ((0.5, 18), (0.3, 16), (0, 12), (5, 24)):
        scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
        assert densify(scene, None, state, DensifyConfig(growth=growth, opacity_threshold=0)).n_gaussians == n
    scene, state = pulled(12, pulls=torch.arange(1.0, 13.0))
    colors = scene.colors.detach().clone()
    densify(scene, None, state, DensifyConfig(growth=0.25, scale_threshold=1, opacity_threshold=0))
    assert sorted(find(scene.colors.detach()[12:], colors)) == [9, 10, 11]


@pytest.mark.parametrize("blend", Blend)
def test_where_the_picture_is_known_those_over_the_most_error_come_first(blend):
    scene = Gaussians2D.from_values(
        [[-3.0, -3.0], [3.0, -3.0], [-3.0, 3.0], [3.0, 3.0]], [[0.8, 0.8]] * 4, [0.0] * 4, [0.8] * 4,
        [[0.2, 0.4, 0.6], [0.3, 0.4, 0.6], [0.4, 0.4, 0.6], [0.5, 0.4, 0.6]], blend=blend)
    colors, image = scene.colors.detach().clone(), render(scene, 32, 32).detach()
    target = image.clone()
    target[:16, :16] += 0.3  # the third one is up there on the left
    target[16:, 16:] += 0.1
    config = DensifyConfig(scale_threshold=1, max_gaussians=5)
    for pulls, expected in (([9.0, 5.0, 1.0, 2.0], 2), ([9.0, 5.0, 1e-5, 2.0], 1)):  # it must be pulled, though
        grown, state = pulled(4, pulls=pulls, scene=scene.clone())
        state.image, state.target = image, target
        densify(grown, None, state, config)
        copies = find(grown.colors.detach(), colors)
        assert copies.count(expected) == 2 and len(copies) == 5
    grown, state = pulled(4, pulls=[9.0, 5.0, 1.0, 2.0], scene=scene.clone())  # no picture: the pull decides
    densify(grown, None, state, config)
    assert find(grown.colors.detach(), colors).count(0) == 2


def old_split(scene):
    "The rule this package had: both axes shrink, the variance along the longer one stays, so does the opacity."
    axis = scene.axes().detach().gather(-1, scene.scales.argmax(-1)[:, None, None].expand(-1, 2, 1))[..., 0]
    offset = axis * math.sqrt(1 - 1 / 1.6**2)
    rows = [torch.cat([p, p]).detach() for p in scene.parameters()]
    rows[0], rows[1] = rows[0] + torch.cat([offset, -offset]), rows[1] - math.log(1.6)
    order = torch.arange(len(scene)).repeat(2).argsort(stable=True)
    return Gaussians2D(*(row[order] for row in rows), domain=scene.domain, blend=scene.blend)


@pytest.mark.parametrize("blend", Blend)
def test_a_split_keeps_light_and_norm_better_than_the_old_rule(blend):
    alone = Gaussians2D.from_values([[0.1, -0.2]], [[1.6, 0.7]], [0.4], [0.6], [[1.0, 0.7, 0.4]], blend=blend)
    for scene in (alone, GroundTruth.random(20, 96, 96, seed=1, blend=blend).scene):
        after = {}
        for factor in (1.6, DensifyConfig.split_factor):
            after[factor], state = pulled(len(scene), scene=scene.clone())
            config = DensifyConfig(scale_threshold=0, growth=1, split_factor=factor)
            assert densify(after[factor], None, state, config).n_split == len(scene) == len(after[factor]) / 2
        before, old, same_factor, new = (render(s, 96, 96, backend="reference").detach()
                                         for s in (scene, old_split(scene), *after.values()))
        change, change_same, change_old = (
            ((image - before).norm() / before.norm()).item() for image in (new, same_factor, old))
        assert change < 0.85 * change_old and change_same < 0.6 * change_old
        light, light_same, light_old = ((image.sum() / before.sum()).item() for image in (new, same_factor, old))
        assert abs(1 - light_same) < abs(1 - light_old) and abs(1 - light) < abs(1 - light_old)
        if blend is Blend.ADDITIVE:
            assert light_old == pytest.approx(2 / 1.6**2, abs=0.02)  # a fifth of the light is lost
            assert light_same == pytest.approx(2 * split_share(1.6) / 1.6, abs=0.015)
            assert light == pytest.approx(split_share(2), abs=0.015)
            assert change_same < 0.1 and change < 0.2 and change_old > 0.3
            norm, norm_old = (image.norm() / before.norm() for image in (new, old))
            assert abs(1 - norm) < abs(1 - norm_old)


def test_a_clone_changes_a_sum_to_second_order_only():
    scene = GroundTruth.random(20, 48, 48, seed=1, blend=Blend.ADDITIVE).scene.double()
    before, changes = render(scene, 48, 48, backend="reference").detach(), {}
    for shift in (0.2, 0.4):
        after, state = pulled(20, scene=scene.clone())
        densify(after, None, state, DensifyConfig(scale_threshold=1, clone_shift=shift, growth=1))
        changes[shift] = (render(after, 48, 48, backend="reference").detach() - before).norm().item()
    assert changes[0.4] == pytest.approx(4 * changes[0.2], rel=0.15) and changes[0.4] < 0.02 * before.norm()


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
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in scene.parameters() if p.requires_grad]


def test_float64_and_an_empty_scene():
    scene, state = pulled(4, scene=make_scene(4, dtype=torch.float64))
    densify(scene, None, state, DensifyConfig())
    assert all(getattr(scene, name).dtype == torch.float64 for name in PARAMETER_NAMES)
    empty = Gaussians2D(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0), torch.zeros(0), torch.zeros(0, 3))
    for config in (DensifyConfig(), ErrorGrowth()):
        state = DensificationState(0)
        state.accumulate(None, torch.zeros(4, 4, 3), torch.ones(4, 4, 3))
        assert densify(empty, None, state, config) == (0, 0, 0, 0, 0)


# Growing where the error is

def by_error(image, target, scene=None, seed=0, optimizer=None, rounds=1, **config):
    scene = make_scene(10) if scene is None else scene
    state = DensificationState(len(scene), seed=seed)
    state.accumulate(None, image, target)
    return scene, densify(scene, optimizer, state, ErrorGrowth(opacity_threshold=0, **config), rounds)


@pytest.mark.parametrize("blend", Blend)
def test_new_gaussians_stand_on_the_wrong_pixels(blend):
    target, image = target_image(), target_image()
    image[3, 20] += 0.5  # row 3 from the top, column 20
    image[15, 2] -= 1.0
    scene = make_scene(10, domain=Domain2D.for_image(20, 24), blend=blend)
    optimizer, state = make_adam(scene), DensificationState(10)
    some_steps(scene, optimizer, state, target)
    scene, report = by_error(image, target, scene, optimizer=optimizer, growth=2.0)
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


def test_missed_rounds_are_made_up_for_in_one():
    target = target_image()
    wrong = torch.zeros_like(target)
    assert by_error(wrong, target, growth=0.5, rounds=3)[1].n_added == math.ceil((1.5**3 - 1) * 10)
    assert by_error(wrong, target, growth=0.5, rounds=3, max_gaussians=15)[1].n_gaussians == 15


# When a round is due

def rounds_of(config, places):
    "What `rounds_due` says along a run with these values of progress, from 0 to the last of them."
    befores = [0.0, *places[:-1]]
    return [config.rounds_due(step, before, after) for step, (before, after) in enumerate(zip(befores, places), 1)]


@pytest.mark.parametrize("rounds, stop", [(1, 1.0), (8, 0.5), (16, 0.5), (7, 0.3), (3, 1.0), (100, 0.9), (12, 1 / 3)])
def test_every_round_by_error_comes_exactly_once(rounds, stop):
    config, generator = ErrorGrowth(rounds=rounds, stop_fraction=stop), np.random.default_rng(rounds)
    runs = [[step / n for step in range(1, n + 1)] for n in (1, 2, 3, 7, 10, 49, 60, 1000)]
    for n in (1, 5, 50, 500):  # what a clock may do: fast and slow steps, and a last one that goes past the end
        runs.append([*np.sort(generator.random(n)).tolist(), 1.0])
        runs.append(np.minimum(1.0, generator.exponential(1 / n, 20 * n + 20).cumsum()).tolist() + [1.0])
    for places in runs:
        due = rounds_of(config, places)
        assert sum(due) == rounds, "missed ones are counted in the step that passed them"
        assert all(n == 0 for n, before in zip(due[1:], places) if before >= stop)
        for n, before, after in zip(due, [0.0, *places[:-1]], places):
            # the k-th round stands at k / rounds of the growing part; if it falls on a step's end, it is that step's
            inside = [k for k in range(1, rounds + 1) if before + 1e-9 < k / rounds * stop <= after + 1e-9]
            assert n == len(inside)


def test_rounds_by_error_are_spread_evenly():
    config = ErrorGrowth(rounds=5, stop_fraction=0.5)
    due = rounds_of(config, [step / 100 for step in range(1, 101)])
    assert [step for step, n in enumerate(due, 1) if n] == [10, 20, 30, 40, 50] and max(due) == 1
    assert rounds_of(config, [0.04, 0.1, 0.35, 0.36, 1.0]) == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("stop, n", [(0.57, 100), (0.29, 100), (0.7, 10), (0.1, 30), (0.5, 1000)])
def test_the_last_round_by_gradient_may_fall_on_the_stop(stop, n):
    due = rounds_of(DensifyConfig(every_n_steps=1, stop_fraction=stop), [step / n for step in range(1, n + 1)])
    assert sum(due) == round(stop * n) and set(due) == {0, 1}


def test_how_many_to_start_with():
    assert DensifyConfig().n_start(17) == 17 == ErrorGrowth().n_start(17)
    assert [ErrorGrowth(start_share=0.2).n_start(n) for n in (1, 5, 6, 100)] == [1, 1, 2, 20]


# Any module that has a row per Gaussian

class Gaussians3D(torch.nn.Module):
    "As little as `densify` asks for, in three dimensions: its parameters have other shapes than those of Gaussians2D."

    def __init__(self, n, seed=0, blend=Blend.WEIGHTED):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = dict(means=(n, 3), log_scales=(n, 3), rotations=(n, 4), opacity_logits=(n,), colors=(n, 2, 3))
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=g)))
        self.blend, self.extent = blend, 10.0

    def __len__(self):
        return len(self.means)

    @property
    def scales(self):
        return self.log_scales.exp()

    @property
    def opacities(self):
        return self.opacity_logits.sigmoid()

    def axes(self):
        w, x, y, z = (self.rotations / self.rotations.norm(dim=1, keepdim=True)).unbind(1)
        rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        return torch.stack(rows, -1).reshape(-1, 3, 3) * self.scales[:, None, :]

    def ndc_directions(self, gradients):
        return torch.zeros(len(gradients), 3)


@pytest.mark.parametrize("blend", [Blend.WEIGHTED, Blend.OVER])
def test_a_three_dimensional_module_is_cloned_split_and_pruned(blend):
    scene, state = Gaussians3D(7, blend=blend), DensificationState(7)
    names = [name for name, _ in scene.named_parameters()]
    optimizer = make_adam(scene)
    sum(parameter.square().sum() for parameter in scene.parameters()).backward()
    optimizer.step()
    with torch.no_grad():  # 0 is split, 1 is cloned, 2 pruned; of 3 to 6 nothing is asked
        scene.log_scales[0], scene.log_scales[1:] = torch.tensor([0.1, 0.9, 0.3]), -4.0
        scene.opacity_logits[:], scene.opacity_logits[2] = 0.5, -20.0
    state.accumulate(torch.tensor([[1.0, 0.0], [0.5, 0.5]] + [[0.0, 0.0]] * 5))
    old = {name: getattr(scene, name).detach().clone() for name in names}
    moments = moments_of(optimizer, scene)
    along = (scene.axes()[0, :, 1] / scene.scales[0, 1]).detach()

    assert densify(scene, optimizer, state, DensifyConfig(scale_threshold=0.05)) == (1, 1, 1, 0, 8)
    source = [0, 0, 1, 1, 3, 4, 5, 6] if blend is Blend.OVER else [1, 3, 4, 5, 6, 1, 0, 0]
    copies, children = ([3], [0, 1]) if blend is Blend.OVER else ([5], [6, 7])
    assert [(old["rotations"] == row).all(1).nonzero().item() for row in scene.rotations] == source
    for name in names:
        parameter = getattr(scene, name)
        assert isinstance(parameter, torch.nn.Parameter) and parameter.shape == (8, *old[name].shape[1:])
        new = optimizer.state[parameter]
        assert new["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            assert moments[name][key].any()
            for row, parent in enumerate(source):
                expected = moments[name][key][parent]
                assert torch.equal(new[key][row], torch.zeros_like(expected) if row in children else expected)
        untouched = [row for row, parent in enumerate(source) if parent > 2]
        assert torch.equal(parameter.detach()[untouched], old[name][3:])
    assert len(optimizer.state) == len(names)
    apart = math.exp(0.9) * math.sqrt(2 * math.log(2)) / 2  # along the second axis, which is the longest
    pair = torch.stack([apart * along, -apart * along])
    torch.testing.assert_close(scene.means.detach()[children], old["means"][0] + pair)
    smaller = old["log_scales"][0] - math.log(2) * torch.tensor([0.0, 1.0, 0.0])  # only this axis shrinks
    torch.testing.assert_close(scene.log_scales.detach()[children], smaller.expand(2, 3))
    twins = [source.index(1), copies[0]]
    assert torch.equal(scene.log_scales[twins[0]], scene.log_scales[twins[1]])
    assert (scene.means[twins[0]] - scene.means[twins[1]]).norm().item() == pytest.approx(
        0.5 * math.exp(-4.0), rel=1e-4), "no gradient to follow: half a standard deviation, along the longest axis"
    torch.testing.assert_close(scene.means[twins].mean(0).detach(), old["means"][1])
    sum(parameter.square().sum() for parameter in scene.parameters()).backward()
    optimizer.step()  # and training goes on
    assert optimizer.state[scene.means]["step"] == 2


def test_replace_rows_takes_any_parameters_and_any_number_of_groups():
    module = torch.nn.Module()
    module.weights, module.codes = (torch.nn.Parameter(torch.arange(n).reshape(shape) + 1.0)
                                    for n, shape in ((3, (3,)), (18, (3, 2, 3))))
    module.codes.requires_grad_(False)
    optimizer = torch.optim.Adam(list(module.parameters()))
    module.weights.square().sum().backward()
    optimizer.step()
    before = optimizer.state[module.weights]["exp_avg"].clone()
    source, fresh = torch.tensor([2, 0, -1, 2]), torch.tensor([False, False, True, True])
    values = {"weights": torch.arange(4.0), "codes": torch.arange(24.0).reshape(4, 2, 3)}
    replace_rows(module, optimizer, Rows(values, source, fresh))
    assert torch.equal(module.weights, values["weights"]) and torch.equal(module.codes, values["codes"])
    assert module.weights.requires_grad and not module.codes.requires_grad
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(module.weights), id(module.codes)]
    assert torch.equal(optimizer.state[module.weights]["exp_avg"], torch.stack([before[2], before[0], *torch.zeros(2)]))
    replace_rows(module, None, Rows(values, source, fresh))  # without an optimiser too


# What bad input gets

@pytest.mark.parametrize("kind, wrong, error", [
    (DensifyConfig, dict(every_n_steps=0), ValueError), (DensifyConfig, dict(every_n_steps=1.5), TypeError),
    (DensifyConfig, dict(max_gaussians=0), ValueError), (DensifyConfig, dict(max_gaussians=True), TypeError),
    (DensifyConfig, dict(max_gaussians=np.True_), TypeError), (DensifyConfig, dict(start_step=False), TypeError),
    (DensifyConfig, dict(grad_threshold=-1.0), ValueError), (DensifyConfig, dict(grad_threshold=math.nan), ValueError),
    (DensifyConfig, dict(scale_threshold="big"), TypeError), (DensifyConfig, dict(opacity_threshold=1.5), ValueError),
    (DensifyConfig, dict(split_factor=1.0), ValueError), (DensifyConfig, dict(split_factor=math.inf), ValueError),
    (DensifyConfig, dict(clone_shift=-0.1), ValueError), (DensifyConfig, dict(clone_shift=True), TypeError),
    (DensifyConfig, dict(growth=-0.1), ValueError), (DensifyConfig, dict(growth=math.inf), ValueError),
    (DensifyConfig, dict(start_step=-1), ValueError), (DensifyConfig, dict(stop_fraction=2.0), ValueError),
    (ErrorGrowth, dict(growth=-1), ValueError), (ErrorGrowth, dict(growth=math.inf), ValueError),
    (ErrorGrowth, dict(max_gaussians=0), ValueError), (ErrorGrowth, dict(max_gaussians=True), TypeError),
    (ErrorGrowth, dict(rounds=0), ValueError), (ErrorGrowth, dict(rounds=2.0), TypeError),
    (ErrorGrowth, dict(rounds=np.bool_(True)), TypeError), (ErrorGrowth, dict(start_share=0), ValueError),
    (ErrorGrowth, dict(start_share=1.5), ValueError), (ErrorGrowth, dict(stop_fraction=0), ValueError),
    (ErrorGrowth, dict(stop_fraction="half"), TypeError), (ErrorGrowth, dict(opacity_threshold=-0.1), ValueError)])
def test_config_says_what_it_expected(kind, wrong, error):
    (name, _), = wrong.items()
    with pytest.raises(error, match=f"^{name}: expected"):
        kind(**wrong)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_numbers_are_numbers(integer):
    whole = dict(every_n_steps=integer(7), max_gaussians=integer(90), start_step=integer(3))
    config = DensifyConfig(**whole, split_factor=np.float32(2))
    assert config == DensifyConfig(every_n_steps=7, max_gaussians=90, start_step=3, split_factor=2.0)
    growth = ErrorGrowth(max_gaussians=integer(90), rounds=integer(4), growth=np.float64(0.25))
    assert growth == ErrorGrowth(max_gaussians=90, rounds=4, growth=0.25)
    for each in (config, growth):
        assert all(type(value) in (int, float) for value in dataclasses.asdict(each).values())


def test_config_is_frozen_and_knows_when():
    config = DensifyConfig(every_n_steps=100, max_gaussians=500, start_step=150)
    for frozen in (config, ErrorGrowth()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.max_gaussians = 3
    due = [step for step in range(1, 1001) if config.rounds_due(step, (step - 1) / 1000, step / 1000)]
    assert due == [200, 300, 400, 500] and config.rounds_due(0, 0.0, 0.0) == 0
    assert DensifyConfig(**dataclasses.asdict(config)) == config


def test_strategies_have_names_in_files():
    gradient, error = DensifyConfig(every_n_steps=9), ErrorGrowth(rounds=3, start_share=0.25)
    for name, config in {"gradient": gradient, "error": error}.items():
        plain = growth_to_dict(config)
        assert plain["strategy"] == name and growth_from_dict(plain) == config
    assert growth_from_dict({"every_n_steps": 9}) == gradient
    with pytest.raises(ValueError, match="strategy: expected one of 'gradient', 'error', got 'guess'"):
        growth_from_dict({"strategy": "guess"})


def test_densify_says_what_it_expected():
    scene, state = pulled(4)
    with pytest.raises(ValueError, match="expected the state of 4 Gaussians, got one of 3"):
        densify(scene, None, DensificationState(3), DensifyConfig())
    with pytest.raises(ValueError, match="holds none of its parameters"):
        densify(scene, make_adam(make_scene(4)), state, DensifyConfig())
    for image, target in ((None, None), (torch.zeros(2, 2, 3), None), (None, torch.zeros(2, 2, 3))):
        state.image, state.target = image, target
        with pytest.raises(ValueError, match="expected a state with image and target .* got one without"):
            densify(scene, None, state, ErrorGrowth())
    state.image, state.target = torch.zeros(2, 2, 3), torch.zeros(3, 2, 3)
    with pytest.raises(ValueError, match="of one shape"):
        densify(scene, None, state, ErrorGrowth())
    assert len(scene) == 4 and state.counts.sum() == 4  # a refused call changes nothing


@pytest.mark.parametrize("growth", [1e300, 1.7e308])
@pytest.mark.parametrize("rounds", [1, 3, 400])
def test_a_growth_beyond_all_numbers_stops_at_the_most_there_may_be(growth, rounds):
    truth = GroundTruth.random(5, 16, 16)
    config = TrainConfig(n_gaussians=5, height=16, width=16, n_iterations=rounds + 1, device="cpu",
                         densify=ErrorGrowth(max_gaussians=9, growth=growth, rounds=rounds))
    trainer = make_trainer(config, ground_truth=truth)
    list(trainer)
    assert len(trainer.scene) == 9
    list(make_trainer(dataclasses.replace(config, densify=DensifyConfig(growth=growth, every_n_steps=1)), ground_truth=truth))
