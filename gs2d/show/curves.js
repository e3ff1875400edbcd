// The curves of a run: loss, PSNR, and below them learning rate and number of Gaussians. uPlot draws them; it stands above
// this text when Python puts the module together. One index, `at`, is the step that all charts and numbers are about.

const number = new Intl.NumberFormat("en");
const short = (value) => (value >= 0.001 || value === 0 ? `${Number(value.toPrecision(2))}` : value.toExponential(0));
const count = (value) => (value >= 10000 ? `${Number((value / 1000).toPrecision(3))}k` : number.format(value));

const LINES = { // row of the table, name, how its value reads, and how its axis does
  loss: { row: 1, name: "loss", says: (value) => (value >= 0.001 ? value.toFixed(4) : value.toExponential(1)), axis: short },
  psnr: { row: 2, name: "PSNR", says: (value) => (value > 1e30 ? "∞ dB" : `${value.toFixed(2)} dB`), axis: (value) => `${value}` },
  lr: { row: 3, name: "learning rate", says: (value) => Number(value.toPrecision(3)).toString(), axis: short },
  count: { row: 4, name: "Gaussians", says: (value) => number.format(value), axis: count },
};
const CHARTS = [
  { lines: ["loss"], height: 150 }, { lines: ["psnr"], height: 150 }, { lines: ["lr", "count"], height: 112, steps: true },
];
const WHOLE = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)); // between ticks
const DIGITS = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7], [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9]];
const ROWS = 5, LEFT = 46, RIGHT = 44; // rows of a table, pixels beside a chart

function floats(view) {
  return view?.byteLength ? new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)) : [];
}

function table(view) { // the rows of a buffer: steps, losses, …
  const all = Float32Array.from(floats(view)), n = all.length / ROWS;
  return Array.from({ length: ROWS }, (_, row) => Array.from(all.subarray(row * n, row * n + n)));
}

function nearest(steps, step) { // the last index whose step is not beyond it, or the first
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}

function decades(low, high) { // round numbers between, three of them or more, as few as may be
  let inside = [];
  for (const digits of DIGITS) {
    inside = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      inside.push(...digits.map((digit) => Number(`${digit}e${power}`)).filter((value) => value >= low && value <= high));
    if (inside.length > 2) break;
  }
  return inside.filter((_, k) => k % Math.ceil(inside.length / 7) === 0);
}

function render({ model, el }) {
  const ended = new AbortController();
  const listen = (target, type, action) => target.addEventListener(type, action, { signal: ended.signal });
  const heard = [];
  const on = (name, action) => (model.on(name, action), heard.push([name, action]));

  // --- the elements --------------------------------------------------------------------------------
  const step = make("span", { className: "gs2d-step" });
  const log = make("input", { type: "checkbox" });
  const ghostKey = make("span", {}, make("i", { className: "gs2d-ghost" }), "the run before");
  const growthKey = make("span", {}, make("i", { className: "gs2d-grew" }), "growth");
  const bar = make("div", { className: "gs2d-bar" }, step, make("span", { className: "gs2d-key" }, ghostKey, growthKey),
    make("label", {}, log, "loss on a log scale"));
  const empty = make("p", { className: "gs2d-none", textContent: "The curves begin with the second step." });
  const shown = {}; // name of a line -> where its value, and that of the run before, stand
  const charts = CHARTS.map((chart) => {
    const names = make("figcaption", { className: "gs2d-names" }, ...chart.lines.map((key) => {
      const value = make("b"), before = make("small"), mark = make("i");
      mark.style.color = `var(--${key})`;
      shown[key] = { value, before, mark };
      return make("span", {}, mark, `${LINES[key].name} `, value, " ", before);
    }));
    const place = make("div", { role: "img" });
    return { ...chart, place, figure: make("figure", { className: "gs2d-chart" }, names, place), plot: null };
  });
  const body = make("div", { tabIndex: 0, role: "group", ariaLabel: "Curves. Left and right arrows go from step to step" },
    ...charts.map((chart) => chart.figure));
  const said = make("div", { className: "gs2d-unseen", role: "status" });
  const root = make("div", { className: "gs2d-live gs2d-curves" }, bar, empty, body, said);
  root.setAttribute("data-lm-suppress-shortcuts", "true");

  // --- colours, as the theme has them now --------------------------------------------------------------
  const colorOf = (element) => getComputedStyle(element).color;
  const ink = () => colorOf(growthKey); // faint text
  const veil = (color, alpha) => color.replace(/^rgba?\(([^,]+,[^,]+,[^,)]+).*$/, `rgba($1, ${alpha})`);

  // --- one chart -----------------------------------------------------------------------------------------
  let run = table(null), ghost = table(null), growth = [], at = null;

  function growthMarks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = veil(colorOf(shown.count.mark), 0.35);
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    for (const grown of growth) {
      const left = Math.round(u.valToPos(grown, "x", true)) + 0.5;
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
    }
    ctx.stroke();
    ctx.restore();
  }

  function range(logarithmic) {
    return (u, low, high) => {
      if (low == null || !Number.isFinite(low + high)) return [0.1, 1];
      if (logarithmic) return [low / 1.1, Math.max(high * 1.1, low * 1.3)];
      const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    };
  }

  const dot = (u, k) => u.series[k].stroke(u, k);

  function plot(chart) {
    const axes = [], scales = { x: { time: false, range: () => [0, Math.max(model.get("x_max"), 1)] } }, series = [{}];
    const line = { stroke: ink, font: `11px ${getComputedStyle(root).fontFamily}`, ticks: { show: false } };
    const grid = { stroke: () => veil(ink(), 0.18), width: 1 };
    axes.push({ ...line, grid, size: chart.steps ? 24 : 6, gap: 4, space: 70, incrs: WHOLE,
      values: (u, steps) => steps.map((value) => (chart.steps ? number.format(value) : "")) });
    chart.lines.forEach((name, k) => {
      const logarithmic = name === "loss" && model.get("log"), color = () => colorOf(shown[name].mark);
      scales[name] = { distr: logarithmic ? 3 : 1, range: range(logarithmic) };
      const place = k ? { side: 1, size: RIGHT, grid: { show: false } } : { side: 3, size: LEFT, grid };
      const ticks = logarithmic ? { splits: (u, axis, low, high) => decades(low, high), filter: (u, splits) => splits }
        : name === "count" ? { incrs: WHOLE } : {};
      axes.push({ ...line, ...place, ...ticks, scale: name, gap: 6, space: 30, stroke: chart.lines.length > 1 ? color : ink,
        values: (u, values) => values.map((value) => (value == null ? "" : LINES[name].axis(value))) });
      const paths = name === "count" ? uPlot.paths.stepped({ align: 1 }) : undefined;
      const common = { scale: name, points: { show: false }, paths };
      const before = { ...common, stroke: () => veil(color(), 0.75), width: 1, dash: [4, 4] };
      series.push(before, { ...common, stroke: color, width: 2 });
    });
    const options = {
      width: Math.max(chart.place.clientWidth, 120), height: chart.height, axes, scales, series, legend: { show: false },
      padding: [8, chart.lines.length > 1 ? 0 : RIGHT, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7, stroke: dot, fill: dot } },
      hooks: { drawAxes: [growthMarks], setCursor: [pointed] },
    };
    return new uPlot(options, joined(chart), chart.place);
  }

  function joined(chart) {
    const above = (name) => (name === "loss" && model.get("log") ? 0 : -1e38); // what is not, is a gap
    const drawn = (name) => (value) => (value > above(name) && value < 1e38 ? value : null);
    const column = (from, name) => [from[0], from[LINES[name].row].map(drawn(name))];
    return uPlot.join(chart.lines.flatMap((name) => [column(ghost, name), column(run, name)]));
  }

  // --- the step that is pointed at --------------------------------------------------------------------
  let moving = false;

  function pointed(u) { // by the pointer, in one of the charts; the others follow
    if (moving) return;
    point(u.cursor.left >= 0 && u.cursor.idx != null ? nearest(run[0], u.data[0][u.cursor.idx]) : null, u);
  }

  function point(index, from = null) {
    at = index;
    moving = true;
    for (const { plot: u } of charts) {
      if (!u || u === from) continue;
      u.setCursor(at === null ? { left: -10, top: -10 } : { left: u.valToPos(run[0][at], "x"), top: 10 });
    }
    moving = false;
    words();
  }

  function words() {
    const steps = run[0], index = Math.min(at ?? Infinity, steps.length - 1);
    root.dataset.step = steps.length ? steps[index] : "";
    step.textContent = steps.length ? `step ${number.format(steps[index])}` : "";
    for (const [name, { row, says }] of Object.entries(LINES)) {
      shown[name].value.textContent = steps.length ? says(run[row][index]) : "";
      const was = ghost[0].length && steps[index] <= ghost[0].at(-1) ? ghost[row][nearest(ghost[0], steps[index])] : null;
      shown[name].before.textContent = was === null ? "" : `before ${says(was)}`;
    }
  }

  listen(body, "keydown", (event) => {
    const last = run[0].length - 1, now = at ?? last, stride = event.shiftKey ? 20 : 1;
    const to = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: last, Escape: null }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    point(to === null ? null : Math.min(Math.max(to, 0), last));
    const values = Object.entries(LINES).map(([line, { name }]) => `${name} ${shown[line].value.textContent}`);
    said.textContent = [step.textContent, ...values].join(", ");
  });

  // --- drawing: once a frame at most -----------------------------------------------------------------------
  let due = 0, fresh = true;
  const draw = () => (due ||= requestAnimationFrame(() => ((due = 0), update())));
  const anew = () => ((fresh = true), draw());

  function clear() {
    for (const chart of charts) (chart.plot?.destroy(), (chart.plot = null));
  }

  function update() {
    run = table(model.get("run"));
    ghost = table(model.get("ghost"));
    growth = [...floats(model.get("growth"))];
    const some = run[0].length > 1;
    empty.hidden = some;
    body.hidden = bar.hidden = !some;
    log.checked = model.get("log");
    ghostKey.hidden = !ghost[0].length;
    growthKey.hidden = !growth.length;
    for (const { place, lines } of charts)
      place.ariaLabel = `${lines.map((name) => LINES[name].name).join(" and ")}. ${model.get("description")}`;
    if (!some || fresh) clear();
    if (some && fresh) {
      for (const chart of charts) chart.plot = plot(chart);
      fresh = false;
    } else if (some) {
      for (const chart of charts) chart.plot.setData(joined(chart));
    } else fresh = true;
    if (at !== null && at >= run[0].length) at = null;
    words();
  }

  // --- what may change --------------------------------------------------------------------------------------
  listen(log, "change", () => (model.set("log", log.checked), model.save_changes(), anew()));
  on("change:log", anew);
  for (const name of ["run", "ghost", "growth", "x_max", "description"]) on(`change:${name}`, draw);
  const resized = new ResizeObserver(() => {
    for (const { plot: u, place, height } of charts)
      if (u && place.clientWidth) u.setSize({ width: place.clientWidth, height });
  });
  resized.observe(root);
  const repaint = () => charts.forEach(({ plot: u }) => u?.redraw(false, true));
  const themed = new MutationObserver(repaint);
  themed.observe(document.body, { attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  listen(matchMedia("(prefers-color-scheme: dark)"), "change", repaint);
  el.append(root);
  update();
  draw(); // once more in the page, where there is a width

  return () => {
    ended.abort();
    resized.disconnect();
    themed.disconnect();
    cancelAnimationFrame(due);
    for (const [name, action] of heard) model.off(name, action);
    clear();
    root.remove();
  };
}

export default { render };
