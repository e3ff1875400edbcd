"""Compiled CPU kernels (draft)."""
import operator
import os
import queue
import threading
import weakref
import math

import numpy as np
import torch
import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.core.typeconv import Conversion
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model
from torch import Tensor

from gs2d.gaussians import CUTOFF_POWER
from gs2d.renderer import MAX_ALPHA, WEIGHT_EPS, Blend, ScreenGaussians

# ---------------------------------------------------------------- vectors
LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
TAPS = 11  # numbers in the SSIM window
_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_INT = ir.VectorType(ir.IntType(32), LANES)


class Lanes(types.Type):
    "The numba type of LANES float32 numbers that travel together in one register."

    def __init__(self):
        super().__init__(name=f"float32x{LANES}")

    def can_convert_from(self, typingctx, other):
        return Conversion.unsafe if isinstance(other, (types.Float, types.Integer)) else None


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VEC)


lanes = Lanes()


def _splat_constant(builder, value):
    one = builder.insert_element(ir.Constant(_VEC, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_VEC, ir.Undefined), ir.Constant(_INT, [0] * LANES))


@lower_cast(types.Float, lanes)
@lower_cast(types.Integer, lanes)
def _number_to_lanes(context, builder, fromty, toty, value):
    return _splat_constant(builder, context.cast(builder, value, fromty, types.float32))


def _register_operator(op, instruction):
    infer_global(op)(type("LanesOperator", (ConcreteTemplate,), {"cases": [signature(lanes, lanes, lanes)]}))
    lower_builtin(op, lanes, lanes)(lambda context, builder, sig, args: getattr(builder, instruction)(*args))


for _op, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _register_operator(_op, _instruction)


def _address(context, builder, sig, args, position=0):
    array = context.make_array(sig.args[position])(context, builder, args[position])
    return builder.gep(array.data, [args[position + 1]])


@intrinsic
def load(typingctx, array, index):
    "LANES numbers from array[index] on."

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(_address(context, builder, sig, args), _VEC.as_pointer())
        return builder.load(pointer, align=4)

    return signature(lanes, array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    "array[index : index + LANES] = value"

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(_address(context, builder, sig, args), _VEC.as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return signature(types.none, array, types.intp, lanes), codegen


@intrinsic
def fma(typingctx, a, b, c):
    "a·b + c, in one rounding where the processor can"

    def codegen(context, builder, sig, args):
        fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VEC, [_VEC] * 3), f"llvm.fmuladd.v{LANES}f32")
        return builder.call(fn, args)

    return signature(lanes, lanes, lanes, lanes), codegen


@intrinsic
def where_le(typingctx, a, b, then, otherwise):
    "then where a <= b, otherwise elsewhere; a NaN is never <="

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<=", args[0], args[1]), args[2], args[3])

    return signature(lanes, lanes, lanes, lanes, lanes), codegen


@intrinsic
def ramp(typingctx):
    "0, 1, 2, …: the position of each lane"

    def codegen(context, builder, sig, args):
        return ir.Constant(_VEC, [float(i) for i in range(LANES)])

    return signature(lanes), codegen


@intrinsic
def total(typingctx, value):
    "The sum of the lanes, halves first, so that its order is the same everywhere."

    def codegen(context, builder, sig, args):
        v, half = args[0], LANES // 2
        while half:
            mask = ir.Constant(_INT, [(i + half) % LANES for i in range(LANES)])
            v = builder.fadd(v, builder.shuffle_vector(v, v, mask))
            half //= 2
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return signature(types.float32, lanes), codegen


@intrinsic
def scale_by_power_of_two(typingctx, value, power):
    "value · 2^n, with n in the low bits of `power` (a number that had 1.5·2²³ added to it)"

    def codegen(context, builder, sig, args):
        shift = ir.Constant(_INT, [23] * LANES)
        n = builder.shl(builder.bitcast(args[1], _INT), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], _INT), n), _VEC)

    return signature(lanes, lanes, lanes), codegen


@intrinsic
def correlate(typingctx, array, index, weights):
    "Σₖ weights[k] · array[index + k : index + k + LANES] over the TAPS weights, from aligned loads and shifts between registers."

    def codegen(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        pointer = builder.bitcast(_address(context, builder, sig, args), _VEC.as_pointer())
        parts = [builder.load(builder.gep(pointer, [ir.Constant(i64, p)]), align=4) for p in range(-(-(TAPS - 1) // LANES) + 1)]
        fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VEC, [_VEC] * 3), f"llvm.fmuladd.v{LANES}f32")
        taps = context.make_array(sig.args[2])(context, builder, args[2]).data
        result = None
        for k in range(TAPS):
            part, shift = divmod(k, LANES)
            v = parts[part]
            if shift:
                v = builder.shuffle_vector(v, parts[part + 1], ir.Constant(_INT, [shift + i for i in range(LANES)]))
            w = _splat_constant(builder, builder.load(builder.gep(taps, [ir.Constant(i64, k)])))
            result = builder.fmul(v, w) if result is None else builder.call(fn, [v, w, result])
        return result

    return signature(lanes, array, types.intp, weights), codegen


@intrinsic
def load_rgb(typingctx, array, index):
    "3·LANES interleaved numbers as three Lanes."

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(_address(context, builder, sig, args), _VEC.as_pointer())
        parts = [builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), i)]), align=4) for i in range(3)]
        planes = []
        for c in range(3):
            at = [3 * i + c for i in range(LANES)]
            low = ir.Constant(_INT, [a if a < 2 * LANES else 0 for a in at])
            both = builder.shuffle_vector(parts[0], parts[1], low)
            pick = ir.Constant(_INT, [i if a < 2 * LANES else a - LANES for i, a in enumerate(at)])
            planes.append(builder.shuffle_vector(both, parts[2], pick))
        return context.make_tuple(builder, sig.return_type, planes)

    return signature(types.UniTuple(lanes, 3), array, types.intp), codegen


@intrinsic
def store_rgb(typingctx, array, index, r, g, b):
    "Three Lanes as 3·LANES interleaved numbers."

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(_address(context, builder, sig, args), _VEC.as_pointer())
        for part in range(3):
            at = [divmod(part * LANES + i, 3) for i in range(LANES)]
            rg = ir.Constant(_INT, [i + LANES * c if c < 2 else 0 for i, c in at])
            both = builder.shuffle_vector(args[2], args[3], rg)
            pick = ir.Constant(_INT, [lane if c < 2 else LANES + i for lane, (i, c) in enumerate(at)])
            value = builder.shuffle_vector(both, args[4], pick)
            builder.store(value, builder.gep(pointer, [ir.Constant(ir.IntType(64), part)]), align=4)
        return context.get_dummy_value()

    return signature(types.none, array, types.intp, lanes, lanes, lanes), codegen


# ---------------------------------------------------------------- constants
_CUT = np.float32(CUTOFF_POWER)
_HALF = np.float32(0.5)
_EPS = np.float32(WEIGHT_EPS)
_MAX_ALPHA = np.float32(MAX_ALPHA)
_TINY = np.float32(1e-30)
_ROUND = np.float32(1.5 * 2**23)
_EXP2_SCALE = np.float32(-0.5 / math.log(2))
# minimax polynomial of 2^f on [-1/2, 1/2]
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(v) for v in (1.0, 0.6931472, 0.24022651, 0.05550347, 0.009618129, 0.0013333558))
BAND = 32
_OPTIONS = dict(nogil=True, cache=True, error_model="numpy")


@njit(forceinline=True, **_OPTIONS)
def falloff(q):
    "exp(-q/2) within the cut-off, 0 outside"
    power = fma(q, _EXP2_SCALE, _ROUND)
    f = fma(q, _EXP2_SCALE, _ROUND - power)
    p = fma(f, fma(f, fma(f, fma(f, fma(f, _P5, _P4), _P3), _P2), _P1), _P0)
    return where_le(q, _CUT, scale_by_power_of_two(p, power), 0.0)


@njit(**_OPTIONS)
def _prepare(start, stop, means, conics, opacities, colors, height, width, packed, rows):
    "Pack what the loops need of each Gaussian into one cache line, and find the rows that it can touch."
    for i in range(start, stop):
        mx, my, a, b, c = np.float64(means[2 * i]), np.float64(means[2 * i + 1]), np.float64(conics[3 * i]), np.float64(conics[3 * i + 1]), np.float64(conics[3 * i + 2])
        g = packed[i]
        g[0], g[1], g[2], g[3], g[4], g[5] = mx, my, a, np.float32(2.0) * conics[3 * i + 1], c, opacities[i]
        g[6], g[7], g[8] = colors[3 * i], colors[3 * i + 1], colors[3 * i + 2]
        rows[i, 0] = 0
        rows[i, 1] = 0
        if not (math.isfinite(mx + my + a + b + c)):
            continue
        tilt, half, fade, crest, margin = 0.0, 1e9, 0.0, 0.0, 0.0
        x0, x1, y0, y1 = 0.0, 1.0 * width, 0.0, 1.0 * height
        ratio = abs(b) / math.sqrt(a * c) if a > 0 and c > 0 else 1.0
        slack = 2e-6 / (1 - ratio) if ratio < 1 else 1.0
        if slack < 0.5:
            cut = CUTOFF_POWER / (1 - slack)
            det = a * c - b * b
            tilt, half, fade = -b / c, math.sqrt(cut / c), det / (cut * c)
            reach_x, reach_y = math.sqrt(cut * c / det), math.sqrt(cut * a / det)
            crest = -b / a * reach_y
            margin = 1e-3 + 4e-6 * (abs(my) + reach_y + half)
            x0, x1 = mx - reach_x - 1e-3 - 4e-6 * (abs(mx) + reach_x), mx + reach_x + 1e-3 + 4e-6 * (abs(mx) + reach_x)
            y0, y1 = my - reach_y - margin, my + reach_y + margin
        x0, x1 = min(max(x0 + 0.5, 0.0), 1.0 * width), min(max(x1 + 0.5, 0.0), 1.0 * width)
        y0, y1 = min(max(y0 + 0.5, 0.0), 1.0 * height), min(max(y1 + 0.5, 0.0), 1.0 * height)
        g[9], g[10], g[11], g[12], g[13], g[14], g[15] = tilt, half, fade, margin, int(x0), int(x1), crest
        if int(x1) > int(x0):
            rows[i, 0], rows[i, 1] = int(y0), int(y1)


@njit(**_OPTIONS)
def _bin(rows, packed, n_bands):
    "List, band by band and in order of index, the Gaussians that touch it (a counting sort)."
    n = len(rows)
    first = np.zeros(n_bands + 1, np.int64)  # entries of band b are entries[first[b] : first[b + 1]]
    starts = np.zeros(n_bands + 1, np.int64)  # Gaussians that begin in band b are order[starts[b] : starts[b + 1]]
    band_work = np.zeros(n_bands + 1, np.float64)
    slots = np.zeros(n + 1, np.int64)
    for i in range(n):
        top, end = rows[i, 0], rows[i, 1]
        slots[i + 1] = slots[i]
        if end > top:
            work = 2.0 + (packed[i, 14] - packed[i, 13]) / LANES
            starts[top // BAND + 1] += 1
            for band in range(top // BAND, (end - 1) // BAND + 1):
                first[band + 1] += 1
                band_work[band + 1] += work * (min(end, (band + 1) * BAND) - max(top, band * BAND))
                slots[i + 1] += 1
    for band in range(n_bands):
        first[band + 1] += first[band]
        starts[band + 1] += starts[band]
        band_work[band + 1] += band_work[band]
    entries = np.empty(first[n_bands], np.int32)
    order = np.empty(starts[n_bands], np.int32)
    filled, begun = first.copy(), starts.copy()
    for i in range(n):
        top, end = rows[i, 0], rows[i, 1]
        if end > top:
            order[begun[top // BAND]] = i
            begun[top // BAND] += 1
            for band in range(top // BAND, (end - 1) // BAND + 1):
                entries[filled[band]] = i
                filled[band] += 1
    work = np.zeros(len(order) + 1, np.float64)
    for k in range(len(order)):
        i = order[k]
        work[k + 1] = work[k] + (2.0 + (packed[i, 14] - packed[i, 13]) / LANES) * (rows[i, 1] - rows[i, 0])
    return first, entries, slots, order, band_work, work


@njit(forceinline=True, **_OPTIONS)
def _edge(g, x):
    "Highest and lowest row that the ellipse of `g` reaches at the column edge x, relative to its centre."
    dx = np.float32(x) - g[0]
    middle = g[9] * dx
    half = g[10] * math.sqrt(max(np.float32(0.0), np.float32(1.0000004) - dx * dx * g[11]))
    return dx, middle - half, middle + half


@njit(forceinline=True, **_OPTIONS)
def _strip_rows(g, left, right, top, end):
    "Rows top..end that the ellipse can reach between two column edges."
    low, high = min(left[1], right[1]), max(left[2], right[2])
    crest = g[15]
    first, last = top, end
    if not (left[0] <= -crest <= right[0]):
        first = int(max(g[1] + low - g[12] + _HALF, np.float32(top)))
    if not (left[0] <= crest <= right[0]):
        last = int(min(g[1] + high + g[12] + _HALF, np.float32(end)))
    return first, last


@njit(forceinline=True, **_OPTIONS)
def _padded(width):
    return (width + LANES - 1) // LANES * LANES + LANES


@njit(forceinline=True, **_OPTIONS)
def _write_rgb(image, at, x, width, r, g, b):
    "Store LANES pixels of an interleaved row, or fewer at its end."
    if x + LANES <= width:
        store_rgb(image, at + 3 * x, r, g, b)
    else:
        edge = np.empty(3 * LANES, np.float32)
        store_rgb(edge, 0, r, g, b)
        for j in range(3 * (width - x)):
            image[at + 3 * x + j] = edge[j]


@njit(forceinline=True, **_OPTIONS)
def _read_rgb(image, at, x, width):
    "Load LANES pixels of an interleaved row; past its end there are zeros."
    if x + LANES <= width:
        return load_rgb(image, at + 3 * x)
    edge = np.zeros(3 * LANES, np.float32)
    for j in range(3 * (width - x)):
        edge[j] = image[at + 3 * x + j]
    return load_rgb(edge, 0)


@njit(**_OPTIONS)
def _splat_forward(start, stop, first, entries, packed, rows, background, weighted, height, width, image, coverage):
    "Bands start..stop of the image: sum the Gaussians that touch a band in a buffer that fits the cache, then write it."
    stride = _padded(width)
    sums = np.empty(BAND * 4 * stride, np.float32)
    for band in range(start, stop):
        top, end = band * BAND, min(height, (band + 1) * BAND)
        sums[: (end - top) * 4 * stride] = 0
        for e in range(first[band], first[band + 1]):
            i = entries[e]
            g = packed[i]
            mx, my, a, b2, c, opacity = g[0], g[1], g[2], g[3], g[4], g[5]
            red, green, blue = opacity * g[6], opacity * g[7], opacity * g[8]
            first_row, end_row = max(top, rows[i, 0]), min(end, rows[i, 1])
            x0, x1 = int(g[13]), int(g[14])
            right = _edge(g, x0)
            for x in range(x0, x1, LANES):
                left = right
                y0, y1 = first_row, end_row
                if x1 - x0 > LANES:
                    right = _edge(g, x + LANES)
                    y0, y1 = _strip_rows(g, left, right, first_row, end_row)
                dx = ramp() + (np.float32(x) + _HALF) - mx
                adx = a * dx
                py = ramp() * 0.0 + (np.float32(y0) + _HALF)
                r = (y0 - top) * 4 * stride + x
                for y in range(y0, y1):
                    dy = py - my
                    w = falloff(dx * (adx + b2 * dy) + (c * dy) * dy)
                    store(sums, r, fma(w, red, load(sums, r)))
                    store(sums, r + stride, fma(w, green, load(sums, r + stride)))
                    store(sums, r + 2 * stride, fma(w, blue, load(sums, r + 2 * stride)))
                    if weighted:
                        store(sums, r + 3 * stride, fma(w, opacity, load(sums, r + 3 * stride)))
                    py = py + 1.0
                    r += 4 * stride
        for y in range(top, end):
            at = (y - top) * 4 * stride
            for x in range(0, width, LANES):
                r, g_, b = load(sums, at + x), load(sums, at + x + stride), load(sums, at + x + 2 * stride)
                if weighted:
                    inverse = 1.0 / (load(sums, at + x + 3 * stride) + _EPS)
                    store(coverage, y * stride + x, inverse)
                    r = (r + _EPS * background[0]) * inverse
                    g_ = (g_ + _EPS * background[1]) * inverse
                    b = (b + _EPS * background[2]) * inverse
                else:
                    r, g_, b = r + background[0], g_ + background[1], b + background[2]
                _write_rgb(image, 3 * width * y, x, width, r, g_, b)


@njit(**_OPTIONS)
def _planar_gradient(start, stop, grad, image, coverage, weighted, height, width, planes):
    "The gradient with respect to the four sums, rows start..stop, one plane after another within each row."
    stride = _padded(width)
    for y in range(start, stop):
        at = 4 * stride * y
        planes[at : at + 4 * stride] = 0
        for x in range(0, width, LANES):
            r, g, b = _read_rgb(grad, 3 * width * y, x, width)
            if weighted:
                ir, ig, ib = _read_rgb(image, 3 * width * y, x, width)
                inverse = load(coverage, y * stride + x)
                r, g, b = r * inverse, g * inverse, b * inverse
                store(planes, at + x + 3 * stride, 0.0 - fma(r, ir, fma(g, ig, b * ib)))
            store(planes, at + x, r)
            store(planes, at + x + stride, g)
            store(planes, at + x + 2 * stride, b)


@njit(**_OPTIONS)
def _splat_backward(start, stop, order, packed, rows, planes, weighted, width, d_means, d_conics, d_opacities, d_colors):
    "One Gaussian at a time: read the gradient image where the Gaussian reaches, write its own row."
    stride = _padded(width)
    for k in range(start, stop):
        i = order[k]
        g = packed[i]
        mx, my, a, b2, c, opacity, red, green, blue = g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]
        zero = ramp() * 0.0
        s_red, s_green, s_blue = zero, zero, zero
        m, mdx, mdy, mxx, mxy, myy = zero, zero, zero, zero, zero, zero
        x0, x1 = int(g[13]), int(g[14])
        right = _edge(g, x0)
        for x in range(x0, x1, LANES):
            left = right
            y0, y1 = rows[i, 0], rows[i, 1]
            if x1 - x0 > LANES:
                right = _edge(g, x + LANES)
                y0, y1 = _strip_rows(g, left, right, rows[i, 0], rows[i, 1])
            dx = ramp() + (np.float32(x) + _HALF) - mx
            adx = a * dx
            py = ramp() * 0.0 + (np.float32(y0) + _HALF)
            r = 4 * stride * y0 + x
            column, column_y = zero, zero
            for y in range(y0, y1):
                dy = py - my
                w = falloff(dx * (adx + b2 * dy) + (c * dy) * dy)
                g_red, g_green, g_blue = load(planes, r), load(planes, r + stride), load(planes, r + 2 * stride)
                h = fma(g_red, red, fma(g_green, green, g_blue * blue))
                if weighted:
                    h = h + load(planes, r + 3 * stride)
                h = h * w
                s_red, s_green, s_blue = fma(w, g_red, s_red), fma(w, g_green, s_green), fma(w, g_blue, s_blue)
                hy = h * dy
                column, column_y, myy = column + h, column_y + hy, fma(hy, dy, myy)
                py = py + 1.0
                r += 4 * stride
            hx = column * dx
            m, mdy, mdx = m + column, mdy + column_y, mdx + hx
            mxx, mxy = fma(hx, dx, mxx), fma(column_y, dx, mxy)
        b = _HALF * b2
        tx, ty = total(mdx), total(mdy)
        d_opacities[i] = total(m)
        d_means[2 * i], d_means[2 * i + 1] = opacity * (a * tx + b * ty), opacity * (b * tx + c * ty)
        d_conics[3 * i], d_conics[3 * i + 1], d_conics[3 * i + 2] = -_HALF * opacity * total(mxx), -opacity * total(mxy), -_HALF * opacity * total(myy)
        d_colors[3 * i], d_colors[3 * i + 1], d_colors[3 * i + 2] = opacity * total(s_red), opacity * total(s_green), opacity * total(s_blue)


@njit(**_OPTIONS)
def _over_forward(start, stop, first, entries, packed, rows, background, height, width, image, coverage):
    "Bands start..stop, front to back: each Gaussian covers part of the light that those before it let through."
    stride = _padded(width)
    area = height * stride
    sums = np.empty(BAND * 5 * stride, np.float32)  # red, green, blue, transmittance, last entry that counted
    for band in range(start, stop):
        top, end = band * BAND, min(height, (band + 1) * BAND)
        sums[: (end - top) * 5 * stride] = 0
        for y in range(end - top):
            sums[(5 * y + 3) * stride : (5 * y + 4) * stride] = 1
        for e in range(first[band], first[band + 1]):
            i = entries[e]
            g = packed[i]
            mx, my, a, b2, c, opacity, red, green, blue = g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]
            position = np.float32(e - first[band])
            first_row, end_row = max(top, rows[i, 0]), min(end, rows[i, 1])
            x0, x1 = int(g[13]), int(g[14])
            right = _edge(g, x0)
            for x in range(x0, x1, LANES):
                left = right
                y0, y1 = first_row, end_row
                if x1 - x0 > LANES:
                    right = _edge(g, x + LANES)
                    y0, y1 = _strip_rows(g, left, right, first_row, end_row)
                dx = ramp() + (np.float32(x) + _HALF) - mx
                adx = a * dx
                py = ramp() * 0.0 + (np.float32(y0) + _HALF)
                r = (y0 - top) * 5 * stride + x
                for y in range(y0, y1):
                    dy = py - my
                    through = load(sums, r + 3 * stride)
                    alpha = opacity * falloff(dx * (adx + b2 * dy) + (c * dy) * dy)
                    alpha = where_le(through, _TINY, 0.0, where_le(alpha, _MAX_ALPHA, alpha, _MAX_ALPHA))
                    w = through * alpha
                    store(sums, r, fma(w, red, load(sums, r)))
                    store(sums, r + stride, fma(w, green, load(sums, r + stride)))
                    store(sums, r + 2 * stride, fma(w, blue, load(sums, r + 2 * stride)))
                    store(sums, r + 3 * stride, through * (1.0 - alpha))
                    store(sums, r + 4 * stride, where_le(through, _TINY, load(sums, r + 4 * stride), position))
                    py = py + 1.0
                    r += 5 * stride
        for y in range(top, end):
            at = (y - top) * 5 * stride
            for x in range(0, width, LANES):
                through = load(sums, at + x + 3 * stride)
                store(coverage, y * stride + x, through)
                store(coverage, area + y * stride + x, load(sums, at + x + 4 * stride))
                r = fma(through, background[0], load(sums, at + x))
                g_ = fma(through, background[1], load(sums, at + x + stride))
                b = fma(through, background[2], load(sums, at + x + 2 * stride))
                _write_rgb(image, 3 * width * y, x, width, r, g_, b)


@njit(**_OPTIONS)
def _over_backward(start, stop, first, entries, slots, packed, rows, background, grad, coverage, height, width, partial):
    "Bands start..stop, back to front, undoing one Gaussian at a time; each entry of a band writes its own partial row."
    stride = _padded(width)
    area = height * stride
    planes = np.empty(BAND * 6 * stride, np.float32)  # gradient r, g, b; transmittance; light from behind; last entry
    for band in range(start, stop):
        top, end = band * BAND, min(height, (band + 1) * BAND)
        planes[:] = 0
        for y in range(top, end):
            at = (y - top) * 6 * stride
            for x in range(0, width, LANES):
                r, g_, b = _read_rgb(grad, 3 * width * y, x, width)
                through = load(coverage, y * stride + x)
                store(planes, at + x, r)
                store(planes, at + x + stride, g_)
                store(planes, at + x + 2 * stride, b)
                store(planes, at + x + 3 * stride, through)
                store(planes, at + x + 4 * stride, through * fma(r, background[0], fma(g_, background[1], b * background[2])))
                store(planes, at + x + 5 * stride, load(coverage, area + y * stride + x))
        for e in range(first[band + 1] - 1, first[band] - 1, -1):
            i = entries[e]
            g = packed[i]
            mx, my, a, b2, c, opacity, red, green, blue = g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]
            position = np.float32(e - first[band])
            zero = ramp() * 0.0
            s_red, s_green, s_blue = zero, zero, zero
            m, mdx, mdy, mxx, mxy, myy = zero, zero, zero, zero, zero, zero
            first_row, end_row = max(top, rows[i, 0]), min(end, rows[i, 1])
            x0, x1 = int(g[13]), int(g[14])
            right = _edge(g, x0)
            for x in range(x0, x1, LANES):
                left = right
                y0, y1 = first_row, end_row
                if x1 - x0 > LANES:
                    right = _edge(g, x + LANES)
                    y0, y1 = _strip_rows(g, left, right, first_row, end_row)
                dx = ramp() + (np.float32(x) + _HALF) - mx
                adx = a * dx
                py = ramp() * 0.0 + (np.float32(y0) + _HALF)
                r = (y0 - top) * 6 * stride + x
                column, column_y = zero, zero
                for y in range(y0, y1):
                    dy = py - my
                    g_red, g_green, g_blue = load(planes, r), load(planes, r + stride), load(planes, r + 2 * stride)
                    through, behind, last = load(planes, r + 3 * stride), load(planes, r + 4 * stride), load(planes, r + 5 * stride)
                    w = where_le(position, last, falloff(dx * (adx + b2 * dy) + (c * dy) * dy), 0.0)
                    alpha = opacity * w
                    counts = where_le(alpha, _MAX_ALPHA, w, 0.0)
                    alpha = where_le(alpha, _MAX_ALPHA, alpha, _MAX_ALPHA)
                    undo = 1.0 / (1.0 - alpha)
                    before = through * undo
                    light = fma(g_red, red, fma(g_green, green, g_blue * blue))
                    h = counts * (before * light - behind * undo)
                    w = before * alpha
                    store(planes, r + 3 * stride, before)
                    store(planes, r + 4 * stride, fma(w, light, behind))
                    s_red, s_green, s_blue = fma(w, g_red, s_red), fma(w, g_green, s_green), fma(w, g_blue, s_blue)
                    hy = h * dy
                    column, column_y, myy = column + h, column_y + hy, fma(hy, dy, myy)
                    py = py + 1.0
                    r += 6 * stride
                hx = column * dx
                m, mdy, mdx = m + column, mdy + column_y, mdx + hx
                mxx, mxy = fma(hx, dx, mxx), fma(column_y, dx, mxy)
            p = partial[slots[i] + band - rows[i, 0] // BAND]
            p[0], p[1], p[2], p[3], p[4], p[5] = total(m), total(mdx), total(mdy), total(mxx), total(mxy), total(myy)
            p[6], p[7], p[8] = total(s_red), total(s_green), total(s_blue)


@njit(**_OPTIONS)
def _over_gather(start, stop, slots, packed, partial, d_means, d_conics, d_opacities, d_colors):
    "Add up the partial rows of Gaussians start..stop, in the order of the bands."
    for i in range(start, stop):
        s = np.zeros(9, np.float32)
        for k in range(slots[i], slots[i + 1]):
            for j in range(9):
                s[j] += partial[k, j]
        a, b, c, opacity = packed[i, 2], _HALF * packed[i, 3], packed[i, 4], packed[i, 5]
        d_opacities[i] = s[0]
        d_means[2 * i], d_means[2 * i + 1] = opacity * (a * s[1] + b * s[2]), opacity * (b * s[1] + c * s[2])
        d_conics[3 * i], d_conics[3 * i + 1], d_conics[3 * i + 2] = -_HALF * opacity * s[3], -opacity * s[4], -_HALF * opacity * s[5]
        d_colors[3 * i], d_colors[3 * i + 1], d_colors[3 * i + 2] = s[6], s[7], s[8]


# ---------------------------------------------------------------- SSIM
SSIM_BAND = 64
_LEFT = 16
_C1, _C2 = np.float32(0.01**2), np.float32(0.03**2)


@njit(forceinline=True, **_OPTIONS)
def _read_planes(image, y, width, planes, at, stride):
    "Copy row y of an interleaved image into three planar rows."
    for x in range(0, width, LANES):
        r, g, b = _read_rgb(image, 3 * width * y, x, width)
        store(planes, at + x, r)
        store(planes, at + stride + x, g)
        store(planes, at + 2 * stride + x, b)


@njit(**_OPTIONS)
def _fingerprint(start, stop, bits, block, prints):
    "A 64-bit checksum for each block of the target, in which the place of every number counts."
    for k in range(start, stop):
        h = np.uint64(0)
        for i in range(k * block, min(len(bits), (k + 1) * block)):
            h += np.uint64(bits[i]) * (np.uint64(i) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03))
        prints[k] = h


@njit(**_OPTIONS)
def _target_statistics(start, stop, target, window, valid_height, valid_width, height, width, statistics):
    "Local mean and variance of the target, rows start..stop."
    stride = _padded(width)
    rows = np.zeros(TAPS * 3 * stride, np.float32)
    column = np.zeros(2 * stride, np.float32)
    for y in range(start, min(height, start + TAPS - 1)):
        _read_planes(target, y, width, rows, (y % TAPS) * 3 * stride, stride)
    for y in range(start, stop):
        if y + TAPS - 1 < height:
            _read_planes(target, y + TAPS - 1, width, rows, ((y + TAPS - 1) % TAPS) * 3 * stride, stride)
        for c in range(3):
            for x in range(0, width, LANES):
                mean, square = ramp() * 0.0, ramp() * 0.0
                for k in range(TAPS):
                    v = load(rows, (3 * ((y + k) % TAPS) + c) * stride + x)
                    wv = window[k] * v
                    mean, square = mean + wv, fma(wv, v, square)
                store(column, x, mean)
                store(column, stride + x, square)
            out = (3 * y + c) * 2 * stride
            for x in range(0, valid_width, LANES):
                mean, square = ramp() * 0.0, ramp() * 0.0
                for k in range(TAPS):
                    mean = fma(load(column, x + k), window[k], mean)
                    square = fma(load(column, stride + x + k), window[k], square)
                store(statistics, out + x, mean)
                store(statistics, out + stride + x, square - mean * mean)


@njit(forceinline=True, **_OPTIONS)
def _aligned(size):
    "Zeros that begin at a multiple of 64 bytes, so that vectors at multiples of LANES never straddle two cache lines."
    raw = np.zeros(size + 16, np.float32)
    skip = -(raw.ctypes.data >> 2) & 15
    return raw[skip : skip + size]


@njit(**_OPTIONS)
def _ssim_bands(start, stop, image, target, statistics, window, valid_height, valid_width, l1_scale, ssim_scale, with_grad, channels, height, width, gradient, sums):
    """One band of rows at a time: SSIM, L1 and squared error, and the gradient of l1_scale·Σ|x - y| + ssim_scale·ΣSSIM.

    Vertical blur, horizontal blur, the three derivative maps, and the same two blurs back, row by row, so that all of it stays in the cache."""
    stat_stride = _padded(width)
    stride = stat_stride + _LEFT
    xs, ys = _aligned(TAPS * 3 * stride), _aligned(TAPS * 3 * stride)  # the last TAPS rows of both images
    ring = _aligned(TAPS * 9 * stride)  # the last TAPS rows of the derivative maps
    column, back, out = _aligned(3 * stride), _aligned(3 * stride), _aligned(3 * stride)
    mirrored = window[::-1].copy()
    zero = ramp() * 0.0
    for band in range(start, stop):
        top, end = band * SSIM_BAND, min(height, (band + 1) * SSIM_BAND)
        base = max(0, top - (TAPS - 1))
        ssim_sum, l1_sum, square_sum = 0.0, 0.0, 0.0
        ring[:] = 0
        xs[:] = 0
        ys[:] = 0
        for y in range(base, min(height, base + TAPS - 1)):
            _read_planes(image, y, width, xs, (y % TAPS) * 3 * stride, stride)
            _read_planes(target, y, width, ys, (y % TAPS) * 3 * stride, stride)
        for r in range(base, end):
            if r + TAPS - 1 < height:
                _read_planes(image, r + TAPS - 1, width, xs, ((r + TAPS - 1) % TAPS) * 3 * stride, stride)
                _read_planes(target, r + TAPS - 1, width, ys, ((r + TAPS - 1) % TAPS) * 3 * stride, stride)
            for c in range(channels):
                slot = ((r % TAPS) * 3 + c) * 3 * stride
                at = ((r % TAPS) * 3 + c) * stride
                if r >= valid_height:
                    ring[slot : slot + 3 * stride] = 0
                elif with_grad or r >= top:
                    for x in range(0, width, LANES):
                        mean, square, cross = zero, zero, zero
                        for k in range(TAPS):
                            row = (((r + k) % TAPS) * 3 + c) * stride + x
                            v = load(xs, row)
                            wv = window[k] * v
                            mean, square, cross = mean + wv, fma(wv, v, square), fma(wv, load(ys, row), cross)
                        store(column, x, mean)
                        store(column, stride + x, square)
                        store(column, 2 * stride + x, cross)
                    stat = (3 * r + c) * 2 * stat_stride
                    row_sum = zero
                    for x in range(0, valid_width, LANES):
                        mean = correlate(column, x, window)
                        square = correlate(column, stride + x, window)
                        cross = correlate(column, 2 * stride + x, window)
                        mean_y, var_y = load(statistics, stat + x), load(statistics, stat + stat_stride + x)
                        n1 = 2.0 * mean * mean_y + _C1
                        n2 = 2.0 * (cross - mean * mean_y) + _C2
                        d1 = mean * mean + mean_y * mean_y + _C1
                        d2 = square - mean * mean + var_y + _C2
                        both = 1.0 / (d1 * d2)
                        s = n1 * n2 * both
                        inside = np.float32(valid_width - 1 - x)
                        row_sum = row_sum + where_le(ramp(), inside, s, 0.0)
                        d_mean = 2.0 * both * (mean_y * (n2 - n1) + mean * s * (d1 - d2))
                        store(ring, slot + x, where_le(ramp(), inside, d_mean, 0.0))
                        store(ring, slot + stride + x, where_le(ramp(), inside, 0.0 - s * both * d1, 0.0))
                        store(ring, slot + 2 * stride + x, where_le(ramp(), inside, 2.0 * n1 * both, 0.0))
                    if r >= top:
                        ssim_sum += total(row_sum)
                if r >= top:
                    if with_grad:
                        for x in range(0, width, LANES):
                            d_mean, d_square, d_cross = zero, zero, zero
                            for k in range(TAPS):
                                row = (((r + TAPS - k) % TAPS) * 3 + c) * 3 * stride + x
                                d_mean = fma(load(ring, row), window[k], d_mean)
                                d_square = fma(load(ring, row + stride), window[k], d_square)
                                d_cross = fma(load(ring, row + 2 * stride), window[k], d_cross)
                            store(back, TAPS - 1 + x, d_mean)
                            store(back, stride + TAPS - 1 + x, d_square)
                            store(back, 2 * stride + TAPS - 1 + x, d_cross)
                    l1_row, square_row = zero, zero
                    for x in range(0, width, LANES):
                        v, t = load(xs, at + x), load(ys, at + x)
                        e = v - t
                        sign = where_le(v, t, where_le(t, v, 0.0, -1.0), 1.0)
                        l1_row, square_row = fma(e, sign, l1_row), fma(e, e, square_row)
                        if with_grad:
                            d_mean = correlate(back, x, mirrored)
                            d_square = correlate(back, stride + x, mirrored)
                            d_cross = correlate(back, 2 * stride + x, mirrored)
                            d = fma(2.0 * v, d_square, fma(t, d_cross, d_mean))
                            store(out, c * stride + x, fma(sign, l1_scale, d * ssim_scale))
                    l1_sum += total(l1_row)
                    square_sum += total(square_row)
            if with_grad and r >= top:
                for x in range(0, width, LANES):
                    _write_rgb(gradient, 3 * width * r, x, width, load(out, x), load(out, stride + x), load(out, 2 * stride + x))
        sums[band, 0], sums[band, 1], sums[band, 2] = ssim_sum, l1_sum, square_sum


# ---------------------------------------------------------------- threads
class _Pool:
    "A few daemon threads that take calls from one queue. A fork gets a fresh one."

    def __init__(self):
        self.calls, self.size, self.lock = queue.SimpleQueue(), 0, threading.Lock()

    def _work(self):
        while True:
            self.calls.get()()

    def grow(self, size):
        with self.lock:
            while self.size < size:
                threading.Thread(target=self._work, daemon=True, name="gs2d-kernels").start()
                self.size += 1


_pool = _Pool()


def _fresh_pool():
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_pool)


def _run(kernel, cuts, *args):
    "kernel(start, stop, *args) for each piece between two cuts: the last here, the others in the pool."
    pieces = [(int(a), int(b)) for a, b in zip(cuts, cuts[1:]) if a < b]
    if not pieces:
        return
    done, errors = queue.SimpleQueue(), []

    def call(start, stop):
        try:
            kernel(start, stop, *args)
            done.put(None)
        except BaseException as error:
            done.put(error)

    _pool.grow(len(pieces) - 1)
    for piece in pieces[:-1]:
        _pool.calls.put(lambda piece=piece: call(*piece))
    call(*pieces[-1])
    for _ in pieces:
        error = done.get()
        if error is not None:
            errors.append(error)
    if errors:
        raise errors[0]


def _even(n, least=1):
    pieces = max(1, min(torch.get_num_threads(), n // least))
    return [n * k // pieces for k in range(pieces + 1)]


def _balanced(work, least=20000.0):
    "Cuts into pieces of equal work; work is cumulative."
    pieces = max(1, min(torch.get_num_threads(), int(work[-1] / least)))
    inner = np.searchsorted(work, [work[-1] * k / pieces for k in range(1, pieces)])
    return [0, *inner.tolist(), len(work) - 1]


# ---------------------------------------------------------------- operators
_WEIGHTED, _ADDITIVE, _OVER = range(3)
_MODES = {Blend.WEIGHTED: _WEIGHTED, Blend.ADDITIVE: _ADDITIVE, Blend.OVER: _OVER}
_PLANES = {_WEIGHTED: 1, _ADDITIVE: 0, _OVER: 2}


def _flat(tensor):
    return tensor.detach().contiguous().numpy().reshape(-1)


def _rasterize_forward(means, conics, opacities, colors, background, height, width, mode):
    n, stride, n_bands = len(means), (width + LANES - 1) // LANES * LANES + LANES, -(-height // BAND)
    packed, rows = torch.empty(n, 16), torch.empty(n, 2, dtype=torch.int32)
    image, coverage = torch.empty(height, width, 3), torch.empty(_PLANES[mode], height, stride)
    P, R = packed.numpy(), rows.numpy()
    _run(_prepare, _even(n, 4000), _flat(means), _flat(conics), _flat(opacities), _flat(colors), height, width, P, R)
    first, entries, slots, order, band_work, work = _bin(R, P, n_bands)
    b = _flat(background)
    if mode == _OVER:
        _run(_over_forward, _balanced(band_work), first, entries, P, R, b, height, width, _flat(image), _flat(coverage))
    else:
        _run(_splat_forward, _balanced(band_work), first, entries, P, R, b, mode == _WEIGHTED, height, width, _flat(image), _flat(coverage))
    return image, packed, rows, coverage


def _rasterize_backward(grad, image, packed, rows, coverage, background, mode):
    height, width, _ = image.shape
    n, stride, n_bands = len(packed), (width + LANES - 1) // LANES * LANES + LANES, -(-height // BAND)
    grads = torch.zeros(n, 2), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 3)
    outs = [_flat(g) for g in grads]
    P, R = packed.numpy(), rows.numpy()
    first, entries, slots, order, band_work, work = _bin(R, P, n_bands)
    if mode == _OVER:
        partial = np.empty((len(entries), 9), np.float32)
        _run(_over_backward, _balanced(band_work), first, entries, slots, P, R, _flat(background), _flat(grad), _flat(coverage), height, width, partial)
        _run(_over_gather, _even(n, 4000), slots, P, partial, *outs)
    else:
        planes = torch.empty(height * 4 * stride).numpy()
        _run(_planar_gradient, _even(height, 64), _flat(grad), _flat(image), _flat(coverage), mode == _WEIGHTED, height, width, planes)
        _run(_splat_backward, _balanced(work), order, P, R, planes, mode == _WEIGHTED, width, *outs)
    return grads


_library = torch.library.Library("gs2d", "DEF")
_library.define("rasterize(Tensor means, Tensor conics, Tensor opacities, Tensor colors, Tensor background, int height, int width, int mode) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("rasterize_backward(Tensor grad, Tensor image, Tensor packed, Tensor rows, Tensor coverage, Tensor background, int mode) -> (Tensor, Tensor, Tensor, Tensor)")
_library.impl("rasterize", _rasterize_forward, "CPU")
_library.impl("rasterize_backward", _rasterize_backward, "CPU")


@torch.library.register_fake("gs2d::rasterize", lib=_library)
def _(means, conics, opacities, colors, background, height, width, mode):
    n, stride = means.shape[0], (width + LANES - 1) // LANES * LANES + LANES
    return means.new_empty(height, width, 3), means.new_empty(n, 16), means.new_empty(n, 2, dtype=torch.int32), means.new_empty(_PLANES[mode], height, stride)


@torch.library.register_fake("gs2d::rasterize_backward", lib=_library)
def _(grad, image, packed, rows, coverage, background, mode):
    n = packed.shape[0]
    return grad.new_empty(n, 2), grad.new_empty(n, 3), grad.new_empty(n), grad.new_empty(n, 3)


def _setup(ctx, inputs, output):
    image, packed, rows, coverage = output
    ctx.mode = inputs[-1]
    ctx.save_for_backward(image, packed, rows, coverage, inputs[4])
    ctx.mark_non_differentiable(packed, rows, coverage)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    image, packed, rows, coverage, background = ctx.saved_tensors
    d_background = None
    if ctx.needs_input_grad[4]:
        shares = {_WEIGHTED: lambda: WEIGHT_EPS * coverage[0], _OVER: lambda: coverage[0], _ADDITIVE: lambda: None}[ctx.mode]()
        d_background = (grad if shares is None else grad * shares[:, : image.shape[1], None]).sum(1).sum(0)
    return (*torch.ops.gs2d.rasterize_backward(grad, image, packed, rows, coverage, background, ctx.mode), d_background, None, None, None)


torch.library.register_autograd("gs2d::rasterize", _backward, setup_context=_setup, lib=_library)


def rasterize(screen, height, width, blend, background):
    "Blend Gaussians in pixel coordinates into an image (H, W, C)."
    means, conics, opacities, colors = screen
    channels = colors.shape[1]
    background = torch.as_tensor(background, dtype=torch.float32).expand(channels)
    images = []
    for k in range(0, channels, 3):
        part, behind = colors[:, k : k + 3], background[k : k + 3]
        if (missing := 3 - part.shape[1]) > 0:
            part, behind = torch.nn.functional.pad(part, (0, missing)), torch.nn.functional.pad(behind, (0, missing))
        images.append(torch.ops.gs2d.rasterize(means, conics, opacities, part, behind, height, width, _MODES[Blend(blend)])[0])
    if len(images) == 1 and channels == 3:
        return images[0]
    return torch.cat(images, -1)[..., :channels]


_statistics_cache = {}


def _window(height, width):
    "The SSIM window, padded with zeros to TAPS, and the size of the region where it fits."
    size = min(TAPS, height, width)
    size -= 1 - size % 2
    at = np.arange(size) - size // 2
    window = np.exp(-0.5 * (at / 1.5) ** 2)
    window = np.concatenate([window / window.sum(), np.zeros(TAPS - size)]).astype(np.float32)
    return window, height - size + 1, width - size + 1


def _statistics_of(target):
    "Local mean and variance of the target: kept as long as the tensor lives and its content stays the same."
    height, width, _ = target.shape
    stride = (width + LANES - 1) // LANES * LANES + LANES
    flat = _flat(target)
    block = 1 << 16
    prints = np.empty(-(-len(flat) // block), np.uint64)
    _run(_fingerprint, _even(len(prints), 2), flat.view(np.uint32), block, prints)
    key, content = id(target), (target.shape, prints.tobytes())
    found = _statistics_cache.get(key)
    if found is not None and found[0]() is target and found[1] == content:
        return found[2]
    window, valid_height, valid_width = _window(height, width)
    statistics = np.zeros(valid_height * 3 * 2 * stride, np.float32)
    _run(_target_statistics, _even(valid_height, 32), flat, window, valid_height, valid_width, height, width, statistics)
    _statistics_cache[key] = (weakref.ref(target, lambda _: _statistics_cache.pop(key, None)), content, statistics)
    return statistics


def _image_loss(image, target, l1_weight, ssim_weight, channels, with_grad):
    height, width, _ = image.shape
    window, valid_height, valid_width = _window(height, width)
    n_bands = -(-height // SSIM_BAND)
    sums = np.zeros((n_bands, 3))
    gradient = torch.empty_like(image) if with_grad else torch.empty(0, 0, 3)
    counts = channels * valid_height * valid_width, channels * height * width
    scales = np.float32(l1_weight / counts[1]), np.float32(-ssim_weight / counts[0])
    _run(_ssim_bands, _even(n_bands, 2), _flat(image), _flat(target), _statistics_of(target), window, valid_height, valid_width, *scales, with_grad, channels, height, width, _flat(gradient), sums)
    ssim, l1, mse = sums.sum(0) / (counts[0], counts[1], counts[1])
    return torch.tensor(l1_weight * l1 + ssim_weight * (1 - ssim), dtype=torch.float32), torch.tensor([ssim, l1, mse], dtype=torch.float32), gradient


_library.define("image_loss(Tensor image, Tensor target, float l1_weight, float ssim_weight, int channels, bool with_grad) -> (Tensor, Tensor, Tensor)")
_library.impl("image_loss", _image_loss, "CPU")


@torch.library.register_fake("gs2d::image_loss", lib=_library)
def _(image, target, l1_weight, ssim_weight, channels, with_grad):
    return image.new_empty(()), image.new_empty(3), torch.empty_like(image) if with_grad else image.new_empty(0, 0, 3)


def _loss_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, grad, *_):
    return None if grad is None else grad * ctx.saved_tensors[0], None, None, None, None, None


torch.library.register_autograd("gs2d::image_loss", _loss_backward, setup_context=_loss_setup, lib=_library)


def photometric(image, target, l1_weight=0.15, ssim_weight=0.85):
    "l1_weight·L1 + ssim_weight·(1 − SSIM), and the scores (SSIM, L1, MSE) without gradient."
    channels = image.shape[-1]
    with_grad = torch.is_grad_enabled() and image.requires_grad
    value, scores = 0.0, 0.0
    for k in range(0, channels, 3):
        part, goal = (image, target) if channels == 3 else (image[..., k : k + 3], target[..., k : k + 3])
        here = part.shape[-1]
        if here < 3:
            part, goal = (torch.nn.functional.pad(t, (0, 3 - here)) for t in (part, goal))
        v, s, _ = torch.ops.gs2d.image_loss(part, goal, l1_weight, ssim_weight, here, with_grad)
        if here == channels:
            return v, s
        value, scores = value + v * (here / channels), scores + s * (here / channels)
    return value, scores


def ssim(image, target):
    "Mean structural similarity of two images (H, W, C)."
    if target.requires_grad and torch.is_grad_enabled():
        value = 1 - photometric(target, image.detach(), 0.0, 1.0)[0]
        if not image.requires_grad:
            return value
        return value - value.detach() + 1 - photometric(image, target.detach(), 0.0, 1.0)[0]
    return 1 - photometric(image, target, 0.0, 1.0)[0]
