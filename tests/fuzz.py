"""Strange input for everything that reads: `make fuzz`, or `python tests/fuzz.py --minutes 10`.

Files of every format are broken at random, byte by byte and value by value, and handed to the readers, in processes of their own, one for
each core. An input may be read, or refused: with ValueError, TypeError or FileNotFoundError and one short line. Anything else is an unclear
ending: another error, a message that fills the screen, a crash, a hang (SECONDS for an input), or memory beyond the bound (MEMORY more than
the idle process has). What was read must also be of use: a scene has finite numbers and can be saved and read again, a checkpoint trains two
steps, a picture has numbers from 0 to 1. An input with an unclear ending is kept in fuzz-out/, and the exit status is 1.

The same --seed gives the same inputs. Kernels are tried by tests/fuzz_kernels.py, which says there what must hold.
"""
import argparse
import copy
import functools
import importlib.util
import io
import json
import math
import os
import queue
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

SECONDS = 20  # for one input
MEMORY = 2 * 2**30  # bytes that a process may take on top of what it has when it is idle
PIXELS = 4_000_000  # the limit of pictures here, so that the bound on memory is one: 48 bytes a pixel, or so, are needed
LONGEST = 300  # characters of a message, on top of the paths in it
HERE = Path(__file__).resolve().parent
CLEAR = (ValueError, TypeError, FileNotFoundError)


# ── ways to break something ───────────────────────────────────────────────────

TOKENS = [b"NaN", b"-Infinity", b"1e999", b"-1e39", b"null", b"true", b"{}", b"[]", b'""', b"9" * 400, b"0", b"-1", b"1e-320", b"[" * 3000, b"\xff", b"\0" * 8,
          b"\xff" * 8, b"\x7f\xff\xff\xff", b"\\ud800", b',"N":7', b"1000000000"]


def broken_bytes(rng, data: bytes) -> bytes:
    "The same bytes after one to six accidents."
    data = bytearray(data)
    for _ in range(rng.integers(1, 7)):
        n = max(1, len(data))
        at, end = sorted(rng.integers(0, n + 1, 2).tolist())
        end = min(end, at + int(rng.choice([1, 2, 4, 16, 256])))
        what = rng.integers(8)
        if what == 0:
            data[at:end] = rng.bytes(end - at)
        elif what == 1 and data:
            data[min(at, n - 1)] ^= 1 << int(rng.integers(8))
        elif what == 2:
            del data[at:end]
        elif what == 3:
            data[at:at] = data[at:end]
        elif what == 4:
            del data[at:]
        elif what == 5:
            data[at:end] = TOKENS[rng.integers(len(TOKENS))]
        elif what == 6 and n > 8:  # a length or an offset
            size, kind = (4, "I") if rng.random() < 0.7 else (2, "H")
            value = int(rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])) % 2 ** (8 * size)
            data[at : at + size] = struct.pack(rng.choice([">", "<"]) + kind, value)
        else:
            other = int(rng.integers(0, n + 1))
            data[at:end] = data[other : other + end - at]
    return bytes(data)


ODD_NUMBERS = [0, -0.0, 1, -1, 2, 7.5, True, math.nan, math.inf, -math.inf, 1e38, 1e39, -1e39, 1e308, 1e-45, 1e-310, 2**31, 2**63, 10**30, 10**400, -(10**400)]
ODD_WORDS = ["", "additive", "over", "weighted", "gs2d-scene", "cpu", "auto", "l1", "random", "\ud800", "ü\n\x1b[2J", "x" * 3000, "7", "None"]


def odd_value(rng, depth: int = 0):
    "Anything that JSON can hold."
    kind = rng.integers(0, 10 if depth < 4 else 7)
    if kind < 3:
        return ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
    if kind < 5:
        return float(rng.normal() * 10.0 ** rng.integers(-3, 4))
    if kind == 5:
        return ODD_WORDS[rng.integers(len(ODD_WORDS))]
    if kind == 6:
        return None
    if kind == 7:
        return {ODD_WORDS[rng.integers(len(ODD_WORDS))]: odd_value(rng, depth + 1) for _ in range(rng.integers(0, 4))}
    return [odd_value(rng, depth + 1) for _ in range(int(rng.choice([0, 1, 2, 3, 4, 40])))]


def places(value, at=()):
    "The ways to every value inside a document."
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*at, key))


def broken_document(rng, document):
    "The same document with one to three values replaced, taken away, doubled or moved."
    document = copy.deepcopy(document)
    for _ in range(rng.integers(1, 4)):
        ways = [way for way in places(document) if way]
        if not ways:
            return odd_value(rng)
        *way, last = ways[rng.integers(len(ways))]
        inside = functools.reduce(lambda value, key: value[key], way, document)
        what = rng.integers(6)
        if what == 0:
            del inside[last]
        elif what == 1 and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[last]))
        elif what == 2 and isinstance(inside[last], (int, float)):
            number = inside[last]
            inside[last] = [str(number), [number], -number, number * 1e30 if abs(number) < 1e9 else 0, number + 1, bool(number), int(number) if number == number
                            and abs(number) < 1e300 else 0][rng.integers(7)]
        elif what == 3:
            other = ways[rng.integers(len(ways))]
            try:
                inside[last] = copy.deepcopy(functools.reduce(lambda value, key: value[key], other, document))
            except (LookupError, TypeError):  # it was inside of what has changed
                inside[last] = None
        else:
            inside[last] = odd_value(rng)
    return document


def text_of(rng, document) -> bytes:
    "JSON, sometimes in another encoding."
    text = json.dumps(document, ensure_ascii=bool(rng.random() < 0.9))
    return text.encode(rng.choice(["utf-8", "utf-16", "utf-8-sig"], p=[0.96, 0.02, 0.02]), "surrogatepass")


# ── scenes ────────────────────────────────────────────────────────────────────

class Scenes:
    "JSON scene files, through Gaussians2D.load."

    def __init__(self, folder: Path):
        sys.path.insert(0, str(HERE))
        from conftest import make_scene

        from gs2d.gaussians import Gaussians2D

        self.load, self.sources = Gaussians2D.load, []
        for n, channels, look in ((0, 3, {}), (1, 1, {}), (3, 3, dict(blend="over")), (2, 4, dict(blend="additive", background=(0.1, 0.2, 0.3, 0.4)))):
            self.sources.append(make_scene(n, channels=channels, **look).save(folder / "source.json", 4, 5).read_bytes())
        flat = json.loads(self.sources[2])
        for key in ("format", "version", "blend", "background", "opacities", "colors"):
            del flat[key]
        self.sources += [json.dumps(flat).encode(), self.sources[2].replace(b'"version": 2', b'"version": 1')]

    def input(self, rng, folder: Path) -> None:
        source = self.sources[rng.integers(len(self.sources))]
        what = rng.random()
        if what < 0.4:
            data = broken_bytes(rng, source)
        elif what < 0.9:
            data = text_of(rng, broken_document(rng, json.loads(source)))
        else:
            keys = list(json.loads(self.sources[2]))
            data = text_of(rng, {key: odd_value(rng) for key in keys if rng.random() < 0.9} if rng.random() < 0.8 else odd_value(rng))
        (folder / "input.json").write_bytes(data)

    def use(self, folder: Path) -> None:
        scene = self.load(folder / "input.json")
        assert all(values.isfinite().all() for values in scene.parameters()), "a scene with numbers that are not finite"
        again = self.load(scene.save(folder / "again.json"))
        assert all((a == b).all() for a, b in zip((again.means, again.scales, again.colors), (scene.means, scene.scales, scene.colors))), "not as it was saved"


class Formats:
    "Scenes in the other formats that can be read, through Gaussians2D.load."

    def __init__(self, folder: Path):
        sys.path.insert(0, str(HERE))
        from conftest import make_scene

        from gs2d.gaussians import Gaussians2D

        self.load, self.sources, rng = Gaussians2D.load, [], np.random.default_rng(0)
        for suffix in (".safetensors", ".ply"):
            for n, channels, look in ((0, 3, {}), (1, 1, {}), (3, 3, dict(blend="over")), (2, 4, dict(blend="additive", background=(0.1, 0.2, 0.3, 0.4)))):
                self.sources.append((suffix, make_scene(n, channels=channels, **look).save(folder / f"source{suffix}", 4, 5).read_bytes()))
                page = make_scene(n, channels=channels, **look).save(folder / "source.html", 4, 5).read_bytes()
                self.sources.append((".html", page[page.index(b'<script type="application/json"'):page.index(b"</script>") + 9]))
        self.arrays = dict(xyz=rng.uniform(-1, 1, (4, 2)), scaling=rng.uniform(1, 3, (4, 2)), rotation=rng.uniform(0, 6, (4, 1)), color=rng.random((4, 3)), resolution=np.array([6, 5]))
        for save in (np.savez, np.savez_compressed):
            save(folder / "source.npz", **self.arrays)
            self.sources.append((".npz", (folder / "source.npz").read_bytes()))

    def broken_arrays(self, rng) -> bytes:
        "The arrays of a model with one or two of them changed, in a whole archive."
        arrays = dict(self.arrays)
        for _ in range(rng.integers(1, 3)):
            name = list(arrays)[rng.integers(len(arrays))]
            array, what = arrays[name], rng.integers(6)
            if array.dtype.kind in "US":  # text stays
                continue
            if what == 0:
                del arrays[name]
                break
            kinds = ["?", "u1", "<i2", ">i4", "f2", ">f4", "g", "c8", "U3", "S9"]
            with np.errstate(all="ignore"):
                numbers = array.astype("f8") * 10.0 ** rng.integers(-50, 50) if array.dtype.kind in "fiu" else array
                arrays[name] = [array[:-1], array[None], array.T, np.resize(array, (4, 2)), array.astype(kinds[rng.integers(len(kinds))]), numbers][what]
        for name, array in arrays.items():
            if rng.random() < 0.2 and array.dtype.kind == "f" and array.size:
                with np.errstate(all="ignore"):
                    arrays[name] = array = array.copy()
                    array.flat[rng.integers(array.size)] = float(ODD_NUMBERS[rng.integers(len(ODD_NUMBERS) - 2)])
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def broken_json(self, rng, data: bytes) -> bytes:
        "The same file with other values in the line of JSON that says how the scene looks."
        start = data.index(b"{", data.index(b"gs2d-scene"))
        end = data.index(b"}", start) + 1
        escaped = b'{\\"' in data[start:end]
        look = json.loads(data[start:end].replace(b'\\"', b'"'))
        text = json.dumps(broken_document(rng, look)).encode()
        text = text.replace(b"\\", b"\\\\").replace(b'"', b'\\"') if escaped else text
        changed = data[:start] + text + data[end:]
        if escaped:  # in a header with a length
            length = int.from_bytes(data[:8], "little") + len(changed) - len(data)
            changed = length.to_bytes(8, "little") + changed[8:]
        return changed

    def input(self, rng, folder: Path) -> None:
        for entry in folder.iterdir():
            entry.unlink()
        suffix, source = self.sources[rng.integers(len(self.sources))]
        what = rng.random()
        if suffix == ".npz":
            data = self.broken_arrays(rng) if what < 0.6 else broken_bytes(rng, source)
        elif suffix == ".html":
            start, end = source.index(b">") + 1, source.rindex(b"<")
            header = text_of(rng, broken_document(rng, json.loads(source[start:end]))) if what < 0.7 else broken_bytes(rng, source[start:end])
            data = source[:start] + header + source[end:]
        elif what < 0.4:
            data = self.broken_json(rng, source)
        elif what < 0.7:  # within the header
            end = source.index(b"end_header") + 11 if suffix == ".ply" else 8 + int.from_bytes(source[:8], "little")
            data = broken_bytes(rng, source[:end]) + source[end:]
        else:
            data = broken_bytes(rng, source)
        (folder / f"input{suffix}").write_bytes(data)

    def use(self, folder: Path) -> None:
        (path,) = folder.glob("input.*")
        scene = self.load(path)
        assert all(values.isfinite().all() for values in scene.parameters()), "a scene with numbers that are not finite"
        with tempfile.TemporaryDirectory() as place:
            again = self.load(scene.save(Path(place) / "again.safetensors"))
        assert all((a == b).all() for a, b in zip(scene.parameters(), again.parameters())), "not as it was saved"


# ── checkpoints ───────────────────────────────────────────────────────────────

class Checkpoints:
    "Checkpoints, whose checksum is made right again where the content was broken, through Trainer.load and two steps."

    def __init__(self, folder: Path):
        import torch

        from gs2d.densify import DensifyConfig, ErrorGrowth
        from gs2d.gaussians import Domain2D
        from gs2d.ground_truth import GroundTruth
        from gs2d.io.checkpoints import write_checkpoint
        from gs2d.resume import trainer_state
        from gs2d.train import TrainConfig, Trainer, make_trainer

        self.trainer, self.write, self.sources, self.files = Trainer, write_checkpoint, [], []
        four = GroundTruth(torch.rand(20, 24, 4, generator=torch.Generator().manual_seed(0)), None, Domain2D.for_image(20, 24))
        small = dict(height=16, width=20, device="cpu")
        for steps, config, truth in (
            (4, TrainConfig(6, n_iterations=9, densify=DensifyConfig(every_n_steps=3, grad_threshold=1e-6), **small), None),
            (5, TrainConfig(6, n_iterations=12, densify=ErrorGrowth(rounds=6, max_gaussians=30, start_share=0.5), growing_loss="l2", init_level="content", **small), four),
            (2, TrainConfig(5, seconds=60, blend="over", loss="l1", lr_scale={"means": 0.0}, **small), None), (0, TrainConfig(3, **small), None)):
            trainer = make_trainer(config, ground_truth=truth)
            for _ in range(steps):
                trainer.step()
            tensors, about = trainer_state(trainer)
            self.sources.append(({name: tensor.detach().clone() for name, tensor in tensors.items()}, json.loads(json.dumps(about))))
            self.files.append(trainer.save(folder / "source.safetensors").read_bytes())

    def broken_tensors(self, rng, tensors: dict) -> dict:
        import torch

        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        for _ in range(rng.integers(1, 3)):
            name = list(tensors)[rng.integers(len(tensors))]
            tensor, what = tensors[name], rng.integers(9)
            if what == 0:
                del tensors[name]
            elif what == 1 and tensor.ndim:
                tensors[name] = tensor[: int(rng.integers(0, len(tensor) + 1))] if rng.random() < 0.5 else torch.cat([tensor, tensor[:1]])
            elif what == 2:
                kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.complex64]
                tensors[name] = tensor.to(kinds[rng.integers(len(kinds))])
            elif what == 3:
                tensors[name] = [tensor[None], tensor.reshape(-1), tensor.new_zeros(()), tensor.mT if tensor.ndim > 1 else tensor][rng.integers(4)]
            elif what == 4:
                other = list(tensors)[rng.integers(len(tensors))]
                tensors[name], tensors[other] = tensors[other], tensor
            elif what == 5:
                tensors[str(rng.choice(["x", "scene.", f"{name}.x", "adam.means", "truth.scene.x"]))] = tensor
            elif what == 6:
                tensors[name] = tensor * float(rng.choice([-1, 0, 1e3, 1e-30])) if tensor.is_floating_point() else tensor // 2
            elif tensor.numel():
                flat = tensor.reshape(-1)
                value = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS) - 4)]
                value = float(value) if tensor.is_floating_point() else int(rng.integers(0, 256))
                flat[rng.integers(len(flat), size=int(rng.choice([1, 3])))] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}

    def input(self, rng, folder: Path) -> None:
        which, what, path = rng.integers(len(self.sources)), rng.random(), folder / "input.safetensors"
        if what < 0.25:
            path.write_bytes(broken_bytes(rng, self.files[which]))
            return
        tensors, about = self.sources[which]
        if what < 0.65:
            tensors = self.broken_tensors(rng, tensors)
        if what > 0.55:
            about = broken_document(rng, about)
        about = about if isinstance(about, dict) else {"about": about}
        if isinstance(about.get("config"), dict) and about["config"].get("compile") not in ("auto", None):
            about["config"]["compile"] = False  # compiling takes minutes, and reads nothing
        self.write(path, tensors, about)

    def use(self, folder: Path) -> None:
        trainer = self.trainer.load(folder / "input.safetensors")
        trainer.scene.requires_grad_(True)
        try:
            for _ in range(2):
                trainer.step()
        except FloatingPointError as error:  # absurd numbers, each of them finite: said by the step, which changes nothing
            raise ValueError(str(error)) from None
        except MemoryError as error:  # a growth that the machine cannot hold: said before anything is allocated
            if "would fit" not in str(error):
                raise
            raise ValueError(str(error)) from None


# ── pictures ──────────────────────────────────────────────────────────────────

class Pictures:
    "Pictures of every format and mode, arrays and tensors, through load_picture."

    def __init__(self, folder: Path):
        from PIL import Image

        from gs2d.io import pictures

        pictures.MAX_PIXELS = PIXELS
        self.load, self.sources, rng = pictures.load_picture, [], np.random.default_rng(0)
        base = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "camera"
        modes = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
        options = [{}, dict(exif=exif), dict(save_all=True, append_images=[base.convert("L")]), dict(compression="tiff_lzw"), dict(compression="tiff_deflate"),
                   dict(interlace=1), dict(progressive=True), dict(lossless=True), dict(transparency=3), dict(icc_profile=b"profile" * 9), dict(optimize=True)]
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "SGI", "DDS", "ICNS", "AVIF", "QOI"):
            for mode in modes if kind != "AVIF" else ["RGB", "RGBA"]:
                for option in options if mode in ("L", "P", "RGB") and kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF") else [{}]:
                    buffer = io.BytesIO()
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            base.convert(mode).save(buffer, kind, **option)
                    except Exception:  # a format that cannot hold this mode, or is not built in
                        continue
                    if buffer.getvalue() not in self.sources:
                        self.sources.append(buffer.getvalue())

    def input(self, rng, folder: Path) -> None:
        self.max_side = [None, 8, 1][rng.integers(3)]
        if rng.random() < 0.85:
            source = self.sources[rng.integers(len(self.sources))]
            (folder / "input.bin").write_bytes(broken_bytes(rng, source) if rng.random() < 0.97 else source)
            self.array = None
            return
        (folder / "input.bin").unlink(missing_ok=True)
        shape = tuple(int(rng.choice([0, 1, 2, 3, 4, 5, 9])) for _ in range(rng.integers(0, 5)))
        kinds = ["?", "u1", "i1", "<u2", ">u2", "i2", "u4", "i4", "u8", "i8", "f2", "<f4", ">f4", "f8", "g", "c8", "O", "S3", "U3", "M8[s]", "V4"]
        kind = np.dtype(str(rng.choice(kinds)))
        array = rng.random(shape) * float(rng.choice([1, 1, 255, 1e30, -1])) if kind.kind == "f" else np.frombuffer(
            rng.bytes(kind.itemsize * math.prod(shape)), "u1").astype("u1") if kind.hasobject else np.frombuffer(rng.bytes(kind.itemsize * math.prod(shape)), kind)
        with np.errstate(all="ignore"):
            array = np.resize(array, shape).astype(kind, copy=False)
        self.array = array[::-1] if array.ndim and rng.random() < 0.3 else array
        (folder / "input.txt").write_text(f"array {array.dtype} {array.shape}")

    def use(self, folder: Path) -> None:
        import torch

        picture = folder / "input.bin" if self.array is None else self.array
        if self.array is not None and self.array.dtype.isnative and self.array.dtype.kind in "?iufc" and self.array.dtype.itemsize <= 8 and self.array.size % 2:
            picture = torch.tensor(self.array.copy())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no noise either
            image = self.load(picture, self.max_side)
        assert image.ndim == 3 and image.shape[2] == 3 and image.numel() and image.dtype == torch.float32, f"a picture of shape {tuple(image.shape)}"
        assert 0 <= image.min() and image.max() <= 1, "numbers outside of [0, 1]"


# ── videos ────────────────────────────────────────────────────────────────────

class Videos:
    "Videos, through read_frames and last_frame."

    def __init__(self, folder: Path):
        from gs2d.io import pictures
        from gs2d.io.containers import FrameWriter, last_frame, read_frames

        pictures.MAX_PIXELS = PIXELS
        self.readers, self.sources, rng = (read_frames, last_frame), {}, np.random.default_rng(0)
        for name, size in (("a.gif", (20, 24)), ("a.webm", (34, 40)), ("a.mp4", (34, 40))):
            writer = FrameWriter(folder / name, fps=10)
            for _ in range(5):
                writer.write(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            self.sources[name] = writer.finish().read_bytes()

    def input(self, rng, folder: Path) -> None:
        name = list(self.sources)[rng.integers(3)]
        self.name = f"input{name[1:]}"
        (folder / self.name).write_bytes(broken_bytes(rng, self.sources[name]))

    def use(self, folder: Path) -> None:
        read_frames, last_frame = self.readers
        pixels = 0
        for frame in read_frames(folder / self.name):
            assert frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8, f"a frame of shape {frame.shape}"
            pixels += frame.size
            if pixels > 3e8:  # frames come one by one, and whoever asks may stop
                break
        last_frame(folder / self.name)


# ── the state of a run ──


class Runs:
    "The file that says how it is with a run, through RunFolder.read."

    def __init__(self, folder: Path):
        from gs2d.io.runs import RunFolder

        self.run = RunFolder(folder)
        self.run.write("stopped", command="fit", options=dict(photo="photo.png", steps=9, seconds=None, background="black", alpha=False), picture_sha256="0" * 64)
        self.source = (folder / "run.json").read_bytes()

    def input(self, rng, folder: Path) -> None:
        document = broken_document(rng, json.loads(self.source))
        (folder / "run.json").write_bytes(broken_bytes(rng, self.source) if rng.random() < 0.5 else text_of(rng, document))

    def use(self, folder: Path) -> None:
        about = type(self.run)(folder).read()
        assert isinstance(about["options"], dict) and about["state"] in ("running", "stopped", "failed", "complete"), about


# ── the command line ──────────────────────────────────────────────────────────

class Commands:
    "The command line, with random options on small inputs."

    VALUES = ["0", "1", "2", "-1", "7", "3.5", "nan", "inf", "-inf", "1e30", "1e-30", "1000000000", "9" * 400, "", "x", "None", "true", "black", "white", "0,0.5,1",
              "5,5,5", "1,1", "nan,0,0", "#ff8800", "#ff", "weighted", "over", "additive", "l1", "l2", "l1_ssim", "cpu", "cuda", "mps", "meta", "auto", "draft", "good",
              "means=0", "fog=1", "means=", "=", "gradient", "error", "random", "exact", "content", "noisy", "cosine", "constant", "ü\n", "a\x1b[2J", "--", "-",
              "scene.json", "photo.png", "nowhere/x.png", "pictures", ".", "..", "/dev/null", "x.png", "x.gif", "x.webm", "x.json", "x.ply", "x.svg", "x.html", "x.doc", "out", "x" * 300]
    # Options that bound the work come last, so that they hold.
    SMALL = {"fit": ["--steps", "2", "--n-gaussians", "9", "--max-side", "16"], "train": ["--steps", "2", "--n-gaussians", "9", "--height", "12", "--width", "14"],
             "render": ["--width", "16", "--height", "12"], "info": [], "convert": [], "view": ["--no-browser", "--out", "page.html"], "bench": ["--steps", "2", "--n-gaussians", "9", "--max-side", "16"]}
    FIRST = {"fit": "photo.png", "train": None, "render": "scene.json", "info": "scene.json", "convert": "scene.json", "view": "scene.json", "bench": "pictures"}

    def __init__(self, folder: Path):
        sys.path.insert(0, str(HERE))
        import typer
        from conftest import colors, make_scene
        from PIL import Image
        from typer.testing import CliRunner

        from gs2d.cli import main

        self.main, self.runner, self.source = main, CliRunner(), folder / "source"
        self.options = {}
        for name, command in typer.main.get_command(main).commands.items():
            known = [parameter for parameter in command.params if parameter.param_type_name == "option"]
            self.options[name] = [(parameter.opts[0], parameter.is_flag) for parameter in known]
        (self.source / "pictures").mkdir(parents=True)
        Image.fromarray(colors(20, 24)).save(self.source / "photo.png")
        for name in ("a.png", "b.jpg"):
            Image.fromarray(colors(14, 12)).save(self.source / "pictures" / name)
        make_scene(5).save(self.source / "scene.json", 12, 16)

    def input(self, rng, folder: Path) -> None:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(self.source, folder, dirs_exist_ok=True)
        if rng.random() < 0.2:
            path = folder / str(rng.choice(["photo.png", "scene.json", "pictures/a.png"]))
            path.write_bytes(broken_bytes(rng, path.read_bytes()))
        name = str(rng.choice(list(self.options)))
        arguments = [name]
        if self.FIRST[name] and rng.random() < 0.9:
            arguments.append(self.FIRST[name] if rng.random() < 0.85 else str(rng.choice(self.VALUES)))
        if name == "convert":
            arguments.append(str(rng.choice(["x.safetensors", "x.ply", "x.svg", "x.glsl", "x.html", *self.VALUES])))
        for _ in range(rng.integers(0, 4) if self.options[name] else 0):
            option, is_flag = self.options[name][rng.integers(len(self.options[name]))]
            arguments += [option] if is_flag else [option, str(rng.choice(self.VALUES))]
        if rng.random() < 0.05:
            arguments.insert(int(rng.integers(len(arguments))), str(rng.choice(self.VALUES)))
        self.arguments = arguments + self.SMALL[name]
        (folder / "arguments.json").write_text(json.dumps(self.arguments))

    def use(self, folder: Path) -> None:
        os.chdir(folder)
        try:
            result = self.runner.invoke(self.main, self.arguments)
        finally:
            os.chdir("/")
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error if not isinstance(error, CLEAR) else AssertionError(f"{type(error).__name__} instead of an exit status: {error}")
        assert result.exit_code in (0, 1, 2, 130), f"exit status {result.exit_code}"
        assert "Traceback" not in result.output, "a traceback"
        if result.exit_code:
            raise ValueError(result.output.strip().splitlines()[-1][:LONGEST] if result.output.strip() else "status 1")


class Kernels:
    "Scenes with extreme numbers, through the kernels and the reference."

    def __init__(self, folder: Path):
        sys.path.insert(0, str(HERE))
        import fuzz_kernels

        self.one = fuzz_kernels.one

    def input(self, rng, folder: Path) -> None:
        self.rng = rng

    def use(self, folder: Path) -> None:
        self.one(self.rng)


TARGETS = {"scenes": Scenes, "checkpoints": Checkpoints, "pictures": Pictures, "videos": Videos, "commands": Commands, "kernels": Kernels, "runs": Runs, "formats": Formats}


# ── a process that tries inputs ───────────────────────────────────────────────

def ending(target, folder: Path) -> tuple[str, str]:
    "accepted, refused or unclear, and what was said."
    try:
        target.use(folder)
        return "accepted", ""
    except CLEAR as error:
        text = str(error).replace(str(folder), "")
        short = len(text) <= LONGEST and "\n" not in text and text.strip()
        return ("refused", text) if short or isinstance(target, Kernels) else ("unclear", f"{type(error).__name__}: a message of {len(text)} characters: {text[:200]!r}")
    except MemoryError as error:
        return "unclear", f"memory beyond the bound: {error}"
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).replace(str(folder), "…")
        return "unclear", f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {text[:300]}"


def worker(name: str, seed: int, folder: Path) -> None:
    "Read numbers of inputs from stdin, and answer each with a line of JSON."
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not an answer
    warnings.simplefilter("ignore")
    (folder / "sources").mkdir()
    target = TARGETS[name](folder / "sources")
    place = folder / "input"
    place.mkdir()
    for first in range(2):  # loads and compiles what is needed, before memory is counted
        target.input(np.random.default_rng([seed, 10**9 + first]), place)
        ending(target, place)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        target.input(np.random.default_rng([seed, list(TARGETS).index(name), int(line)]), place)
        print(json.dumps(ending(target, place)), file=answers)


# ── one process a core ────────────────────────────────────────────────────────

class Process:
    "A worker, started again when it was lost."

    def __init__(self, name: str, seed: int):
        self.name, self.seed, self.process, self.folder = name, seed, None, None

    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gs2d-fuzz-"))
        command = [sys.executable, __file__, "--worker", self.name, "--seed", str(self.seed), "--folder", str(self.folder)]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.log = open(self.folder / "log.txt", "wb")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.lines = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process, self.lines), daemon=True).start()
        if self.answer(240) != "ready":  # kernels may have to be compiled
            raise RuntimeError(f"{self.name}: no worker ({(self.folder / 'log.txt').read_text()[-2000:]})")

    @staticmethod
    def listen(process, lines) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def answer(self, seconds: float):
        "What it says; None for a process that takes too long, and "" for one that is no more."
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return None
        return json.loads(line) if line else ""

    def ask(self, number: int) -> tuple[str, str]:
        if self.process is None:
            self.start()
        try:
            print(number, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass
        found = self.answer(SECONDS)
        if found:
            return tuple(found)
        return "unclear", f"a hang of more than {SECONDS} s" if found is None else f"a crash, status {self.process.wait()}"

    def keep(self, to: Path, note: dict) -> None:
        "Put the input away."
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder / "input", to, dirs_exist_ok=True)
        (to / "ending.json").write_text(json.dumps(note, indent=1) + "\n")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.log.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None


def attack(name: str, seed: int, seconds: float, most: int, out: Path, n_processes: int) -> dict:
    "Try inputs for so long, or so many."
    counts, lock, next_number, kinds = {"accepted": 0, "refused": 0, "unclear": 0}, threading.Lock(), iter(range(most)), {}

    def work() -> None:
        process = Process(name, seed)
        try:
            process.start()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                with lock:
                    number = next(next_number, None)
                if number is None:
                    return
                how, said = process.ask(number)
                with lock:
                    counts[how] += 1
                    if how == "unclear":
                        kinds.setdefault(said[:90], []).append(number)
                        if len(kinds[said[:90]]) <= 3:
                            process.keep(out / f"{name}-{number}", {"target": name, "seed": seed, "input": number, "ending": said})
                if how == "unclear" and said.startswith(("a crash", "a hang", "memory")):
                    process.stop()
        except Exception as error:
            with lock:
                counts["unclear"] += 1
                kinds[f"{type(error).__name__}: {error}"[:500]] = []
        finally:
            process.stop()

    threads = [threading.Thread(target=work) for _ in range(n_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts | {"kinds": kinds}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together")
    parser.add_argument("--count", type=int, default=10**12, help="inputs for each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of " + ", ".join(TARGETS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("fuzz-out"), help="a folder for inputs with an unclear ending")
    parser.add_argument("--input", type=int, help="only this one, in this process, to look at")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return worker(given.worker, given.seed, given.folder) or 0
    names = [name for name in given.targets.split(",") if name != "kernels" or importlib.util.find_spec("fuzz_kernels") or (HERE / "fuzz_kernels.py").exists()]
    if given.input is not None:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[names[0]](Path(folder))
            (place := Path(folder) / "input").mkdir()
            target.input(np.random.default_rng([given.seed, list(TARGETS).index(names[0]), given.input]), place)
            target.use(place)
        return 0
    print(f"{'target':<13}{'inputs':>9}{'accepted':>10}{'refused':>9}{'unclear':>9}{'seconds':>9}", flush=True)
    unclear = 0
    for name in names:
        start = time.monotonic()
        found = attack(name, given.seed, 60 * given.minutes / len(names), given.count, given.out, given.processes)
        tried = found["accepted"] + found["refused"] + found["unclear"]
        print(f"{name:<13}{tried:>9,}{found['accepted']:>10,}{found['refused']:>9,}{found['unclear']:>9,}{time.monotonic() - start:>9.0f}", flush=True)
        for kind, numbers in found["kinds"].items():
            print(f"    {len(numbers) or 1:>5} × {ascii(kind)[1:-1]}   (--targets {name} --seed {given.seed} --input {numbers[0] if numbers else '?'})", flush=True)
        unclear += found["unclear"]
    if unclear:
        print(f"{unclear:,} unclear endings; the inputs are in {given.out}")
    return int(unclear > 0)


if __name__ == "__main__":
    sys.exit(main())
