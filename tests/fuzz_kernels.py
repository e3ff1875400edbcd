"""One random extreme scene through the kernels and the reference: `one(rng)` raises AssertionError where they part.

What must hold, for any numbers whatever in a scene:

- the picture is the reference's: to rounding where that is finite, and not finite where it is not;
- a Gaussian with a number that is not finite, or too thin or too far away for float32, changes no bit of the picture,
  and gets a gradient of exactly 0;
- the others' gradients are the reference's wherever those are finite, and the reference's are finite wherever the
  picture is, unless a colour or a background is so large that sums of its products pass the largest float32.
"""
import sys

import numpy as np
import torch

from gs2d.gaussians import LARGEST, Blend, Domain2D, Gaussians2D
from gs2d.renderer import ScreenGaussians, project, rasterize, render

SIZES = [(1, 1), (1, 29), (33, 1), (2, 3), (7, 5), (16, 16), (31, 33), (40, 50)]
ODD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 1e30, -1e30, 3e38, -3e38, 1e12, 1e13, 1e-12, 1e6, -1e6]
HUGE_INK = 1e6  # beyond it, differences of sums say nothing in float32, and only pictures are compared


def sprinkle(rng: np.random.Generator, values: np.ndarray, odd: list, share: float) -> torch.Tensor:
    "Some of these numbers replaced by odd ones, as a float32 tensor."
    chosen = rng.random(values.shape) < share
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.where(chosen, rng.choice(odd, values.shape), values).astype(np.float32))


def random_scene(rng: np.random.Generator) -> tuple:
    "Five raw tensors, a domain, a blend and a background."
    n, channels = int(rng.integers(0, 12)), int(rng.choice([3, 3, 3, 1, 2, 4, 7]))
    share = rng.choice([0.0, 0.02, 0.1, 0.3])
    logs = [np.log(s) for s in (1e-30, 1e-21, 1e-19, 1e-15, 1e-9, 1e-6, 1e-3, 1e3, 1e9, 1e19, 1e30)] + [-np.inf, np.inf, np.nan]
    raw = (
        sprinkle(rng, rng.normal(0, 3, (n, 2)), [*ODD, 0.0, 0.5, 5.0, 300.0], share),
        sprinkle(rng, rng.normal(-1, 1.5, (n, 2)), logs, share),
        sprinkle(rng, rng.normal(0, 2, n), [*ODD, np.pi / 2, np.pi / 4], share),
        sprinkle(rng, rng.normal(0, 3, n), [*ODD, 100.0, -100.0], share),
        sprinkle(rng, rng.normal(0, 1, (n, channels)), ODD, share / 2))
    side = float(rng.choice([10.0, 10.0, 10.0, 1e-3, 1e4]))
    background = tuple(sprinkle(rng, rng.random(channels), [0.0, 1.0, -2.0, 1e3], share).tolist())
    return raw, Domain2D((-side / 2, side / 2), (-side / 2, side / 2)), list(Blend)[rng.integers(3)], background


def random_screen(rng: np.random.Generator) -> tuple:
    "Gaussians in pixels whose conics need not belong to any ellipse, a blend and a background."
    n, channels, share = int(rng.integers(0, 12)), int(rng.choice([3, 3, 1, 4])), rng.choice([0.02, 0.1, 0.3])
    conics = rng.normal(0, 1, (n, 3)) * 10 ** rng.uniform(-6, 1, (n, 1))
    conics[:, 0], conics[:, 2] = abs(conics[:, 0]), abs(conics[:, 2])
    if rng.random() < 0.7:  # an ellipse, a long thin one, or a line
        conics[:, 1] = np.sqrt(conics[:, 0] * conics[:, 2]) * rng.choice([0.0, 0.5, -0.99, 0.9999, -0.999999, 1.0], n)
    raw = (sprinkle(rng, rng.uniform(-20, 60, (n, 2)), ODD, share), sprinkle(rng, conics, [x for x in ODD if not x < 0], share),
           sprinkle(rng, rng.random(n), [0.0, 1.0, np.nan, np.inf], share), sprinkle(rng, rng.normal(0, 1, (n, channels)), ODD, share / 2))
    return raw, list(Blend)[rng.integers(3)], tuple(rng.random(channels).tolist())


def hidden(means, conics, opacities, colors) -> torch.Tensor:
    "(N,) bool: what must not be drawn, written down once more, and in another way."
    numbers = torch.cat([means, conics, opacities[:, None], colors], -1).double()
    geometry = numbers[:, :5].abs().amax(-1)
    return ~(numbers.sum(-1).isfinite() & (geometry <= LARGEST))


def with_gradients(draw, leaves, backend) -> tuple:
    "The picture, and the gradients of all leaves under a random wish for it."
    image = draw(leaves, backend)
    wish = torch.from_numpy(np.random.default_rng(1).normal(0, 1, image.shape)).to(image)
    return image.detach(), torch.autograd.grad(image, leaves, wish, allow_unused=True, materialize_grads=True)


def distance(a, b) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def compare(leaves, draw, gone, background, what, needles=None) -> None:
    """Draw twice, and hold pictures and gradients to each other.

    `gone`: rows that must not count. `needles`: rows so long and thin that their conic, rounded to float32, has lost
    the width; the gradients of scale and angle are finite, and no more can be asked of them.
    """
    (ours, d_ours), (theirs, d_theirs) = (with_gradients(draw, leaves, backend) for backend in ("auto", "reference"))
    kept = [leaf.detach()[~gone] for leaf in leaves]
    alone = draw(kept, "auto")
    assert torch.equal(ours.nan_to_num(7.0), alone.nan_to_num(7.0)), f"{what}: what is not drawn changes the picture"
    ink = max(1.0, *np.abs(background), *leaves[-1].detach()[~gone].abs().flatten().tolist())
    finite = theirs.isfinite() & ours.isfinite()
    if ink <= HUGE_INK:
        assert finite.all(), f"{what}: a picture that is not finite"
    worst = max([0.0, *((ours - theirs)[finite].double().abs() / ink).tolist()])
    assert worst <= 1e-5, f"{what}: pictures differ by {worst:.1e} of the ink"
    for k, (a, b) in enumerate(zip(d_ours, d_theirs)):
        for name, x in (("kernels", a), ("reference", b)):
            assert not x[gone].any(), f"{what}: a gradient of what is not drawn, input {k}, {name}: {x[gone]}"
        if ink <= HUGE_INK:
            assert a.isfinite().all(), f"{what}: a gradient that is not finite, input {k}: {a}"
            assert b.isfinite().all(), f"{what}: one of the reference, input {k}: {b}"
            if needles is not None and k in (1, 2):
                a, b = a[~needles], b[~needles]
            far, limit = distance(a, b), 2e-4 * distance(b, 0 * b) + 1e-6
            if far > limit:  # a long thin one: float32 itself leaves few digits, to both
                exact = with_gradients(draw, [leaf.detach().double().requires_grad_() for leaf in leaves], "reference")[1][k]
                exact = exact if needles is None or k not in (1, 2) else exact[~needles]
                limit += 8 * distance(b, exact)
                far = distance(a, exact)
            assert far <= limit, f"{what}: gradients of input {k} differ by {far:.1e}, expected at most {limit:.1e}"


def one(rng: np.random.Generator) -> None:
    "One scene; AssertionError where kernels and reference part. A crash is a crash."
    height, width = SIZES[rng.integers(len(SIZES))]
    if rng.random() < 0.5:
        raw, blend, background = random_screen(rng)
        leaves = [tensor.requires_grad_() for tensor in raw]
        draw = lambda leaves, backend: rasterize(ScreenGaussians(*leaves), height, width, blend, background, backend)
        compare(leaves, draw, hidden(*raw), background, f"screen {height}×{width} {blend.value}")
    else:
        raw, domain, blend, background = random_scene(rng)
        scene = Gaussians2D(*raw, domain, blend, background)
        gone = hidden(*(tensor.detach() for tensor in project(scene, height, width)))

        def draw(leaves, backend):
            made = Gaussians2D(*leaves, domain, blend, background)
            for name, leaf in zip(("means", "log_scales", "rotations", "opacity_logits", "colors"), leaves):
                delattr(made, name)
                setattr(made, name, leaf)
            return render(made, height, width, backend=backend)

        needles = (raw[1][:, 0] - raw[1][:, 1]).abs() > np.log(50)
        compare([t.requires_grad_() for t in raw], draw, gone, background, f"scene {height}×{width} {blend.value}", needles)


if __name__ == "__main__":
    first, count = (int(text) for text in (sys.argv[1:] + ["0", "1000"])[:2])
    for seed in range(first, first + count):
        try:
            one(np.random.default_rng(seed))
        except AssertionError as error:
            print(f"seed {seed}: {str(error)[:300]}")
