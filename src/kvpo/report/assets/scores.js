"use strict";
(() => {
  const cards = document.getElementById("cards");
  const column = document.getElementById("column"), direction = document.getElementById("direction");
  function sort() {
    const key = "score-" + column.value, sign = Number(direction.value);
    // Cards without this score stay at the end, whatever the direction.
    const value = (card) => (card.hasAttribute("data-" + key) ? sign * Number(card.getAttribute("data-" + key)) : Infinity);
    const ordered = Array.from(cards.children).sort(
      (a, b) => value(a) - value(b) || Number(a.dataset.order) - Number(b.dataset.order));
    cards.append(...ordered);
  }
  column.addEventListener("change", sort);
  direction.addEventListener("change", sort);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !still) entry.target.play().catch(() => {});
      else entry.target.pause();
    }
  });
  for (const video of document.querySelectorAll("video")) seen.observe(video);
})();
