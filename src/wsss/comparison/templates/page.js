"use strict";
// tables sort by the column whose heading is pressed; numbers by their value, what has none last
for (const table of document.querySelectorAll("table.grid")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      const keyOf = row => {
        const text = row.cells[column].textContent.trim();
        return [parseFloat(text.replace("reference", "0").replace("+", "")), text];
      };
      const compare = (a, b) => {
        const [[x, s], [y, t]] = [keyOf(a), keyOf(b)];
        if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
        return (down ? -1 : 1) * (isNaN(x) ? s.localeCompare(t) : x - y);
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    };
  });
}
// what a point or line of a chart is, beside the pointer
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointermove", event => {
  const mark = event.target.closest(".chart svg [aria-label]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const right = innerWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(event.clientX + 12, right)) + "px";
  tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
});
// pictures: a click or Enter enlarges, arrows go on, Escape closes
const dialog = document.querySelector("dialog");
if (dialog) {
  const zooms = [...document.querySelectorAll(".zoom")];
  const [image, text] = dialog.querySelectorAll("img, span");
  const [back, on, close] = dialog.querySelectorAll("button");
  let at = 0;
  const show = index => {
    at = (index + zooms.length) % zooms.length;
    const from = zooms[at].querySelector("img");
    const scale = Math.min(0.9 * innerWidth / from.naturalWidth, 0.75 * innerHeight / from.naturalHeight);
    image.src = from.src;
    image.className = from.className;
    image.style.width = scale * from.naturalWidth + "px";
    image.alt = text.textContent = from.alt;
  };
  zooms.forEach((zoom, index) => zoom.onclick = () => { show(index); dialog.showModal(); on.focus(); });
  back.onclick = () => show(at - 1);
  on.onclick = () => show(at + 1);
  close.onclick = () => dialog.close();
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => zooms[at].focus();
  dialog.onkeydown = event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step) show(at + step);
  };
}
