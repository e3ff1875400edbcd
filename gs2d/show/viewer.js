// A scene, or the recording of a training, drawn in the browser: what `scene.show()` and `save_html` put in a page.
//
// Conventions, the same as gs2d.renderer's: the domain has y up; pixels have y down, and pixel (i, j) is sampled at
// (j + ½, i + ½). A Gaussian is projected in float64 for every frame, so a deep zoom does not tremble, and is then
// drawn by WebGL2 into float textures, or by plain JavaScript. The parts, in order: decode (bytes to numbers),
// sceneAt (one moment), project (domain to screen), drawCPU and the two renderers, the Viewer, mount.
// It fetches nothing, keeps nothing, and writes what a page says as text only.

const FIELDS = { means: 2, log_scales: 2, rotations: 1, opacity_logits: 1, colors: 0 }; // channels; 0: the page says
const BLENDS = ["weighted", "additive", "over"];
const LARGEST = 1e12; // as gs2d.gaussians.LARGEST: what is farther away or thinner is not drawn
const DEEPEST = 1e11; // times: beyond it even float64 has no more digits for the centre of the view
const STRIDE = 20; // numbers of a projected Gaussian, see `project`
const TEXELS = STRIDE / 4, IN_A_ROW = 256; // how they lie in a texture
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const say = (x, digits = 3) => Number(x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
const count = (n) => n.toLocaleString("en");
const gaussians = (n) => `${count(n)} Gaussian${n === 1 ? "" : "s"}`;

// ------------------------------ the data

/** What is wrong with a page, as one sentence for the person who opened it. */
export class PageError extends Error {}
const need = (truth, sentence) => { if (!truth) throw new PageError(sentence); };
const DAMAGED = "This page is damaged: its data are not what its header says. Please save it again.";

async function inflate(text) {
  const canUnpack = typeof DecompressionStream === "function";
  need(canUnpack, "This browser is too old to unpack this page (it has no DecompressionStream).");
  try {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new PageError(DAMAGED);
  }
}

function checkHeader(page) {
  need(page?.format === "gs2d-page", "This is not a gs2d page.");
  need(page.version === 1, `This page has version ${page.version}; this viewer reads version 1. Please save it again.`);
  const numbers = (list, n) => Array.isArray(list) && list.length === n && list.every(Number.isFinite);
  const isInterval = (list) => numbers(list, 2) && list[0] < list[1];
  const { n, channels, fields, constants } = page;
  const rightField = (name, i) => {
    const field = fields[i], c = FIELDS[name] || channels;
    return field?.name === name && field.channels === c && numbers(field.low, c) && numbers(field.high, c)
      && (field.bits === 32 || (Number.isInteger(field.bits) && field.bits >= 1 && field.bits <= 16));
  };
  need(Number.isInteger(n) && n >= 0 && [1, 3, 4].includes(channels) && BLENDS.includes(page.blend)
    && isInterval(page.x_dim) && isInterval(page.y_dim) && numbers(page.background, channels)
    && Array.isArray(page.moments) && page.moments.length > 0 && page.moments.length <= 65535
    && ["cutoff_power", "floor", "eps", "max_alpha"].every((name) => Number.isFinite(constants?.[name]))
    && Array.isArray(fields) && Object.keys(FIELDS).every(rightField) && typeof page.data === "string", DAMAGED);
}

/** The numbers of a page: who lives when, and for every parameter all its values, moment after moment. */
export async function decode(page) {
  checkHeader(page);
  const bytes = await inflate(page.data), K = page.n, M = page.moments.length;
  need(bytes.length >= 8 * K, DAMAGED);
  const births = new Uint16Array(bytes.buffer, 0, K), deaths = new Uint16Array(bytes.buffer, 2 * K, K);
  const parents = new Int32Array(bytes.buffer, 4 * K, K);
  const starts = new Int32Array(M + 1); // where the values of a moment begin
  for (let m = 0; m < M; m++) {
    starts[m + 1] = starts[m];
    for (let k = 0; k < K; k++) starts[m + 1] += births[k] <= m && m < deaths[k];
  }
  const total = starts[M], size = page.fields.reduce((sum, f) => sum + f.channels * (f.bits === 32 ? 4 : 2), 0);
  need(bytes.length === 8 * K + size * total, DAMAGED);

  const ids = new Int32Array(total), before = new Int32Array(total); // whose value, and which one it is a change of
  let last = new Int32Array(K).fill(-1);
  for (let m = 0, i = 0; m < M; m++) {
    const now = new Int32Array(K).fill(-1);
    for (let k = 0; k < K; k++) {
      if (births[k] > m || m >= deaths[k]) continue;
      const parent = parents[k], orphan = births[k] < m || parent < 0;
      need(parent >= -1 && parent < K && (orphan || (m > 0 && last[parent] >= 0)), DAMAGED);
      ids[i] = k, before[i] = births[k] < m ? last[k] : orphan ? -1 : last[parent], now[k] = i++;
    }
    last = now;
  }

  const columns = []; // x, y, log σ₁, log σ₂, θ, opacity logit, colours: {values, low, step}
  let at = 8 * K;
  for (const { channels, low, high, bits } of page.fields) for (let c = 0; c < channels; c++) {
    if (bits === 32) {
      columns.push({ values: new Float32Array(bytes.buffer.slice(at, at += 4 * total)), low: 0, step: 1 });
      continue;
    }
    const values = new Uint16Array(total);
    for (let i = 0; i < total; i++) {
      const zigzag = bytes[at + i] | (bytes[at + total + i] << 8);
      values[i] = (before[i] < 0 ? 0 : values[before[i]]) + ((zigzag >> 1) ^ -(zigzag & 1));
    }
    at += 2 * total;
    columns.push({ values, low: low[c], step: (high[c] - low[c]) / (2 ** bits - 1) });
  }
  if (page.channels === 1) columns.push(columns[6], columns[6]); // grey is shown as three equal colours
  const background = page.channels === 1 ? Array(3).fill(page.background[0]) : page.background;
  return { page, background, channels: background.length, moments: M, n: K, parents, starts, ids, columns };
}

/** The Gaussians at a moment; between two, on their way: the newborn come out of their parent, the dying fade. */
export function sceneAt(data, moment) {
  const t = clamp(moment, 0, data.moments - 1), m = Math.floor(t), f = t - m;
  const rowsOf = (moment) => {
    const rows = new Int32Array(data.n).fill(-1);
    for (let i = data.starts[moment]; i < data.starts[moment + 1]; i++) rows[data.ids[i]] = i;
    return rows;
  };
  const here = rowsOf(m), next = f ? rowsOf(m + 1) : here;
  const ids = [], from = [], to = [], fades = [];
  for (let k = 0; k < data.n; k++) {
    if (here[k] < 0 && next[k] < 0) continue;
    const old = here[k] >= 0, stays = next[k] >= 0, parent = data.parents[k];
    const start = old ? here[k] : parent >= 0 ? here[parent] : -1;
    ids.push(k), from.push(start < 0 ? next[k] : start), to.push(stays ? next[k] : here[k]);
    fades.push(old && stays ? 1 : old ? 1 - f : f);
  }
  const columns = data.columns.map(({ values, low, step }) =>
    Float64Array.from(ids, (_, i) => low + step * (values[from[i]] * (1 - f) + values[to[i]] * f)));
  columns[5].forEach((logit, i, opacity) => { opacity[i] = fades[i] / (1 + Math.exp(-logit)); });
  return { n: ids.length, ids: Int32Array.from(ids), columns, data };
}

/** Which rows are among the `shown` most important ones, by opacity · σ₁ · σ₂; null: all of them. */
export function mostImportant(scene, shown) {
  if (!(shown < scene.n)) return null;
  const [, , log1, log2, , opacity] = scene.columns;
  const importance = opacity.map((o, i) => Math.log(o) + log1[i] + log2[i]);
  const order = Array.from(scene.ids.keys()).sort((i, j) => importance[j] - importance[i] || i - j);
  const keep = new Uint8Array(scene.n);
  for (const i of order.slice(0, shown)) keep[i] = 1;
  return keep;
}

// ------------------------------ projection

/**
 * The Gaussians that reach a frame {x, y, sx, sy, width, height, zoom}: its centre in domain units, pixels per unit.
 *
 * Points p are in pixels from the frame's centre, y down, and u = L p + u₀ is p in standard deviations from the mean,
 * so that power = |u|². For each one: the centre and two half axes of its box, u₀, L, 4 of colour, opacity.
 * A box much larger than the frame is cut to it, so that every number stays near the frame at any zoom.
 */
export function project(scene, frame, { size = 1, keep = null } = {}) {
  const [x, y, log1, log2, turn, opacity, ...colors] = scene.columns, { constants } = scene.data.page;
  const { sx, sy, zoom = 1 } = frame, W = frame.width / 2, H = frame.height / 2;
  const reach = Math.sqrt(constants.cutoff_power), farthest = LARGEST * Math.max(1, zoom);
  const out = new Float64Array(STRIDE * scene.n), rows = new Int32Array(scene.n);
  let n = 0;
  for (let i = 0; i < scene.n; i++) {
    if (keep && !keep[i]) continue;
    const s1 = size * Math.exp(log1[i]), s2 = size * Math.exp(log2[i]);
    const cos = Math.cos(turn[i]), sin = Math.sin(turn[i]);
    const mx = (x[i] - frame.x) * sx, my = (frame.y - y[i]) * sy;
    const ax = reach * s1 * cos * sx, ay = -reach * s1 * sin * sy;
    const bx = -reach * s2 * sin * sx, by = -reach * s2 * cos * sy;
    const wide = Math.hypot(ax, bx), high = Math.hypot(ay, by);
    if (!(Math.abs(mx) <= W + wide && Math.abs(my) <= H + high)) continue; // also where a number is NaN
    const l11 = cos / (s1 * sx), l12 = -sin / (s1 * sy), l21 = -sin / (s2 * sx), l22 = -cos / (s2 * sy);
    if (!(l11 * l11 + l21 * l21 <= LARGEST && l12 * l12 + l22 * l22 <= LARGEST && s1 < 1e38 && s2 < 1e38)) continue;
    if (!(Math.max(Math.abs(mx), Math.abs(my)) <= farthest && opacity[i] >= 0)) continue;
    if (!colors.every((color) => Number.isFinite(color[i]))) continue;
    let box = [mx, my, ax, ay, bx, by];
    if (Math.max(wide, high) > 2 * (W + H)) {
      const left = Math.max(-W, mx - wide), right = Math.min(W, mx + wide);
      const top = Math.max(-H, my - high), bottom = Math.min(H, my + high);
      box = [(left + right) / 2, (top + bottom) / 2, (right - left) / 2, 0, 0, (bottom - top) / 2];
    }
    const dx = frame.x - x[i], dy = frame.y - y[i], u1 = (cos * dx + sin * dy) / s1, u2 = (cos * dy - sin * dx) / s2;
    const [red, green, blue, fourth = 0] = colors, at = STRIDE * n;
    out.set(box, at);
    out.set([u1, u2, l11, l12, l21, l22, red[i], green[i], blue[i], fourth && fourth[i], opacity[i]], at + 6);
    rows[n++] = i;
  }
  return { n, rows: rows.subarray(0, n), values: out, frame, data: scene.data };
}

// ------------------------------ drawing

/** RGBA bytes of projected Gaussians, row 0 on top; of four channels the colours are times alpha, as in `render`. */
export function drawCPU({ n, values, frame, data }) {
  const { background, channels: C, page: { blend, constants } } = data;
  const { cutoff_power: cutoff, floor, eps, max_alpha: most } = constants;
  const { width, height } = frame, W = width / 2, H = height / 2, over = blend === "over", cells = C + 1;
  const sums = new Float32Array(width * height * cells); // the colours, then Σ o w', or what light is left
  if (over) for (let p = C; p < sums.length; p += cells) sums[p] = 1;
  for (let i = 0; i < n; i++) {
    const numbers = values.subarray(STRIDE * i, STRIDE * (i + 1)), [x, y, ax, ay, bx, by, u1, u2] = numbers;
    const [l11, l12, l21, l22, red, green, blue, fourth, opacity] = numbers.subarray(8);
    const strength = opacity / (1 - floor), a = l11 * l11 + l21 * l21, q = Math.exp(-a), high = Math.hypot(ay, by);
    const bottom = Math.min(height, Math.floor(y + high + H + 0.5)), wide = Math.hypot(ax, bx);
    for (let row = Math.max(0, Math.ceil(y - high + H - 0.5)); row < bottom; row++) {
      const py = row + 0.5 - H, k1 = l12 * py + u1, k2 = l22 * py + u2; // power = |(l11, l21) x + (k1, k2)|²
      const cross = l11 * k2 - l21 * k1, inside = a * cutoff - cross * cross;
      if (!(inside >= 0)) continue;
      const middle = -(l11 * k1 + l21 * k2) / a, half = Math.sqrt(inside) / a;
      const first = Math.max(0, Math.ceil(Math.max(middle - half, x - wide - 1) + W - 0.5));
      const end = Math.min(width, Math.floor(Math.min(middle + half, x + wide + 1) + W - 0.5) + 1);
      const v1 = l11 * (first + 0.5 - W) + k1, v2 = l21 * (first + 0.5 - W) + k2;
      let w = Math.exp(-0.5 * (v1 * v1 + v2 * v2)), ratio = Math.exp(-0.5 * a - (l11 * v1 + l21 * v2));
      for (let p = cells * (row * width + first), stop = cells * (row * width + end); p < stop; p += cells) {
        let share = strength * (w > floor ? w - floor : 0);
        w *= ratio, ratio *= q; // exp of a square, one pixel on
        if (over) {
          share = (share < most ? share : most) * sums[p + C];
          sums[p + C] -= share;
        } else sums[p + C] += share;
        sums[p] += share * red, sums[p + 1] += share * green, sums[p + 2] += share * blue;
        if (C === 4) sums[p + 3] += share * fourth;
      }
    }
  }
  const image = new Uint8ClampedArray(4 * width * height).fill(255); // clamps and rounds what is written
  for (let p = 0, o = 0; o < image.length; p += cells, o += 4) {
    const rest = sums[p + C], scale = blend === "weighted" ? 255 / (rest + eps) : 255;
    const ground = blend === "weighted" ? eps : over ? rest : 1;
    for (let c = 0; c < C; c++) image[o + c] = scale * (sums[p + c] + ground * background[c]);
  }
  return image;
}

/** Draws with plain JavaScript. */
export class CanvasRenderer {
  name = "canvas";
  constructor(canvas) {
    this.context = canvas.getContext("2d");
    need(this.context, "This browser can draw neither with WebGL2 nor on a plain canvas.");
  }
  show(screen, clip) {
    const { width, height } = screen.frame, image = drawCPU(screen), { canvas } = this.context;
    if (screen.data.channels === 4) for (let o = 0; o < image.length; o += 4) // a canvas wants them not times alpha
      for (let c = 0; c < 3; c++) image[o + c] = image[o + c] * 255 / Math.max(1, image[o + 3]);
    if (canvas.width !== width || canvas.height !== height) canvas.width = width, canvas.height = height;
    this.context.clearRect(0, 0, width, height);
    this.context.putImageData(new ImageData(image, width, height), 0, 0, clip.x, clip.y, clip.width, clip.height);
  }
  pixels(screen) { return drawCPU(screen); }
  destroy() {}
}

const BOX_SHADER = `#version 300 es
precision highp float; precision highp sampler2D;
uniform sampler2D gaussians; uniform vec2 half_size; uniform int last;
flat out vec2 u0; flat out vec4 shape; flat out vec4 color; flat out float opacity;
void main() {                              // two triangles each; an instance each would be slow
  int i = gl_VertexID / 6, k = gl_VertexID % 6, corner = k < 3 ? k : k - 2;
  if (last >= 0) i = last - i;             // the last one lies at the back, and is drawn first
  ivec2 at = ivec2(${TEXELS} * (i % ${IN_A_ROW}), i / ${IN_A_ROW});
  vec4 box = texelFetch(gaussians, at, 0), more = texelFetch(gaussians, at + ivec2(1, 0), 0);
  u0 = more.zw;
  shape = texelFetch(gaussians, at + ivec2(2, 0), 0);
  color = texelFetch(gaussians, at + ivec2(3, 0), 0);
  opacity = texelFetch(gaussians, at + ivec2(4, 0), 0).r;
  vec2 side = 1.001 * (2.0 * vec2(corner & 1, corner >> 1) - 1.0);  // a little more: corners are rounded
  gl_Position = vec4((box.xy + side.x * box.zw + side.y * more.xy) / half_size, 0, 1);
}`;
const WEIGHT_SHADER = `#version 300 es
precision highp float;
uniform vec2 half_size; uniform float cutoff, low, most;
flat in vec2 u0; flat in vec4 shape; flat in vec4 color; flat in float opacity;
layout(location = 0) out vec4 first; layout(location = 1) out vec4 second;
void main() {
  vec2 p = gl_FragCoord.xy - half_size;    // row 0 of the texture is the top of the picture
  vec2 u = vec2(dot(shape.xy, p), dot(shape.zw, p)) + u0;
  float power = dot(u, u);
  if (!(power <= cutoff)) discard;
  float share = min(most, opacity * max(0.0, exp(-0.5 * power) - low) / (1.0 - low));
  first = vec4(color.rgb * share, share);
  second = vec4(color.a * share, 0, 0, share);
}`;
const SCREEN_SHADER = `#version 300 es
void main() { gl_Position = vec4(4 * (gl_VertexID & 1) - 1, 2 * (gl_VertexID & 2) - 1, 0, 1); }`;
const BLEND_SHADER = `#version 300 es
precision highp float; precision highp sampler2D;
uniform sampler2D first, second; uniform vec4 background; uniform float eps; uniform int blend, channels, flip;
out vec4 color;
void main() {
  ivec2 at = ivec2(gl_FragCoord.xy);
  if (flip > 0) at.y = flip - 1 - at.y;
  vec4 sum = texelFetch(first, at, 0); float total = sum.a;
  sum.a = texelFetch(second, at, 0).r;     // of four channels
  if (blend == 0) sum = (sum + eps * background) / (total + eps);
  if (blend == 1) sum += background;
  color = channels == 4 ? clamp(sum, 0.0, 1.0) : vec4(clamp(sum.rgb, 0.0, 1.0), 1);
}`;

/** Draws with WebGL2: all boxes in one call into float textures, then the division. Throws where that cannot be. */
export class GLRenderer {
  name = "webgl2";
  constructor(canvas, { half = false } = {}) {
    const gl = this.gl = canvas.getContext("webgl2", { antialias: false, depth: false });
    if (!gl) throw new Error("no WebGL2");
    const floats = gl.getExtension("EXT_color_buffer_float"), blends = gl.getExtension("EXT_float_blend");
    if (!floats && !gl.getExtension("EXT_color_buffer_half_float")) throw new Error("no float targets");
    this.format = floats && blends && !half ? gl.RGBA32F : gl.RGBA16F;
    this.boxes = this.program(BOX_SHADER, WEIGHT_SHADER, ["gaussians", "half_size", "last", "cutoff", "low", "most"]);
    const looks = ["first", "second", "background", "eps", "blend", "channels", "flip"];
    this.screen = this.program(SCREEN_SHADER, BLEND_SHADER, looks);
    this.gaussians = { texture: null, rows: 0 };
    this.targets = { width: 0, height: 0, textures: [], frame: gl.createFramebuffer() };
    this.resize(4, 4, 2);
    if (gl.checkFramebufferStatus(gl.FRAMEBUFFER) !== gl.FRAMEBUFFER_COMPLETE) throw new Error("no float targets");
  }
  program(vertex, fragment, uniforms) {
    const { gl } = this, program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || "no context");
    return { program, at: Object.fromEntries(uniforms.map((name) => [name, gl.getUniformLocation(program, name)])) };
  }
  texture(format, width, height) {
    const { gl } = this, texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, format, width, height);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST); // floats have no other
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    return texture;
  }
  upload({ n, values }) {
    const { gl, gaussians } = this, rows = Math.ceil(n / IN_A_ROW);
    const numbers = new Float32Array(rows * IN_A_ROW * STRIDE);
    numbers.set(values.subarray(0, STRIDE * n));
    if (rows > gaussians.rows) {
      gl.deleteTexture(gaussians.texture);
      Object.assign(gaussians, { rows, texture: this.texture(gl.RGBA32F, TEXELS * IN_A_ROW, rows) });
    }
    gl.bindTexture(gl.TEXTURE_2D, gaussians.texture);
    if (rows) gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, TEXELS * IN_A_ROW, rows, gl.RGBA, gl.FLOAT, numbers);
  }
  /** One texture for three channels, two for four, bound to be drawn into. */
  resize(width, height, number) {
    const { gl, targets } = this;
    gl.bindFramebuffer(gl.FRAMEBUFFER, targets.frame);
    if (targets.width === width && targets.height === height && targets.textures.length === number) return;
    targets.textures.forEach((texture) => gl.deleteTexture(texture));
    Object.assign(targets, { width, height, textures: [] });
    for (let k = 0; k < 2; k++) {
      if (k < number) targets.textures.push(this.texture(this.format, width, height));
      const texture = targets.textures[k] ?? null;
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0 + k, gl.TEXTURE_2D, texture, 0);
    }
    gl.drawBuffers([gl.COLOR_ATTACHMENT0, number > 1 ? gl.COLOR_ATTACHMENT1 : gl.NONE]);
  }
  accumulate(screen, clip) {
    const { gl, boxes } = this, { n, frame: { width, height }, data } = screen;
    const { blend, constants } = data.page, [r, g, b, a = 0] = data.background;
    this.resize(width, height, data.channels === 4 ? 2 : 1);
    gl.viewport(0, 0, width, height);
    gl.enable(gl.SCISSOR_TEST);
    gl.scissor(clip.x, clip.y, clip.width, clip.height);
    gl.clearBufferfv(gl.COLOR, 0, blend === "over" ? [r, g, b, 0] : [0, 0, 0, 0]);
    if (data.channels === 4) gl.clearBufferfv(gl.COLOR, 1, blend === "over" ? [a, 0, 0, 0] : [0, 0, 0, 0]);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, blend === "over" ? gl.ONE_MINUS_SRC_ALPHA : gl.ONE);
    gl.useProgram(boxes.program);
    gl.uniform2f(boxes.at.half_size, width / 2, height / 2);
    gl.uniform1f(boxes.at.cutoff, constants.cutoff_power);
    gl.uniform1f(boxes.at.low, constants.floor);
    gl.uniform1f(boxes.at.most, blend === "over" ? constants.max_alpha : 1e30);
    gl.uniform1i(boxes.at.last, blend === "over" ? n - 1 : -1);
    gl.uniform1i(boxes.at.gaussians, 0);
    gl.activeTexture(gl.TEXTURE0);
    this.upload(screen);
    gl.drawArrays(gl.TRIANGLES, 0, 6 * n);
    gl.disable(gl.BLEND);
  }
  resolve({ data }, flip) {
    const { gl, screen: { program, at }, targets: { textures } } = this, { blend, constants } = data.page;
    gl.useProgram(program);
    textures.concat(textures).slice(0, 2).forEach((texture, k) => {
      gl.activeTexture(gl.TEXTURE0 + k);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    gl.uniform1i(at.first, 0);
    gl.uniform1i(at.second, 1);
    gl.uniform4fv(at.background, [...data.background, 0].slice(0, 4));
    gl.uniform1f(at.eps, constants.eps);
    gl.uniform1i(at.blend, BLENDS.indexOf(blend));
    gl.uniform1i(at.channels, data.channels);
    gl.uniform1i(at.flip, flip);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
  show(screen, clip) {
    const { gl } = this, { width, height } = screen.frame;
    if (gl.canvas.width !== width || gl.canvas.height !== height) gl.canvas.width = width, gl.canvas.height = height;
    this.accumulate(screen, clip);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.disable(gl.SCISSOR_TEST);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.SCISSOR_TEST);
    gl.scissor(clip.x, height - clip.y - clip.height, clip.width, clip.height);
    this.resolve(screen, height);
  }
  pixels(screen) {
    const { gl } = this, { width, height } = screen.frame, image = new Uint8ClampedArray(4 * width * height);
    this.accumulate(screen, { x: 0, y: 0, width, height });
    const frame = gl.createFramebuffer(), bytes = gl.createRenderbuffer();
    gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
    gl.bindRenderbuffer(gl.RENDERBUFFER, bytes);
    gl.renderbufferStorage(gl.RENDERBUFFER, gl.RGBA8, width, height);
    gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.RENDERBUFFER, bytes);
    this.resolve(screen, 0);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, image);
    gl.deleteFramebuffer(frame);
    gl.deleteRenderbuffer(bytes);
    return image;
  }
  destroy() { this.gl.getExtension("WEBGL_lose_context")?.loseContext(); }
}

// ------------------------------ the viewer

const REST = 160; // ms without movement after which the picture is drawn in all its pixels
const LENGTH = 12; // s, of a recording played from its start to its end

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(key, value, { passive: false });
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/**
 * One picture on a page, drawn when something has changed. A program has load, setView, setMoment, setOptions, play,
 * pause, pick, select, pixels, idle and destroy, and reads view, moment, options, playing, picked, renderer.
 */
export class Viewer {
  options = {
    outlines: false, // ellipses at two standard deviations
    size: 1, // times every standard deviation
    shown: null, // how many Gaussians, the most important ones; null: all
    wipe: null, // in [0, 1]: right of there is the picture to reach; null: it is hidden
    controls: true, // the bar below the picture
    theme: "auto", // or "light", "dark"
    renderer: "auto", // or "webgl2", "canvas": for the first drawing only
  };
  view = { x: 0, y: 0, zoom: 1 };
  moment = 0;
  playing = false;
  picked = null; // the numbers of the Gaussian that is shown; {pinned: true} once it was clicked
  #scene = null; // of this moment, and which rows of it are shown
  #keep = null;
  #request = 0; // of the next frame
  #changed = true;
  #waiting = []; // those who wait for rest
  #movingUntil = 0;
  #scale = 1; // of a frame's sides while something moves
  #last = null; // {time, scale} of the frame before, while something moves
  #losses = 0;
  #playhead = 0;

  constructor(root, options = {}) {
    this.root = root;
    this.ground = element("div", { className: "gs2d-ground" });
    this.over = element("canvas", { className: "gs2d-over", tabIndex: 0, role: "application" });
    this.stage = element("div", { className: "gs2d-stage" }, this.ground, this.over);
    root.classList.add("gs2d-viewer");
    root.replaceChildren(this.stage);
    this.controls = new Controls(this);
    this.#newPainter(options.renderer ?? "auto");
    this.setOptions(options);
    this.resized = new ResizeObserver(() => this.#change());
    this.resized.observe(this.stage);
  }

  // ------------------------------ what a program calls

  get renderer() { return this.painter.name; }
  get domain() {
    const { x_dim: [x0, x1], y_dim: [y0, y1] } = this.data.page;
    return { x0, x1, y0, y1, width: x1 - x0, height: y1 - y0 };
  }
  /** CSS pixels per domain unit. */
  get unit() {
    const { clientWidth, clientHeight } = this.stage;
    return Math.min(clientWidth / this.domain.width, clientHeight / this.domain.height) * this.view.zoom;
  }
  /** The Gaussians of this moment. */
  get scene() {
    if (!this.#scene) {
      this.#scene = sceneAt(this.data, this.moment);
      this.#keep = mostImportant(this.#scene, this.options.shown ?? Infinity);
    }
    return this.#scene;
  }

  /** Shows a page. After the first one, the view and what the person has chosen stay as they are. */
  async load(page) {
    const data = await decode(page), first = !this.data, image = new Image();
    const hasTarget = typeof page.target === "string" && page.target.startsWith("data:image/");
    if (hasTarget) image.src = page.target;
    this.target = hasTarget && (await image.decode().then(() => true, () => false)) ? image : null;
    const atEnd = first || this.moment === this.data.moments - 1; // a recording opens with how it ended
    this.data = data;
    this.setMoment(atEnd ? Infinity : this.moment);
    if (first) this.reset();
    this.controls.describe();
  }

  /** Centre in domain units; at zoom 1 the whole domain fits. */
  setView({ x = this.view.x, y = this.view.y, zoom = this.view.zoom }) {
    const { x0, x1, y0, y1 } = this.domain;
    if (![x, y, zoom].every(Number.isFinite)) throw new TypeError("expected numbers x, y and zoom");
    this.view = { x: clamp(x, x0, x1), y: clamp(y, y0, y1), zoom: clamp(zoom, 0.5, DEEPEST) };
    this.#change();
  }
  reset() {
    const { x0, y0, width, height } = this.domain;
    this.setView({ x: x0 + width / 2, y: y0 + height / 2, zoom: 1 });
  }

  /** From 0 to the number of moments less one; between two moments the Gaussians are on their way. */
  setMoment(moment) {
    this.moment = this.#playhead = clamp(moment, 0, this.data.moments - 1);
    this.#renew();
  }

  setOptions(options) {
    for (const name of Object.keys(options)) if (!(name in this.options)) throw new TypeError(`no option ${name}`);
    Object.assign(this.options, options);
    this.root.dataset.theme = this.options.theme;
    if ("size" in options || "shown" in options) this.#renew();
    this.#change();
  }

  play() {
    if (this.moment >= this.data.moments - 1) this.setMoment(0);
    this.playing = this.data.moments > 1;
    this.#change();
  }
  pause() {
    this.playing = false;
    this.#change();
  }

  /** The Gaussian that gives most to a point of the domain, with its numbers; null where none reaches. */
  pick(x, y) {
    const { page: { blend, constants } } = this.data, { unit, view: { zoom } } = this;
    const { n, rows, values } = this.#project({ x, y, sx: unit, sy: unit, width: 0, height: 0, zoom });
    let best = -1, most = 0, share = 0, total = blend === "weighted" ? constants.eps : 0, light = 1;
    for (let i = 0; i < n; i++) {
      const [u1, u2, , , , , red, green, blue, , opacity] = values.subarray(STRIDE * i + 6);
      const power = u1 * u1 + u2 * u2, w = power <= constants.cutoff_power ? Math.exp(-power / 2) : 0;
      let part = opacity * Math.max(0, w - constants.floor) / (1 - constants.floor);
      if (blend === "over") light -= part = Math.min(constants.max_alpha, part) * light;
      total += part;
      const gives = blend === "additive" ? part * Math.max(...[red, green, blue].map(Math.abs)) : part;
      if (gives > most) most = gives, best = rows[i], share = part;
    }
    const shares = { weighted: share / total, over: share, additive: null }; // of a sum nobody has a share
    return best < 0 ? null : { ...this.numbers(best), share: shares[blend] };
  }
  /** Shows the numbers of a Gaussian, by its row in this moment's scene, and its outline; null: of none. */
  select(row) {
    this.#pick(row === null ? null : { ...this.numbers(row), pinned: true });
  }
  numbers(row) {
    const [x, y, log1, log2, turn, opacity, ...color] = this.scene.columns.map((column) => column[row]);
    const angle = ((turn * 180 / Math.PI) % 180 + 180) % 180;
    return { index: row, id: this.scene.ids[row], x, y, sigma: [log1, log2].map(Math.exp), angle, opacity, color };
  }

  /** RGBA bytes at any size, row 0 on top, which the domain fills; with a view, its part around that centre. */
  pixels(width, height, { x, y, zoom = 1 } = {}) {
    const { x0, y0, width: w, height: h } = this.domain, sx = width / w * zoom, sy = height / h * zoom;
    const frame = { x: x ?? x0 + w / 2, y: y ?? y0 + h / 2, sx, sy, width, height, zoom };
    return this.painter.pixels(this.#project(frame));
  }

  /** Resolves when nothing is left to draw; while playing, after the next frame. */
  idle() {
    return this.#request ? new Promise((resolve) => this.#waiting.push(resolve)) : Promise.resolve();
  }

  destroy() {
    this.destroyed = true;
    cancelAnimationFrame(this.#request);
    this.resized.disconnect();
    this.controls.destroy();
    this.painter.destroy();
    this.root.replaceChildren();
    this.#waiting.splice(0).forEach((resolve) => resolve());
  }

  // ------------------------------ what the hands call

  /** A pointer's place in domain units; without one, the middle of the picture. */
  placeOf(event) {
    const { left, top } = this.stage.getBoundingClientRect(), { clientWidth, clientHeight } = this.stage;
    if (!event) return { x: this.view.x, y: this.view.y };
    const dx = event.clientX - left - clientWidth / 2, dy = event.clientY - top - clientHeight / 2;
    return { x: this.view.x + dx / this.unit, y: this.view.y - dy / this.unit };
  }
  /** Zooms so that what is under the pointer stays there. */
  zoomAt(factor, event) {
    const { x, y } = this.placeOf(event), zoom = clamp(this.view.zoom * factor, 0.5, DEEPEST), k = this.view.zoom / zoom;
    this.moving();
    this.setView({ x: x + (this.view.x - x) * k, y: y + (this.view.y - y) * k, zoom });
  }
  /** Moves the picture by CSS pixels. */
  pan(dx, dy) {
    this.moving();
    this.setView({ x: this.view.x - dx / this.unit, y: this.view.y + dy / this.unit });
  }
  moving() { this.#movingUntil = performance.now() + REST; }
  hover(event) {
    if (this.picked?.pinned) return;
    const { x, y } = this.placeOf(event);
    this.#pick(event ? this.pick(x, y) : null);
  }
  pin(event) {
    const { x, y } = this.placeOf(event), found = this.pick(x, y);
    const again = this.picked?.pinned && found?.id === this.picked.id; // a second click lets go
    this.#pick(found && !again ? { ...found, pinned: true } : null);
  }
  #pick(picked) {
    if (picked || this.picked) this.#change();
    this.picked = picked;
  }

  // ------------------------------ drawing

  #newPainter(wanted) {
    const old = this.painter?.canvas, fresh = () => element("canvas", { className: "gs2d-scene", role: "img" });
    let canvas = fresh(), painter = null;
    if (wanted !== "canvas" && this.#losses < 3) try {
      painter = new GLRenderer(canvas);
      canvas.addEventListener("webglcontextlost", () => this.#lost(canvas));
    } catch (error) {
      if (wanted === "webgl2") throw error;
      canvas = fresh(); // one that was asked for WebGL2 has nothing else to give
    }
    this.painter = Object.assign(painter ?? new CanvasRenderer(canvas), { canvas });
    old?.remove();
    this.ground.after(canvas);
  }
  #lost(canvas) { // the driver took everything away: a new canvas is given a new context, or draws without one
    if (this.destroyed || canvas !== this.painter.canvas) return;
    this.#losses++;
    this.#newPainter("auto");
    this.controls.describe();
    this.#change();
  }

  #renew() { // other Gaussians: what the picked one gave to a place is no longer true
    this.#scene = null;
    if (this.picked) this.picked.share = null;
    this.#change();
  }
  #change() {
    this.#changed = true;
    this.#schedule();
  }
  #schedule() {
    if (this.#request || this.destroyed || !this.data) return;
    this.#request = requestAnimationFrame((time) => this.#frame(time));
  }
  #frame(time) {
    this.#request = 0;
    const moving = this.playing || performance.now() < this.#movingUntil, last = this.#last;
    if (moving && last) { // the time from one frame to the next tells what one costs
      const took = time - last.time;
      this.#scale = clamp(this.#scale * clamp(Math.sqrt(33 / took), 0.5, 1.05), 0.25, 1);
      if (this.playing) this.#advance(Math.min(took, 200) / 1000);
    }
    const scale = moving ? Math.ceil(8 * this.#scale) / 8 : 1;
    if (this.#changed || last?.scale < scale) {
      this.#changed = false;
      this.draw(scale);
    }
    this.#last = moving ? { time, scale } : null;
    if (moving || this.#changed) this.#schedule();
    if (!this.#request || this.playing) this.#waiting.splice(0).forEach((resolve) => resolve());
  }
  #advance(seconds) {
    const end = this.data.moments - 1, playhead = this.#playhead + seconds * end / Math.min(LENGTH, end);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches; // then from moment to moment
    this.playing = playhead < end;
    this.setMoment(calm ? Math.floor(playhead) : playhead);
    this.#playhead = playhead;
  }

  #project(frame) {
    return project(this.scene, frame, { size: this.options.size, keep: this.#keep });
  }

  /** Draws now, with `scale` times the screen's pixels along each side. */
  draw(scale = 1) {
    const { clientWidth: w, clientHeight: h } = this.stage, { domain, unit, view: { x, y, zoom } } = this;
    if (!w || !h) return; // hidden
    const ratio = Math.min(devicePixelRatio || 1, 4096 / Math.max(w, h)), fine = ratio * scale;
    const left = w / 2 + (domain.x0 - x) * unit, top = h / 2 + (y - domain.y1) * unit; // of the domain, in CSS pixels
    const right = left + domain.width * unit, bottom = top + domain.height * unit;
    const seen = {
      left: clamp(left, 0, w), right: clamp(right, 0, w), top: clamp(top, 0, h), bottom: clamp(bottom, 0, h) };
    const clip = { x: Math.round(seen.left * fine), y: Math.round(seen.top * fine) };
    clip.width = Math.round(seen.right * fine) - clip.x;
    clip.height = Math.round(seen.bottom * fine) - clip.y;
    const size = { width: Math.round(w * fine), height: Math.round(h * fine) };
    const screen = this.#project({ x, y, sx: unit * fine, sy: unit * fine, ...size, zoom });
    this.painter.show(screen, clip);
    for (const canvas of [this.painter.canvas, this.over]) canvas.style.cssText = `width: ${w}px; height: ${h}px`;
    const wiped = this.target && this.options.wipe !== null; // the target may be transparent: nothing lies behind it
    if (wiped) this.painter.canvas.style.clipPath = `inset(0 ${100 - 100 * this.options.wipe}% 0 0)`;
    this.ground.style.inset = `${seen.top}px ${w - seen.right}px ${h - seen.bottom}px ${seen.left}px`;

    const pen = this.over.getContext("2d");
    Object.assign(this.over, { width: Math.round(w * ratio), height: Math.round(h * ratio) }); // also clears it
    pen.scale(ratio, ratio);
    if (wiped) this.#drawTarget(pen, seen, { left, top, right, bottom }, w, ratio);
    const row = this.picked ? this.scene.ids.indexOf(this.picked.id) : -1;
    if (this.options.outlines) this.#drawOutlines(pen, screen.rows, [["#0006", 2], ["#fffc", 0.8]], w, h);
    if (row >= 0) this.#drawOutlines(pen, [row], [["#000c", 4], ["#fff", 2]], w, h, 4);
    this.controls.update();
  }

  #drawTarget(pen, seen, box, w, ratio) {
    const { target } = this, from = Math.max(seen.left, this.options.wipe * w);
    const width = seen.right - from, height = seen.bottom - seen.top;
    const kx = target.naturalWidth / (box.right - box.left), ky = target.naturalHeight / (box.bottom - box.top);
    if (width <= 0 || height <= 0) return;
    pen.imageSmoothingEnabled = kx > 0.5 * ratio; // a pixel is a square, and is shown as one
    pen.drawImage(target, (from - box.left) * kx, (seen.top - box.top) * ky, width * kx, height * ky,
      from, seen.top, width, height);
  }

  #drawOutlines(pen, rows, styles, w, h, cross = 0) {
    const { unit, view, options: { size } } = this, [x, y, log1, log2, turn] = this.scene.columns, path = new Path2D();
    for (const i of rows) {
      const cx = w / 2 + (x[i] - view.x) * unit, cy = h / 2 + (view.y - y[i]) * unit;
      const r1 = 2 * size * Math.exp(log1[i]) * unit, r2 = 2 * size * Math.exp(log2[i]) * unit;
      for (const [dx, dy] of [[cross, 0], [0, cross]]) path.moveTo(cx - dx, cy - dy), path.lineTo(cx + dx, cy + dy);
      if (!(Math.max(r1, r2) < 1e6)) continue; // where a line is all that could be seen of it
      path.moveTo(cx + r1 * Math.cos(turn[i]), cy - r1 * Math.sin(turn[i]));
      path.ellipse(cx, cy, r1, r2, -turn[i], 0, 2 * Math.PI);
    }
    for (const [strokeStyle, lineWidth] of styles) {
      Object.assign(pen, { strokeStyle, lineWidth });
      pen.stroke(path);
    }
  }
}

// ------------------------------ the controls

const ICONS = {
  plus: "M8 3v10M3 8h10", minus: "M3 8h10", whole: "M3 6V3h3M10 3h3v3M13 10v3h-3M6 13H3v-3",
  play: "M5 3l8 5-8 5z", pause: "M5 3v10M11 3v10",
};
const HELP = [
  ["+  −  wheel, pinch", "zoom, as deep as you like"],
  ["arrows, drag", "move the picture"],
  ["0 or Home", "the whole picture"],
  ["point, click, Enter", "the numbers of one Gaussian (Enter: the one in the middle)"],
  ["O", "outlines, at two standard deviations"],
  ["C", "compare with the picture to reach"],
  ["Space", "play or pause"],
  [", and .", "one moment back, one on"],
  ["Esc", "let go of the Gaussian"],
];

function icon(name) {
  const [node, path] = ["svg", "path"].map((kind) => document.createElementNS("http://www.w3.org/2000/svg", kind));
  node.setAttribute("viewBox", "0 0 16 16");
  node.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  node.append(path);
  return node;
}
const named = (name, node) => {
  node.setAttribute("aria-label", name);
  return node;
};
const button = (name, content, click, properties = {}) =>
  named(name, element("button", { type: "button", title: name, click, ...properties }, content));
const range = (name, properties, change) =>
  named(name, element("input", { type: "range", ...properties, input: (event) => change(Number(event.target.value)) }));
const pairs = (list) => list.flatMap(([name, ...what]) => [element("dt", {}, name), element("dd", {}, ...what)]);
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const tell = (slider, node, text) => {
  put(node, text);
  slider.setAttribute("aria-valuetext", text);
};

const FRAMED = window.top !== window; // then one finger and the wheel scroll the page around it, until it is clicked

/** What a person sees around the picture, and does to it. */
class Controls {
  #pointers = new Map();

  constructor(viewer) {
    this.viewer = viewer;
    const { stage, over, root } = viewer, text = (name, className) => this[name] = element("span", { className });
    const group = (...children) => element("span", { className: "gs2d-group" }, ...children);
    const set = (options) => {
      viewer.moving();
      viewer.setOptions(options);
    };
    const scrub = (moment) => {
      viewer.moving();
      viewer.playing = false;
      viewer.setMoment(moment);
    };
    const hands = {
      wheel: (event) => this.#wheel(event), dblclick: (event) => viewer.zoomAt(2, event),
      pointerdown: (event) => this.#down(event), pointermove: (event) => this.#drag(event),
      pointerup: (event) => this.#up(event), pointercancel: (event) => this.#up(event),
      touchmove: (event) => event.touches.length > 1 && event.preventDefault(), // two fingers never scroll
      pointerleave: () => viewer.hover(null) };
    for (const [name, run] of Object.entries(hands)) over.addEventListener(name, run, { passive: false });
    over.classList.toggle("gs2d-framed", FRAMED);
    document.addEventListener("keydown", this.keydown = (event) => this.#key(event));

    this.divider = element("div", { className: "gs2d-divider" });
    this.wipe = range("Where the picture to reach begins", { className: "gs2d-wipe", min: 0, max: 1, step: 0.01 },
      (wipe) => set({ wipe }));
    this.card = element("dl", { className: "gs2d-card" });
    this.note = element("div", { className: "gs2d-note" });
    stage.append(this.divider, this.wipe, this.card, this.note);

    this.play = button("Play", icon("play"), () => (viewer.playing ? viewer.pause() : viewer.play()));
    this.scrubber = range("Moment of the training", { min: 0, step: "any" }, scrub);
    this.curve = element("div", { className: "gs2d-curve" });
    this.timeline = element("div", { className: "gs2d-timeline" }, this.play,
      element("div", { className: "gs2d-track" }, this.curve, this.scrubber), text("when", "gs2d-when"));

    this.size = range("Size of the Gaussians", { min: 0.05, max: 1, step: 0.01 }, (size) => set({ size }));
    this.shown = range("Gaussians shown, the most important first", { min: 0, max: 1, step: 0.005 },
      (value) => set({ shown: this.#shownAt(value) }));
    this.outlines = button("Outlines", "Outlines", () => set({ outlines: !viewer.options.outlines }));
    this.compare = button("Compare", "Compare", () => set({ wipe: viewer.options.wipe === null ? 0.5 : null }));
    const zoom = group(
      button("Zoom out", icon("minus"), () => this.#zoom(1 / 1.5)), text("zoom", "gs2d-zoom"),
      button("Zoom in", icon("plus"), () => this.#zoom(1.5)),
      button("The whole picture", icon("whole"), () => viewer.reset()));
    const help = button("What you can do, and keys", "?", () => this.help.showModal());
    this.title = element("strong");
    this.about = element("span");
    this.bar = element("div", { className: "gs2d-bar" }, this.timeline, element("div", { className: "gs2d-row" },
      element("div", { className: "gs2d-title" }, this.title, this.about), zoom,
      element("label", {}, "Size", this.size, text("sizeText", "gs2d-value")),
      element("label", {}, "Shown", this.shown, text("shownText", "gs2d-value")),
      group(this.outlines, this.compare, help)));
    this.help = named("What you can do", element("dialog", { className: "gs2d-help" }, element("dl", {}, ...pairs(HELP)),
      button("Close", "Close", () => this.help.close())));
    this.status = element("div", { className: "gs2d-status", role: "status" });
    root.append(this.bar, this.help, this.status);
  }
  destroy() {
    document.removeEventListener("keydown", this.keydown);
    clearTimeout(this.speaking);
  }

  /** What stays the same as long as the page does. */
  describe() {
    const { data: { page, moments, starts }, over, painter, ground, target } = this.viewer;
    const title = typeof page.title === "string" ? page.title : "";
    const numbers = [...starts].slice(1).map((end, m) => end - starts[m]);
    const many = gaussians(numbers.at(-1)), name = title || "2D Gaussians";
    this.#most = Math.max(2, ...numbers);
    this.title.textContent = title;
    this.about.textContent = `${many}, ${page.blend}`;
    named(`${name}, a picture made of ${many}`, painter.canvas);
    named(`${name}: plus and minus zoom, arrow keys move, Enter picks the Gaussian in the middle`, over);
    ground.hidden = page.channels !== 4;
    this.compare.hidden = !target;
    this.timeline.hidden = moments < 2;
    this.scrubber.max = moments - 1;
    const scores = page.moments.map(({ psnr }) => psnr), low = Math.min(...scores), high = Math.max(...scores);
    const points = scores.map((psnr, m) => `${100 * m / (moments - 1)}% ${90 - 90 * (psnr - low) / (high - low)}%`);
    this.curve.hidden = !(scores.every(Number.isFinite) && high > low);
    this.curve.style.clipPath = `polygon(0% 100%, ${points.join()}, 100% 100%)`;
  }
  #most = 2; // Gaussians at any moment
  #shownAt(value) { return value < 1 ? Math.round(this.#most ** value) : null; }

  /** What follows from the view, the moment and the options. */
  update() {
    const { view: { zoom }, options, moment, playing, data: { page, moments, starts }, scene, target } = this.viewer;
    const { controls, outlines, size, shown, wipe } = options;
    const nearest = Math.round(moment), { step, psnr } = page.moments[nearest] ?? {};
    const all = shown === null || shown >= scene.n, many = starts[nearest + 1] - starts[nearest];
    const words = [Number.isFinite(step) && `step ${count(step)}`, Number.isFinite(psnr) && `${psnr.toFixed(2)} dB`];
    put(this.zoom, `×${zoom < 1000 ? say(zoom, zoom < 100 ? 2 : 3) : zoom.toExponential(1).replace("e+", "e")}`);
    put(this.note, zoom >= 8 ? "still sharp: a scene has no pixels" : "");
    tell(this.size, this.sizeText, `${Math.round(100 * size)} %`);
    tell(this.shown, this.shownText, all ? "all" : count(shown));
    tell(this.scrubber, this.when, [...words, gaussians(many)].filter(Boolean).join(" · "));
    this.bar.hidden = !controls;
    this.size.value = size;
    if (this.#shownAt(Number(this.shown.value)) !== shown) // else it stays where the hand has put it
      this.shown.value = all ? 1 : Math.log(Math.max(1, shown)) / Math.log(this.#most);
    this.scrubber.value = moment;
    this.outlines.setAttribute("aria-pressed", outlines);
    this.compare.setAttribute("aria-pressed", wipe !== null);
    this.wipe.hidden = this.divider.hidden = wipe === null || !target;
    this.wipe.value = wipe ?? 0.5;
    this.divider.style.left = `${100 * (wipe ?? 0.5)}%`;
    this.curve.style.setProperty("--now", `${100 * moment / Math.max(1, moments - 1)}%`);
    const name = playing ? "Pause" : "Play";
    if (this.play.title !== name) {
      named(name, this.play).title = name;
      this.play.replaceChildren(icon(name.toLowerCase()));
    }
    this.#showNumbers();
  }
  #showNumbers() {
    const { scene, picked, data: { page } } = this.viewer, row = picked ? scene.ids.indexOf(picked.id) : -1;
    this.card.hidden = row < 0;
    if (row < 0) return;
    const { index, x, y, sigma, angle, opacity, color } = this.viewer.numbers(row);
    const swatch = element("span", { className: "gs2d-swatch" });
    swatch.style.background = `rgb(${color.slice(0, 3).map((c) => 255 * clamp(c, 0, 1))})`;
    this.card.replaceChildren(...pairs([
      ["Gaussian", index], ["centre", `${say(x)}, ${say(y)}`], ["σ", sigma.map((s) => say(s)).join(", ")],
      ["angle", `${say(angle)}°`], ["opacity", say(opacity)],
      ["colour", swatch, color.slice(0, page.channels).map((c) => say(c, 2)).join(", ")],
      ...(picked.share == null ? [] : [["share here", `${Math.round(100 * picked.share)} %`]])]));
    this.card.classList.toggle("gs2d-pinned", !!picked.pinned);
  }

  /** Tells a screen reader, once the hands rest. */
  #say(words) {
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => this.viewer.idle().then(() => { this.status.textContent = words(); }), 400);
  }
  #sayView() {
    this.#say(() => `zoom ${this.zoom.textContent}, centre ${say(this.viewer.view.x)}, ${say(this.viewer.view.y)}`);
  }
  #zoom(factor) {
    this.viewer.zoomAt(factor);
    this.#sayView();
  }
  #pin(event) {
    this.viewer.pin(event);
    const words = () => `Gaussian ${[...this.card.children].map((node) => node.textContent).slice(1).join(" ")}`;
    this.#say(() => (this.card.hidden ? "no Gaussian picked" : words()));
  }

  #wheel(event) {
    const { deltaY, deltaMode, ctrlKey } = event, { viewer } = this;
    const passes = FRAMED && !ctrlKey && !viewer.over.matches(":focus");
    if (passes || (deltaY > 0 && viewer.view.zoom <= 0.5)) return; // the page around it scrolls
    event.preventDefault();
    const notches = deltaY * [1, 16, 100][deltaMode] * (ctrlKey ? 0.01 : 0.0015); // a pinch on a pad comes with Ctrl
    viewer.zoomAt(Math.exp(-clamp(notches, -1, 1)), event);
  }
  #down({ button, pointerId, clientX, clientY }) {
    const { over, view } = this.viewer;
    if (button) return; // a menu may open, and take the end of it
    if (this.#pointers.size) over.focus(); // a second finger: from now on one finger moves the picture
    over.setPointerCapture(pointerId);
    this.#pointers.set(pointerId, { clientX, clientY, path: 0, view });
  }
  #drag(event) {
    const pointer = this.#pointers.get(event.pointerId), { viewer } = this;
    if (!pointer) return event.pointerType === "touch" ? undefined : viewer.hover(event);
    const { clientX, clientY } = event, dx = clientX - pointer.clientX, dy = clientY - pointer.clientY;
    const other = [...this.#pointers.values()].find((one) => one !== pointer);
    const apart = () => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY);
    const before = other ? apart() : 0;
    Object.assign(pointer, { clientX, clientY, path: pointer.path + Math.hypot(dx, dy) });
    if (!other) return pointer.path > 4 ? viewer.pan(dx, dy) : undefined;
    pointer.path = other.path = Infinity; // neither of them is a click
    const middle = { clientX: (clientX + other.clientX) / 2, clientY: (clientY + other.clientY) / 2 };
    viewer.pan(dx / 2, dy / 2);
    viewer.zoomAt(apart() / Math.max(before, 1), middle);
  }
  #up(event) {
    const pointer = this.#pointers.get(event.pointerId);
    this.#pointers.delete(event.pointerId);
    if (!pointer) return;
    if (event.type === "pointercancel") this.viewer.setView(pointer.view); // the page scrolls instead
    else if (pointer.path <= 4) this.#pin(event);
  }

  #key(event) {
    const { target, key } = event, { viewer } = this, { root, stage } = viewer, { body } = document;
    const mine = root.contains(target) || (target === body && root.parentElement === body); // or nothing else wants keys
    if (!mine || !viewer.data || event.ctrlKey || event.metaKey || event.altKey || this.help.open) return;
    if (target.localName === "button" && (key === " " || key === "Enter")) return;
    const far = 0.15 * Math.min(stage.clientWidth, stage.clientHeight), back = (by) => () => {
      viewer.pause();
      viewer.setMoment((by < 0 ? Math.ceil(viewer.moment) : Math.floor(viewer.moment)) + by);
      this.#say(() => this.when.textContent);
    };
    const pan = (dx, dy) => () => {
      viewer.pan(dx * far, dy * far);
      this.#sayView();
    };
    const closer = () => this.#zoom(1.5), away = () => this.#zoom(1 / 1.5), reset = () => viewer.reset();
    const actions = {
      "+": closer, "=": closer, "-": away, _: away, 0: reset, ",": back(-1), ".": back(1), " ": () => this.play.click(),
      o: () => this.outlines.click(), c: () => this.compare.hidden || this.compare.click(),
      "?": () => this.help.showModal(), Enter: () => this.#pin(null), Escape: () => viewer.select(null) };
    const ofPicture = {
      Home: reset, ArrowLeft: pan(1, 0), ArrowRight: pan(-1, 0), ArrowUp: pan(0, 1), ArrowDown: pan(0, -1) };
    const ofScrubber = {
      ArrowLeft: back(-1), ArrowDown: back(-1), ArrowRight: back(1), ArrowUp: back(1), PageDown: back(-10),
      PageUp: back(10), Home: back(-Infinity), End: back(Infinity) };
    if (target === this.scrubber) Object.assign(actions, ofScrubber);
    else if (target.type !== "range") Object.assign(actions, ofPicture);
    const action = actions[key.length === 1 ? key.toLowerCase() : key];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

/** Puts a page into an element; resolves to its Viewer, once drawn. What fails is said in the element, and thrown. */
export async function mount(root, page, options = {}) {
  let viewer = null;
  try {
    viewer = new Viewer(root, options);
    await viewer.load(page);
    viewer.draw();
    return viewer;
  } catch (error) {
    viewer?.destroy();
    const sentence = error instanceof PageError ? error.message : `This picture could not be shown: ${error.message}`;
    root.classList.add("gs2d-viewer");
    root.replaceChildren(element("p", { className: "gs2d-error", role: "alert" }, sentence));
    throw error;
  }
}
