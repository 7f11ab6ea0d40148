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
    if (touch) {
      layout.dragmode = false; // a finger on the plot scrolls the page; the buttons zoom
    }
    return Plotly.react(timeline, data, layout, config);
  };
  draw();
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
