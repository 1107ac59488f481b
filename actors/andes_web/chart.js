// Small line charts as SVG: axes from zero, lines that follow the page's colours. No dependencies.

const NAMESPACE = "http://www.w3.org/2000/svg";
const EDGE = { left: 38, right: 10, top: 18, bottom: 24 };

function element(name, attributes, text) {
  const node = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/** A round step so that about `count` of them cover `span`. */
export function tickStep(span, count = 4) {
  const rough = Math.max(span, 1e-9) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((one) => one * power >= rough);
  return factor * power;
}

/** Points of a staircase: (x1, 1), (x2, 2), ... as they happened. */
export function staircase(times) {
  const points = [];
  times.forEach((time, index) => points.push([time, index], [time, index + 1]));
  return points;
}

/**
 * Draw lines into a box, replacing what was there.
 * @param {Element} box where to.
 * @param {object} options {lines: [{points, kind, name}], xMin, xMax, yMax, yName, xName, width, height,
 *     xText}.
 */
export function drawLines(box, options) {
  const { lines, xMin = 0, xMax, yMax, yName, xName, xText = String } = options;
  const { width = 560, height = 190 } = options;
  const inner = { w: width - EDGE.left - EDGE.right, h: height - EDGE.top - EDGE.bottom };
  const x = (value) => EDGE.left + (inner.w * (value - xMin)) / Math.max(xMax - xMin, 1e-9);
  const y = (value) => EDGE.top + inner.h * (1 - value / Math.max(yMax, 1e-9));
  const names = lines.map((line) => line.name).join(", ");
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `${yName} over ${xName}: ${names}`,
  });
  for (let value = 0, step = tickStep(yMax); value <= yMax + 1e-9; value += step) {
    svg.append(element("line", { class: "grid", x1: x(xMin), x2: x(xMax), y1: y(value), y2: y(value) }));
    const label = { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" };
    svg.append(element("text", label, Number(value.toPrecision(3))));
  }
  const step = tickStep(xMax - xMin, width / 140);
  for (let value = Math.ceil(xMin / step) * step; value <= xMax + 1e-9; value += step) {
    const label = { x: x(value), y: height - 8, "text-anchor": "middle" };
    svg.append(element("text", label, xText(Number(value.toPrecision(6)))));
  }
  let legend = EDGE.left;
  for (const line of lines) {
    const inside = line.points.filter(([px]) => px >= xMin - 1e-9);
    const path = inside.map(([px, py], i) => `${i ? "L" : "M"}${x(Math.min(px, xMax)).toFixed(1)} ${y(Math.min(py, yMax)).toFixed(1)}`);
    svg.append(element("path", { class: line.kind, d: path.join("") || "M0 0" }));
    svg.append(element("path", { class: line.kind, d: `M${legend} 8h18` }));
    svg.append(element("text", { x: legend + 23, y: 12 }, line.name));
    legend += 38 + 6.4 * line.name.length;
  }
  svg.append(element("text", { x: width - EDGE.right, y: 12, "text-anchor": "end" }, `${yName}, ${xName}`));
  box.replaceChildren(svg);
}
