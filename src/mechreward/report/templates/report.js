"use strict";
// Draws each chart over its still picture, and filters the rollouts. The page reads the same without this script.
for (const figure of document.querySelectorAll("figure.chart")) {
  const plot = figure.querySelector(".plot");
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const draw = () => {
    const host = document.createElement("div");
    host.className = "plot live";
    plot.after(host);
    vegaEmbed(host, spec, { renderer: "svg", actions: false, ast: true }).then(
      () => plot.remove(),
      (error) => { host.remove(); console.error(error); },
    );
  };
  // A chart inside closed details has no width yet: draw it when they open.
  const details = figure.closest("details:not([open])");
  if (details) details.addEventListener("toggle", draw, { once: true });
  else draw();
}

const form = document.querySelector(".filters");
if (form) {
  const arm = document.getElementById("filter-arm");
  const outcome = document.getElementById("filter-outcome");
  const rollouts = [...document.querySelectorAll(".rollout")];
  const apply = () => {
    let shown = 0;
    for (const rollout of rollouts) {
      const keep = (!arm.value || rollout.dataset.arm === arm.value)
        && (!outcome.value || rollout.dataset.outcome === outcome.value);
      rollout.hidden = !keep;
      shown += keep;
    }
    document.getElementById("filter-count").textContent = `${shown} shown`;
  };
  form.hidden = false;
  form.addEventListener("change", apply);
  apply();
}
