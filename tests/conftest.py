"""What all tests share: no display, the same examples in every run, and a scene and a picture to try things on."""
import os
import signal

import hypothesis
import numpy as np

os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background: some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("SIGTERM", "SIGHUP"):  # as under nohup: some tests close terminals
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)

# Compiling a kernel takes seconds, so no deadline for an example; and what passes today must not fail tomorrow by chance.
hypothesis.settings.register_profile("gs2d", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gs2d")

from gs2d.gaussians import Domain2D, Gaussians2D  # noqa: E402  (after the environment above)

import torch  # noqa: E402  isort: skip  (after gs2d, which says how OpenMP's threads wait)


def make_scene(n=7, seed=0, domain=Domain2D(), channels=3, **look):
    "A scene of n random Gaussians."
    g = torch.Generator().manual_seed(seed)
    return Gaussians2D(
        4 * torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), 3 * torch.randn(n, generator=g),
        2 * torch.randn(n, generator=g), torch.randn(n, channels, generator=g), domain, **look)


def colors(height=6, width=8, channels=3, seed=0):
    "A random picture of 8 bits."
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth_picture(height=20, width=26, seed=0):
    "(H, W, 3) a smooth random picture in [0, 1]."
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0).contiguous()
