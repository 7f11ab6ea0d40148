"use strict";

// Colours are names of CSS variables in the figure, so that light and dark have one source.
const painted = (node, style) => {
  if (typeof node === "string") {
    return node.replace(/^var\((--[\w-]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
  }
  if (Array.isArray(node)) {
    return node.map((entry) => painted(entry, style));
  }
  if (node && typeof node === "object") {
    return Object.fromEntries(Object.entries(node).map(([key, value]) => [key, painted(value, style)]));
  }
  return node;
};

const MARKS = { diamond: "\u25c6", square: "\u25a0", x: "\u2716", "triangle-up": "\u25b2" };

// Plotly's own legend takes half of a phone's screen, and a keyboard cannot reach it.
const listTraces = (list, traces, draw) => {
  for (const name of new Set(traces.map((trace) => trace.name))) {
    const indices = [...traces.keys()].filter((index) => traces[index].name === name);
    const trace = traces[indices[0]];
    const swatch = document.createElement("i");
    const style = trace.mode === "markers" ? trace.marker : trace.line;
    swatch.className = trace.mode === "markers" ? "mark" : style.dash || "solid";
    swatch.textContent = MARKS[style.symbol] || "";
    swatch.style.color = style.color;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(trace.visible !== false));
    button.append(swatch, name);
    button.addEventListener("click", () => {
      const visible = trace.visible === false;
      indices.forEach((index) => { traces[index].visible = visible; });
      button.setAttribute("aria-pressed", String(visible));
      draw();
    });
    list.append(button);
  }
};

const timeline = document.getElementById("timeline");
if (timeline) {
  const figure = JSON.parse(document.getElementById("figure").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = {
    displaylogo: false,
    showSendToCloud: false, // Plotly's own default offers an upload
    plotlyServerURL: "",
    displayModeBar: touch ? true : "hover",
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const draw = () => {
    const { data, layout } = painted(figure, getComputedStyle(document.documentElement));
    layout.autosize = true;
    layout.showlegend = false;
    if (touch) {
      layout.dragmode = false; // a finger on the plot scrolls the page; the buttons zoom
    }
    return Plotly.react(timeline, data, layout, config);
  };
  draw();
  listTraces(document.getElementById("legend"), figure.data, draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
