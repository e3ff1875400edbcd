"""What all tests share: no display, and the same examples in every run."""
import os

import hypothesis

os.environ.setdefault("MPLBACKEND", "Agg")

# Compiling a kernel takes seconds, so no deadline for an example; and what passes today must not fail tomorrow by chance.
hypothesis.settings.register_profile("gs2d", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gs2d")
