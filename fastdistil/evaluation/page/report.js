"use strict";
// Draws the curves of the page by uPlot: one colour a run, in all plots and tables. What it reads is in #data.
(() => {
  const { runs, plots } = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3]]; // from the ninth run on colours come again, with these
  let drawn = [];

  function make(tag, text, className = "", ...inside) {
    const element = Object.assign(document.createElement(tag), { textContent: text, className });
    element.append(...inside);
    return element;
  }

  // Numbers as people read them: 1.2M, 0.0123, 1e-5; four digits where a value is read, three on an axis.
  function number(value, digits) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3) return value.toExponential(digits - 2).replace(/\.?0+e/, "e").replace("-", "−");
    const notation = size < (digits > 3 ? 1e6 : 1e4) ? "standard" : "compact";
    return new Intl.NumberFormat("en", { notation, maximumSignificantDigits: digits }).format(value).replace("-", "−");
  }

  // Tokens or seconds at an update of a run, on the line between the two updates that it is known of.
  function along(run, axis, update) {
    const { update: known, [axis]: values } = run.knots;
    let low = 0, high = known.length - 1;
    if (high < 1) return values[0];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (known[middle] <= update) low = middle; else high = middle;
    }
    return values[low] + (values[high] - values[low]) * (update - known[low]) / (known[high] - known[low]);
  }

  // Seconds are shown in the unit in which the longest run is a small number.
  function timeUnit() {
    const most = Math.max(...runs.map((run) => run.knots.seconds.at(-1)));
    return most < 180 ? [1, "s"] : most < 10800 ? [60, "min"] : [3600, "h"];
  }

  function settings() {
    const form = new FormData(controls);
    const shown = runs.length === 1 ? ["0"] : form.getAll("run");
    return { x: form.get("x"), logX: form.has("log-x"), logY: form.has("log-y"), shown: new Set(shown.map(Number)) };
  }

  // The columns of a plot: x, then of each curve its values and, where it was thinned out, its extremes.
  function columns(plot, { x, logX, logY, shown }) {
    const [size] = x === "seconds" ? timeUnit() : [1];
    const across = (run, updates) => x === "update" ? updates : updates.map((u) => along(run, x, u) / size);
    const drawable = (y) => y.map((v) => v === null ? null : logY && v <= 0 ? null : v * (plot.percent ? 100 : 1));
    const tables = [], series = [{}], bands = [], curves = [];
    for (const curve of plot.curves.filter((c) => shown.has(c.run))) {
      const run = runs[curve.run], xs = across(run, curve.x), stroke = colour(`c${curve.run % 8}`);
      const first = xs.findIndex((v) => !logX || v > 0), cut = (list) => list.slice(Math.max(0, first));
      const isTrain = curve.kind === "train", few = curve.x.length <= (isTrain ? 12 : 40);
      tables.push([cut(xs), cut(drawable(curve.y))]);
      curves.push({ ...curve, run, stroke, column: series.length });
      series.push({
        stroke, width: isTrain ? 1.75 : 1.25, dash: isTrain ? DASHES[curve.run >> 3 & 3] : [3, 3],
        points: { show: few, size: 7, fill: isTrain ? stroke : colour("ground"), stroke, width: 1.75 },
      });
      if (curve.low.length) {
        tables.at(-1).push(cut(drawable(curve.high)), cut(drawable(curve.low)));
        bands.push({ series: [series.length, series.length + 1], fill: stroke + (stroke.length < 7 ? "3" : "33") });
        for (const _ of "hl") series.push({ width: 0, points: { show: false } });
      }
    }
    return { data: tables.length ? uPlot.join(tables) : [[]], series, bands, curves };
  }

  // The end of a training curve says what became of its run; crosses on the floor are updates that were not finite.
  function ends(u, curves, { x }) {
    const { ctx } = u, dpr = devicePixelRatio, [size] = x === "seconds" ? timeUnit() : [1];
    const r = 4.5 * dpr;
    const cross = (cx, cy, s) => {
      for (const sign of [-1, 1]) { ctx.moveTo(cx - s, cy - sign * s); ctx.lineTo(cx + s, cy + sign * s); }
      ctx.stroke();
    };
    ctx.save();
    for (const { run, kind, stroke, column } of curves.filter((c) => c.kind === "train")) {
      const ys = u.data[column];
      const last = ys.findLastIndex((v) => v != null);
      ctx.strokeStyle = ctx.fillStyle = stroke;
      ctx.lineWidth = 2 * dpr;
      for (const update of run.skipped) {
        const at = u.valToPos(x === "update" ? update : along(run, x, update) / size, "x", true);
        ctx.beginPath();
        const isInside = at >= u.bbox.left && at <= u.bbox.left + u.bbox.width;
        if (isInside) cross(at, u.bbox.top + u.bbox.height - r - dpr, 3 * dpr);
      }
      if (last < 0) continue;
      let cx = u.valToPos(u.data[0][last], "x", true);
      const cy = u.valToPos(ys[last], "y", true);
      if (cx < u.bbox.left || cx > u.bbox.left + u.bbox.width + 1) continue;
      if (run.state !== "finished" && run.state !== "unknown") { // what was still to come, as a broken line
        ctx.setLineDash([3 * dpr, 3 * dpr]);
        ctx.beginPath(); ctx.moveTo(cx, cy); ctx.lineTo(cx + 14 * dpr, cy); ctx.stroke();
        ctx.setLineDash([]);
        cx += 20 * dpr;
      }
      ctx.beginPath();
      if (run.state === "running") {
        ctx.moveTo(cx - r, cy - r); ctx.lineTo(cx + r, cy); ctx.lineTo(cx - r, cy + r); ctx.fill();
      } else if (run.state === "stopped") {
        for (const side of [-1, 1]) { ctx.moveTo(cx + side * r / 2, cy - r); ctx.lineTo(cx + side * r / 2, cy + r); }
        ctx.stroke();
      } else if (run.state === "failed" || run.state === "killed") cross(cx, cy, r);
      else { ctx.arc(cx, cy, r * 0.8, 0, 2 * Math.PI); ctx.fill(); }
    }
    ctx.restore();
  }

  // Under a plot: the values at the cursor, or at the end of each run.
  function readout(u, plot, curves, how, place) {
    const unit = plot.percent ? " %" : "", inside = u.cursor.left >= 0 && u.cursor.idx !== null;
    const at = inside ? u.data[0][u.cursor.idx] : null, [, short] = timeUnit();
    const where = { update: "update ", tokens: "tokens ", seconds: "" }[how.x];
    const ending = how.x === "seconds" ? ` ${short}` : "";
    const word = inside ? `${where}${number(at, 4)}${ending}` : "at the end";
    const spans = new Map();
    for (const { run, kind, column } of curves) {
      const index = inside ? u.cursor.idxs[column] : u.data[column].findLastIndex((v) => v != null);
      const value = u.data[column][index];
      if (value == null) continue;
      const swatch = make("span", "", `swatch c${runs.indexOf(run) % 8}`);
      if (!spans.has(run)) spans.set(run, make("span", "", "", swatch, runs.length > 1 ? `${run.name} ` : ""));
      spans.get(run).append(kind === "train" ? "" : " held-out ", make("b", number(value, 4) + unit));
    }
    place.replaceChildren(make("span", word), ...spans.values());
  }

  // The value of each curve that is nearest to the cursor, since not every curve has one at every update.
  function nearest(u, column, index) {
    const ys = u.data[column];
    if (column === 0 || ys[index] != null) return index;
    for (let d = 1; d < ys.length; d++) {
      for (const i of [index - d, index + d]) if (ys[i] != null) return i;
    }
    return index;
  }

  function draw(plot, how, width, height = 272) {
    const box = document.getElementById(`plot-${plot.key}`), place = box.nextElementSibling;
    const { data, series, bands, curves } = columns(plot, how);
    const axis = { stroke: colour("soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: colour("grid"), width: 1 };
    const ticks = (u, splits) => splits.map((v) => v === null ? "" : number(v, 3));
    const label = { update: "updates", tokens: "tokens", seconds: `training time, ${timeUnit()[1]}` }[how.x];
    const show = (u) => readout(u, plot, curves, how, place);
    const logY = how.logY && data.slice(1).some((ys) => ys.some((v) => v > 0));
    const u = new uPlot({
      width: width ?? Math.max(200, box.clientWidth), height, series, bands, legend: { show: false },
      padding: [10, 28, 0, 0],
      scales: { x: { time: false, distr: how.logX ? 3 : 1 }, y: { distr: logY ? 3 : 1 } },
      axes: [
        { ...axis, grid: { show: false }, label, labelSize: 20, labelFont: axis.font, size: 28, values: ticks },
        { ...axis, grid, size: 58, values: (u, s) => ticks(u, s).map((t) => t && plot.percent ? `${t} %` : t) },
      ],
      cursor: { dataIdx: nearest, sync: { key: "curves" }, points: { size: 7 } },
      hooks: { draw: [(u) => ends(u, curves, how)], setCursor: [show], ready: [show] },
    }, data, box);
    box.onkeydown = (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const now = u.cursor.left >= 0 ? u.cursor.idx ?? 0 : -1, last = u.data[0].length - 1;
      const left = u.valToPos(u.data[0][Math.min(last, Math.max(0, now + steps[event.key]))], "x");
      u.setCursor({ left, top: u.over.clientHeight / 2 }, true, true);
    };
    box.onblur = () => u.setCursor({ left: -10, top: -10 }, true, true);
    return u;
  }

  function redraw(...size) {
    drawn.forEach((u) => u.destroy());
    const how = settings();
    drawn = plots.map((plot) => draw(plot, how, ...size));
  }

  if (!controls) return;
  redraw();
  controls.addEventListener("change", () => redraw());
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  // On paper the page is light, and two plots stand beside each other.
  addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); redraw(330, 200); });
  addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); redraw(); });
})();
