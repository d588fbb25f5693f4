"use strict";
// The two clips of a pair play together while they can be seen.
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    for (const video of target.querySelectorAll("video")) {
      if (isIntersecting) {
        video.currentTime = 0;
        video.play().catch(() => {});
      } else video.pause();
    }
  }
});
for (const card of document.querySelectorAll(".decided .card")) watcher.observe(card);
