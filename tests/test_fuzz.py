"""A few hundred strange inputs for every reader: `make fuzz` tries them for ten minutes."""
import subprocess
import sys

import fuzz
import pytest


@pytest.mark.parametrize("target, count", [("scenes", 600), ("checkpoints", 250), ("pictures", 500), ("videos", 150), ("commands", 40), ("kernels", 100), ("runs", 500), ("formats", 800)])
def test_strange_input_is_read_or_clearly_refused(tmp_path, target, count):
    if target == "kernels":
        pytest.importorskip("fuzz_kernels")
    command = [sys.executable, fuzz.__file__, "--targets", target, "--count", str(count), "--processes", "1", "--out", str(tmp_path), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count:,}" in done.stdout.splitlines()[1]
