"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const number = (value) => value.toLocaleString("en-US");

const zoomed = { figures: [], at: 0 };

function show(at) {
  zoomed.at = (at + zoomed.figures.length) % zoomed.figures.length;
  const button = zoomed.figures[zoomed.at];
  const image = button.querySelector("img");
  $("large").src = image.src;
  $("large").alt = image.alt;
  $("about").textContent = `${image.alt} (${zoomed.at + 1} of ${zoomed.figures.length})`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".zoom");
  if (!button) return;
  const album = button.closest("[data-album]"); // of which one picture is shown at a time
  zoomed.figures = album ? all(".zoom", album) : all(".zoom").filter((one) => one.offsetParent);
  show(zoomed.figures.indexOf(button));
  $("viewer").showModal();
});
$("viewer").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) { event.preventDefault(); show(zoomed.at + step); }
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("before").addEventListener("click", () => show(zoomed.at - 1));
$("after").addEventListener("click", () => show(zoomed.at + 1));
$("close").addEventListener("click", () => $("viewer").close());
