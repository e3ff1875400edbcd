// The live picture: a large one to zoom into, small ones beside it that follow, a wipe, and the Gaussian under the pointer.
// All pictures of a moment have one shape, so one zoom serves all of them: three CSS variables on the root, no drawing here.

const CARD_PAUSE = 60; // milliseconds from one question for a Gaussian to the next, at least
const LARGEST_PIXEL = 48; // on the screen, for one pixel of the picture: no zoom goes farther

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function render({ model, el }) {
  const ended = new AbortController();
  const { signal } = ended;
  const listen = (target, type, action, options = {}) => target.addEventListener(type, action, { signal, ...options });
  const heard = []; // what this view listens to in the model
  const on = (name, action) => (model.on(name, action), heard.push([name, action]));

  // --- what there is to see: one address of the bytes for every picture ---------------------------
  const labels = model.get("labels"), legends = model.get("legends");
  const urls = new Map();
  const bytes = (name) => model.get(`${name}_frame`);
  const there = (name) => bytes(name)?.byteLength > 0;

  function address(name) {
    const known = urls.get(name);
    if (known?.bytes === bytes(name)) return known.url;
    if (known) URL.revokeObjectURL(known.url);
    const url = there(name) ? URL.createObjectURL(new Blob([bytes(name)])) : "";
    urls.set(name, { bytes: bytes(name), url });
    return url;
  }

  const large = () => (there(model.get("view")) ? model.get("view") : "render");
  const other = () => (large() === "target" ? "render" : "target"); // the right side of the wipe
  const beside = () => ["render", "target", "error"].filter((name) => name !== large()).slice(-2);

  // --- the elements ------------------------------------------------------------------------------
  const picture = () => make("img", { decoding: "sync", draggable: false });
  const spot = () => make("div", { className: "gs2d-spot", hidden: true });
  const options = Object.entries(labels).map(([value, label]) => new Option(label, value));
  const view = make("select", { ariaLabel: "Show" }, ...options);
  const group = `gs2d-${Math.random().toString(36).slice(2)}`;
  const choices = [
    ["beside", "beside", "Target and error beside it"],
    ["wipe", "wipe", "A line to drag between it and the target"],
    ["none", "alone", "Only this picture"],
  ].map(([value, label, title]) => {
    const input = make("input", { type: "radio", name: group, value });
    return { input, label: make("label", { title }, input, label) };
  });
  const compare = make("fieldset", { className: "gs2d-choice" },
    make("legend", { className: "gs2d-unseen", textContent: "Compare with the target" }),
    ...choices.map((choice) => choice.label));
  const press = (textContent, title) => make("button", { type: "button", textContent, title, ariaLabel: title });
  const out = press("−", "Zoom out"), near = press("+", "Zoom in"), fit = press("Fit", "Fit the whole picture");
  const percent = make("output", { ariaLabel: "Zoom" });
  const bar = make("div", { className: "gs2d-bar" },
    make("label", {}, make("span", { className: "gs2d-show" }, "Show"), view), compare,
    make("span", { className: "gs2d-zoom" }, out, percent, near, fit));

  const main = picture(), second = picture();
  const right = make("div", { className: "gs2d-other" }, second);
  const empty = make("p", { className: "gs2d-none", textContent: "The picture appears as soon as there is one." });
  const wipe = make("input", { type: "range", className: "gs2d-wipe", min: 0, max: 100, step: 0.5, value: 50 });
  const tags = [make("span", { className: "gs2d-tag" }), make("span", { className: "gs2d-tag" })];
  const tagged = make("div", {}, ...tags);
  const card = make("div", { className: "gs2d-card", hidden: true });
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const outlines = ["gs2d-halo", "gs2d-line"].map((name) => {
    const polygon = document.createElementNS(svg.namespaceURI, "polygon");
    polygon.setAttribute("class", name);
    svg.append(polygon);
    return polygon;
  });
  const mainSpot = spot();
  const stage = make("div", { className: "gs2d-stage", tabIndex: 0, role: "group" },
    main, right, empty, svg, mainSpot, tagged, wipe, card);
  const legend = make("span");
  const scale = () => make("span", { className: "gs2d-scale" }, "0", make("i"), "≥ 0.25");
  const mainScale = scale();
  const smalls = [0, 1].map(() => {
    const image = picture(), show = make("button", { type: "button" }), mark = spot(), colors = scale();
    const small = make("div", { className: "gs2d-stage" }, image, mark);
    const figure = make("figure", {}, small, make("figcaption", {}, show, colors));
    return { image, show, mark, colors, figure, stage: small };
  });
  const aside = make("div", { className: "gs2d-smalls" }, ...smalls.map((small) => small.figure));
  const table = make("div", { className: "gs2d-table" },
    make("figure", {}, stage, make("figcaption", {}, legend, mainScale)), aside);
  const said = make("div", { className: "gs2d-unseen", role: "status" });
  const root = make("div", { className: "gs2d-live gs2d-pictures" }, bar, table, said);
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys: 0 0 would restart the kernel
  root.style.setProperty("--ratio", 1.5);

  // --- the pictures: drawn once a frame at most, and not at all in a hidden tab --------------------
  let due = 0;
  const draw = () => (due ||= requestAnimationFrame(() => ((due = 0), update())));

  function put(image, name, what) {
    const url = address(name);
    if (image.getAttribute("src") !== url) url ? image.setAttribute("src", url) : image.removeAttribute("src");
    image.alt = what;
  }

  function update() {
    const name = large(), mode = model.get("compare"), about = model.get("description");
    const named = (which) => `${labels[which]}: ${which === "target" ? "the picture to reach" : about}`;
    put(main, name, named(name));
    main.hidden = !there(name);
    empty.hidden = there(name);
    const wiping = mode === "wipe" && there(name) && there(other());
    right.hidden = wipe.hidden = tagged.hidden = !wiping;
    if (wiping) {
      put(second, other(), named(other()));
      tags[0].textContent = labels[name];
      tags[1].textContent = labels[other()];
      wipe.ariaLabel = `Divide between ${labels[name]}, left, and ${labels[other()]}, right`;
    }
    aside.hidden = mode !== "beside" || !beside().some(there);
    smalls.forEach(({ image, show, colors, figure }, k) => {
      const which = beside()[k];
      figure.hidden = !there(which);
      if (aside.hidden || figure.hidden) return;
      put(image, which, named(which));
      show.textContent = labels[which];
      show.title = show.ariaLabel = `Show large: ${labels[which]}`;
      show.value = which;
      colors.hidden = which !== "error";
    });
    legend.textContent = there(name) ? legends[name] : "";
    mainScale.hidden = name !== "error" || !there(name);
    view.value = model.get("view");
    choices.forEach(({ input }) => (input.checked = input.value === mode));
    stage.ariaLabel = `${labels[name]}. Plus and minus zoom, 0 fits, arrows move`
      + (model.get("pointing") ? ", Enter asks for the Gaussian in the middle" : "");
    root.classList.toggle("gs2d-pointing", model.get("pointing"));
    arrange();
  }

  function measure() {
    if (!main.naturalWidth) return;
    root.style.setProperty("--ratio", main.naturalWidth / main.naturalHeight);
    arrange();
  }

  function arrange() { // wide pictures have the small ones below
    const ratio = main.naturalWidth / main.naturalHeight || 1.5;
    table.classList.toggle("gs2d-right", !aside.hidden && ratio < 2.2);
    sharpen();
  }

  function sharpen() { // beyond twice its size, a pixel is a square
    const size = (zoom * stage.clientWidth) / (main.naturalWidth || 1);
    root.classList.toggle("gs2d-pixels", size >= 2);
    near.disabled = zoom >= farthest();
  }

  // --- zoom and pan: left edge x and top edge y of the picture, in sizes of the stage ---------------
  let zoom = 1, x = 0, y = 0;
  const farthest = () => Math.max(8, (LARGEST_PIXEL * (main.naturalWidth || 1)) / (stage.clientWidth || 1));

  function look(nextZoom, nextX, nextY) {
    zoom = clamp(nextZoom, 1, farthest());
    x = clamp(nextX, 1 - zoom, 0);
    y = clamp(nextY, 1 - zoom, 0);
    for (const [name, value] of Object.entries({ zoom, x, y })) root.style.setProperty(`--${name}`, value);
    svg.setAttribute("viewBox", `${-x / zoom} ${-y / zoom} ${1 / zoom} ${1 / zoom}`);
    root.classList.toggle("gs2d-zoomed", zoom > 1);
    percent.textContent = zoom < 10 ? `${zoom.toFixed(1)}×` : `${Math.round(zoom)}×`;
    out.disabled = fit.disabled = zoom === 1;
    sharpen();
  }

  function zoomAt(factor, [u, v] = [0.5, 0.5]) { // what is at (u, v) of the stage stays there
    const next = clamp(zoom * factor, 1, farthest());
    look(next, u - ((u - x) * next) / zoom, v - ((v - y) * next) / zoom);
  }

  const whole = () => look(1, 0, 0);
  const where = (target, event) => {
    const box = target.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };

  // --- the Gaussian at a point: one question on its way at a time -----------------------------------
  // Questions are numbered from the time on, so that answers to a page that was loaded again are not taken for ours.
  let asked = Date.now(), answered = asked, forgotten = asked, pinned = false, next = null, pause = 0, told = null, spotAt = [0, 0];

  function ask(u, v, pin) {
    if (!model.get("pointing")) return;
    const at = [(u - x) / zoom, (v - y) / zoom];
    if (at.some((value) => value < 0 || value > 1)) return;
    if (pin) pinned = true;
    next = { at, pin };
    move(at);
    if (!pause && answered === asked) send();
  }

  function send() {
    if (!next) return;
    const { at, pin } = next;
    next = null;
    model.send({ type: "point", x: at[0], y: at[1], pin, id: ++asked });
    pause = setTimeout(() => ((pause = 0), answered === asked && send()), CARD_PAUSE);
  }

  function move(at) {
    for (const mark of [mainSpot, ...smalls.map((small) => small.mark)]) mark.hidden = !at;
    if (!at) return;
    spotAt = at;
    ["x", "y"].forEach((axis, k) => root.style.setProperty(`--spot-${axis}`, at[k]));
  }

  function forget() {
    if (pinned) model.send({ type: "unpin" });
    pinned = false;
    next = null;
    forgotten = asked;
    move(null);
    tell(null);
  }

  function tell(gaussian) {
    card.hidden = !gaussian;
    const points = gaussian ? gaussian.outline.map((point) => point.join()).join(" ") : "";
    for (const polygon of outlines) polygon.setAttribute("points", points);
    if (!gaussian) return;
    const swatch = make("i");
    swatch.style.background = gaussian.color;
    const rows = gaussian.rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
    card.replaceChildren(make("b", {}, swatch, `Gaussian ${gaussian.index}`), make("dl", {}, ...rows),
      ...(pinned ? [make("small", { textContent: "pinned; Escape lets go" })] : []));
    const left = x + zoom * spotAt[0] < 0.5; // the card stands at the other side
    card.classList.toggle("gs2d-far", left);
    card.classList.toggle("gs2d-left", !left);
    const words = `Gaussian ${gaussian.index}: ${gaussian.rows.map((row) => row.join(" ")).join(", ")}`;
    if (pinned && told !== gaussian.index) said.textContent = words;
    told = pinned ? gaussian.index : null; // said once, however often its numbers change
  }

  on("msg:custom", (message) => {
    if (message.type === "ready") {
      answered = Math.max(answered, message.id);
      if (!pause && answered === asked) send();
    } else if (message.type === "gaussian" && (!message.gaussian || message.id > forgotten)) {
      tell(message.gaussian);
    }
  });

  // --- gestures, on every picture --------------------------------------------------------------------
  let meant = false, rested = ""; // whether the pointer was moved since the page was scrolled under it

  function gestures(target) {
    const fingers = new Map();
    let from = null, moved = false;

    listen(target, "wheel", (event) => {
      if (event.target === wipe || !(meant || event.ctrlKey || event.metaKey)) return;
      if (event.deltaY > 0 && zoom === 1 && !event.ctrlKey) return; // nothing to zoom out of: the page scrolls
      event.preventDefault();
      const lines = event.deltaMode ? 16 : 1;
      zoomAt(Math.exp(clamp(-event.deltaY * lines, -240, 240) * (event.ctrlKey ? 0.01 : 0.0025)), where(target, event));
    }, { passive: false });
    listen(target, "pointerdown", (event) => {
      if (event.target === wipe || event.button > 0) return;
      if (!fingers.size) moved = false;
      fingers.set(event.pointerId, where(target, event));
      from = { x, y, at: where(target, event) };
    });
    listen(target, "pointermove", (event) => {
      const at = where(target, event), before = fingers.get(event.pointerId);
      if (!before) {
        if (event.pointerType !== "touch" && event.target !== wipe && !pinned) ask(...at, false);
        return;
      }
      if (fingers.size === 2) pinch(event.pointerId, at, before);
      else if (moved || Math.hypot(...at.map((value, k) => (value - from.at[k]) * target.clientWidth)) > 4) {
        if (!moved) target.setPointerCapture(event.pointerId);
        moved = true;
        target.classList.toggle("gs2d-dragging", zoom > 1);
        look(zoom, x + at[0] - before[0], y + at[1] - before[1]);
      }
      fingers.set(event.pointerId, at);
    });

    function pinch(id, at, before) {
      const [still] = [...fingers].filter(([other]) => other !== id).map(([, place]) => place);
      const { clientWidth: w, clientHeight: h } = target;
      const gap = (place) => Math.hypot((place[0] - still[0]) * w, (place[1] - still[1]) * h);
      moved = true;
      zoomAt(gap(at) / Math.max(gap(before), 1), [(at[0] + still[0]) / 2, (at[1] + still[1]) / 2]);
      look(zoom, x + (at[0] - before[0]) / 2, y + (at[1] - before[1]) / 2);
    }

    function lift(event) {
      const known = fingers.delete(event.pointerId);
      if (!fingers.size) target.classList.remove("gs2d-dragging");
      return known;
    }
    listen(target, "pointerup", (event) => {
      if (!lift(event) || moved) return;
      const at = where(target, event), mark = [x + zoom * spotAt[0], y + zoom * spotAt[1]];
      const off = Math.hypot((at[0] - mark[0]) * target.clientWidth, (at[1] - mark[1]) * target.clientHeight);
      pinned && off < 9 ? forget() : ask(...at, true); // a click on the ring lets go
    });
    listen(target, "pointercancel", lift);
    listen(target, "pointerleave", () => pinned || forget());
    listen(target, "dblclick", (event) => event.target === wipe || (whole(), forget()));
  }

  [stage, ...smalls.map((small) => small.stage)].forEach(gestures);
  listen(document, "scroll", () => (meant = false), { capture: true, passive: true });
  listen(document, "pointermove", ({ screenX, screenY }) => { // a browser also tells of a page that moves under it
    meant ||= `${screenX} ${screenY}` !== rested;
    rested = `${screenX} ${screenY}`;
  }, { capture: true, passive: true });

  listen(stage, "keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 0.1, go = (dx, dy) => look(zoom, x + dx * step, y + dy * step);
    const keys = {
      "+": () => zoomAt(1.25), "=": () => zoomAt(1.25), "-": () => zoomAt(0.8), 0: whole, Escape: forget,
      ArrowLeft: () => go(1, 0), ArrowRight: () => go(-1, 0), ArrowUp: () => go(0, 1), ArrowDown: () => go(0, -1),
      Enter: () => ask(0.5, 0.5, true),
    };
    const action = keys[event.key];
    if (!action || (event.target === wipe && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  });

  // --- the controls ------------------------------------------------------------------------------------
  const set = (name, value) => (model.set(name, value), model.save_changes(), draw());
  listen(view, "change", () => set("view", view.value));
  for (const { input } of choices) listen(input, "change", () => set("compare", input.value));
  for (const { show } of smalls) listen(show, "click", () => set("view", show.value));
  const divide = () => {
    root.style.setProperty("--wipe", wipe.value / 100);
    wipe.setAttribute("aria-valuetext", `${Math.round(wipe.value)} percent from the left`);
  };
  listen(wipe, "input", divide);
  listen(near, "click", () => zoomAt(1.5));
  listen(out, "click", () => zoomAt(1 / 1.5));
  listen(fit, "click", whole);
  listen(main, "load", measure);
  for (const name of Object.keys(labels)) on(`change:${name}_frame`, draw);
  for (const name of ["view", "compare", "description", "pointing"]) on(`change:${name}`, draw);

  const resized = new ResizeObserver(sharpen);
  resized.observe(stage);
  divide();
  whole();
  update();
  el.append(root);

  return () => {
    ended.abort();
    resized.disconnect();
    cancelAnimationFrame(due);
    clearTimeout(pause);
    for (const [name, action] of heard) model.off(name, action);
    for (const { url } of urls.values()) URL.revokeObjectURL(url);
    root.remove();
  };
}

export default { render };
