"use strict";

// The slider: each film shows its last picture up to the chosen step; the base model has one picture, at step 0.
const slider = document.getElementById("step");
if (slider) {
  const steps = slider.dataset.steps.split(" ").map(Number);
  const show = () => {
    const step = steps[slider.value];
    document.getElementById("step-shown").textContent = step;
    slider.setAttribute("aria-valuetext", "step " + step);
    for (const film of document.querySelectorAll(".film")) {
      const frames = [...film.querySelectorAll("[data-step]")];
      const shown = frames.findLast((frame) => Number(frame.dataset.step) <= step) || frames[0];
      for (const frame of frames) frame.hidden = frame !== shown;
    }
  };
  slider.addEventListener("input", show);
  for (const button of document.querySelectorAll("[data-jump]")) {
    button.addEventListener("click", () => {
      slider.value = steps.findLastIndex((step) => step <= Number(button.dataset.jump));
      show();
    });
  }
  show();  // browsers restore the slider's position when a page is reloaded
}

// Copy buttons. A page opened as a local file may have no clipboard API, but can still copy a selection.
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// The curves are drawn when they scroll into view, so that the page opens quickly.
const data = document.getElementById("charts");
if (data) {
  const charts = JSON.parse(data.textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  const xs = charts.flatMap((chart) => chart.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]));
  const first = Math.min(...xs), last = Math.max(...xs);
  const whole = { start: first - 0.02 * (last - first || 1), end: last + 0.02 * (last - first || 1) };
  // Each chart is a Bokeh document with a range of its own, so zooming one sets the ranges of all.
  const ranges = [];
  let shown = whole;
  const zoomTo = (start, end) => {
    shown = { start, end };
    document.getElementById("curves").dataset.shown = start + " " + end;
    for (const range of ranges) range.setv(shown);
  };
  document.getElementById("zoom-out").addEventListener("click", () => zoomTo(whole.start, whole.end));

  const draw = (chart, place) => {
    const range = new Bokeh.Range1d(shown);
    ranges.push(range);
    range.change.connect(() => {
      if (range.start !== shown.start || range.end !== shown.end) zoomTo(range.start, range.end);
    });
    const figure = Bokeh.Plotting.figure({
      height: 260, sizing_mode: "stretch_width", x_range: range, tools: "xbox_zoom,xpan,xwheel_zoom,reset",
      toolbar_location: null, min_border_right: 8, output_backend: "canvas",
    });
    figure.xaxis.axis_label = "step";
    if (chart.axis) figure.y_range = new Bokeh.Range1d({ start: chart.axis[0], end: chart.axis[1] });
    if (Math.max(...chart.lines.flatMap((line) => line.y)) < 0.01) figure.yaxis.formatter = new Bokeh.BasicTickFormatter({ precision: 1 });
    const legend = [];
    for (const line of chart.lines) {
      const source = new Bokeh.ColumnDataSource({ data: { x: line.x, y: line.y } });
      const look = { source, line_color: line.colour, line_width: line.faint ? 1 : 2, line_alpha: line.faint ? 0.3 : 1 };
      const renderers = [figure.line({ field: "x" }, { field: "y" }, look)];
      if (line.dots) {
        renderers.push(figure.scatter({ field: "x" }, { field: "y" }, { source, color: line.colour, size: 5 }));
      }
      if (!line.faint) {
        figure.add_tools(new Bokeh.HoverTool({
          renderers: renderers.slice(0, 1), mode: "vline", line_policy: "nearest",
          tooltips: [["step", "@x"], [line.label || chart.title, "@y"]],
        }));
      }
      if (line.label) legend.push(new Bokeh.LegendItem({ label: { value: line.label }, renderers }));
    }
    if (chart.base) {
      figure.add_layout(new Bokeh.Span({ location: 1, dimension: "width", line_color: "#888", line_dash: "dashed" }));
    }
    if (legend.length && chart.legend) {
      const longest = Math.max(...chart.lines.map((line) => line.label.length));
      const many = legend.length > 2 || longest > 24;  // a large legend would hide the lines
      figure.add_layout(new Bokeh.Legend({
        items: legend, click_policy: "hide", label_text_font_size: "11px", spacing: many ? 6 : 0, padding: 4, margin: 2,
        glyph_height: 12, glyph_width: 14, label_height: 12, background_fill_alpha: 0.7, border_line_alpha: 0,
        ncols: many ? Math.max(1, Math.floor((place.clientWidth - 60) / (6 * longest + 30))) : 1,
      }), many ? "below" : "center");
    }
    const tool = (type) => figure.toolbar.tools.find((each) => each.type === type);
    figure.toolbar.active_drag = touch ? null : tool("BoxZoomTool");  // one finger scrolls the page, two fingers zoom
    figure.toolbar.active_scroll = touch ? tool("WheelZoomTool") : null;  // a pinch counts as the mouse wheel
    return Bokeh.Plotting.show(figure, place);
  };
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      draw(charts[target.dataset.chart], target.querySelector(".plot")).then(() => (target.dataset.drawn = "yes"));
    }
  }, { rootMargin: "300px" });
  for (const target of document.querySelectorAll(".chart")) seen.observe(target);
}
