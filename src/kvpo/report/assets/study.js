"use strict";
// The two clips of a pair play together while they can be seen, or when asked if motion is unwelcome.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
for (const video of document.querySelectorAll("video")) video.controls = still;
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    for (const video of target.querySelectorAll("video")) {
      if (isIntersecting && !still) {
        video.currentTime = 0;
        video.play().catch(() => {});
      } else video.pause();
    }
  }
});
for (const card of document.querySelectorAll(".decided .card")) watcher.observe(card);
