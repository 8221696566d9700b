(() => {
  const line = { domain: false, ticks: false };
  const theme = {
    background: "transparent",
    padding: { left: 0, top: 6, right: 0, bottom: 0 },
    autosize: { type: "fit-x", contains: "padding" },
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: "transparent" },
    axis: {
      ...line, gridColor: "var(--grid)", labelColor: "var(--ink)", titleColor: "var(--quiet)", labelFontSize: 12,
      titleFontSize: 12, titleFontWeight: "normal", labelPadding: 6, titlePadding: 6,
    },
    axisX: { grid: false, titleAlign: "right", titleAnchor: "end", tickCount: { expr: "max(2, floor(width / 90))" }, labelFlush: true, labelSeparation: 8 },
    axisY: { tickCount: 5, titleAngle: 0, titleAlign: "left", titleAnchor: "start", titleX: 0, titleY: -8, titleBaseline: "bottom" },
    axisYBand: { grid: false, labelLimit: 200 },
  };
  const quiet = { level() { return quiet; }, error: console.error.bind(console), warn() { return quiet; }, info() { return quiet; }, debug() { return quiet; } };
  const nothing = { load: () => Promise.reject(new Error("A page loads nothing.")), sanitize: (uri) => Promise.resolve({ href: uri }) };
  const tooltip = new vega.Handler({ disableDefaultStyle: true });

  const rows = ({ columns, rows }) => rows.map((row) => Object.fromEntries(columns.map((name, index) => [name, row[index]])));

  const draw = (figure) => {
    const { spec, data } = JSON.parse(figure.querySelector("script").textContent);
    const plot = figure.querySelector(".plot");
    const datasets = Object.fromEntries(Object.entries(data).map(([name, one]) => [name, rows(one)]));
    const full = { width: "container", ...spec, datasets, config: theme };
    const compiled = vega.compile(full, { logger: quiet }).spec;
    const view = new vega.View(vega.parse(compiled, null, { ast: true }), {
      expr: vega.expressionInterpreter, loader: nothing, renderer: "svg", container: plot, hover: true, tooltip: tooltip.call,
    });
    return view.runAsync().then(() => {
      new ResizeObserver(() => { if (plot.clientWidth) view.width(plot.clientWidth).runAsync(); }).observe(plot);
      const zoom = figure.querySelector(".zoom");
      if (zoom) zooms(view, plot, zoom);
    });
  };

  // Zooming and moving by buttons and keys; the wheel and the pointer are Vega's own.
  const zooms = (view, plot, buttons) => {
    const linear = { into: (value) => value, back: (value) => value };
    const log = { into: Math.log10, back: (value) => 10 ** value };
    const move = (by, factor) => {
      for (const axis of ["x", "y"]) {
        const scale = view.scale(axis);
        const { into, back } = scale.type === "log" ? log : linear;
        const [low, high] = scale.domain().map(into);
        const middle = (low + high) / 2 + by[axis] * (high - low);
        const half = ((high - low) / 2) * factor;
        view.signal(`zoom_${axis}`, [back(middle - half), back(middle + half)]);
      }
      view.runAsync();
    };
    const none = { x: 0, y: 0 };
    const actions = {
      in: () => move(none, 1 / 1.5),
      out: () => move(none, 1.5),
      reset: () => { view.signal("zoom_x", null).signal("zoom_y", null).runAsync(); },
    };
    const step = (x, y) => () => move({ x, y }, 1);
    const keys = {
      "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.reset,
      ArrowLeft: step(-0.2, 0), ArrowRight: step(0.2, 0), ArrowUp: step(0, 0.2), ArrowDown: step(0, -0.2),
    };
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    buttons.addEventListener("click", ({ target }) => actions[target.dataset.zoom]?.());
    buttons.hidden = false;
  };

  for (const figure of document.querySelectorAll("figure.drawn")) {
    draw(figure).catch((error) => console.error(error));
  }
})();
