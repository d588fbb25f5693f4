"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const clips = JSON.parse(document.getElementById("clips").textContent);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- clips: an image of all frames, or an h264 file ----
  const images = new Map();
  function imageOf(name) {
    if (!images.has(name)) {
      const image = new Image();
      image.addEventListener("load", () => { image.dataset.ready = "1"; drawStills(name); clock.dirty = true; });
      image.src = "data:image/png;base64," + clips[name].source;
      images.set(name, image);
    }
    return images.get(name);
  }
  const files = new Map();
  function fileOf(name) {
    if (!files.has(name)) {
      const bytes = Uint8Array.from(atob(clips[name].source), (character) => character.charCodeAt(0));
      files.set(name, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
    }
    return files.get(name);
  }
  function paint(context, name, frame) {
    const clip = clips[name], image = imageOf(name);
    if (!image.dataset.ready) return false;
    const column = Math.floor(frame / clip.perColumn), row = frame % clip.perColumn;
    context.drawImage(image, column * clip.width, row * clip.height, clip.width, clip.height, 0, 0, clip.width, clip.height);
    return true;
  }
  function drawStills(name) {
    for (const still of all("canvas[data-still]")) {
      if (still.dataset.clip === name) paint(still.getContext("2d"), name, Number(still.dataset.still));
    }
  }

  // ---- one clock for every video on the page, in seconds ----
  const clock = { time: 0, playing: false, speed: 1, dirty: true, previous: null };
  const screens = all(".screen[data-clip]").map((element) => ({
    element,
    name: element.dataset.clip,
    clip: clips[element.dataset.clip],
    film: element.closest(".film"),
    member: element.closest(".member"),
    visible: false,
  }));
  const longest = Math.max(0, ...screens.map((screen) => screen.clip.frames / screen.clip.rate));
  const frameAt = (clip) => Math.floor(clock.time * clip.rate + 1e-6) % clip.frames;

  function differenceTo(screen) {
    if (!screen.member || screen.member.classList.contains("anchor")) return null;
    const box = screen.film.querySelector("[data-difference]");
    return box && box.checked ? screens.find((other) => other.film === screen.film && other.member.classList.contains("anchor")) : null;
  }
  function drawCanvas(screen) {
    const frame = frameAt(screen.clip), anchor = differenceTo(screen);
    const state = frame + (anchor ? " minus anchor" : "");
    if (screen.element.dataset.shown === state) return;
    const context = screen.element.getContext("2d");
    if (!paint(context, screen.name, frame)) return;
    if (anchor && anchor.clip.kind === "sprite") {
      context.globalCompositeOperation = "difference";
      const painted = paint(context, anchor.name, Math.min(frame, anchor.clip.frames - 1));
      context.globalCompositeOperation = "source-over";
      if (!painted) return;
    }
    screen.element.style.filter = anchor ? "brightness(2.2)" : "";
    screen.element.dataset.shown = state;
  }
  function drawVideo(screen) {
    const video = screen.element;
    if (!video.src) video.src = fileOf(screen.name);
    const target = clock.time % (screen.clip.frames / screen.clip.rate);
    const moving = clock.playing && !video.seeking;
    if (Math.abs(video.currentTime - target) > (clock.playing ? 0.2 : 0.5 / screen.clip.rate) && !video.seeking) {
      video.currentTime = target + 0.01 / screen.clip.rate;
    }
    video.playbackRate = clock.speed;
    if (moving && video.paused) video.play().catch(() => { clock.playing = false; showPlaying(); });
    if (!clock.playing && !video.paused) video.pause();
  }

  // ---- captions, segment tracks and timeline playheads follow the clock ----
  const films = all(".film").map((element) => ({
    element,
    frames: Number(element.dataset.frames),
    switches: JSON.parse(element.dataset.switches),
    parts: all(".track .part", element),
    captions: all(".captions p", element),
    playheads: all(".playhead", element),
    screen: screens.find((screen) => screen.film === element),
  }));
  function drawFilm(film) {
    if (!film.screen || !film.frames) return;
    const { clip } = film.screen, frame = frameAt(clip);
    if (film.shown === frame) return;
    film.shown = frame;
    const latent = Math.floor((frame * film.frames) / clip.frames);
    const segment = film.switches.filter((position) => latent >= position).length;
    film.parts.forEach((part, index) => part.classList.toggle("now", index === segment));
    film.captions.forEach((caption, index) => caption.classList.toggle("now", index === segment));
    const left = ((frame + 0.5) / clip.frames) * 100 + "%";
    for (const playhead of film.playheads) playhead.style.left = left;
  }

  const play = document.getElementById("play"), scrub = document.getElementById("scrub");
  const position = document.getElementById("position"), speed = document.getElementById("speed");
  const transport = document.querySelector(".transport");
  function showPlaying() { play.classList.toggle("playing", clock.playing); }
  function draw() {
    for (const screen of screens) {
      if (screen.visible) (screen.clip.kind === "sprite" ? drawCanvas : drawVideo)(screen);
      else if (screen.clip.kind === "video" && !screen.element.paused) screen.element.pause();
    }
    films.forEach(drawFilm);
    if (longest) {
      scrub.value = String((clock.time / longest) * 1000);
      position.textContent = clock.time.toFixed(1) + " / " + longest.toFixed(1) + " s";
    }
  }
  function tick(now) {
    if (clock.playing && clock.previous !== null) {
      clock.time += (clamp(now - clock.previous, 0, 250) / 1000) * clock.speed;
      if (clock.time >= longest) clock.time %= longest;
      clock.dirty = true;
    }
    clock.previous = now;
    if (clock.dirty) { clock.dirty = false; draw(); }
    requestAnimationFrame(tick);
  }
  function seek(time) { clock.time = clamp(time, 0, Math.max(0, longest - 1e-3)); clock.dirty = true; }
  function setPlaying(playing) { clock.playing = playing && longest > 0; showPlaying(); clock.dirty = true; }

  if (longest) {
    play.addEventListener("click", () => setPlaying(!clock.playing));
    scrub.addEventListener("input", () => { setPlaying(false); seek((Number(scrub.value) / 1000) * longest); });
    speed.addEventListener("change", () => { clock.speed = Number(speed.value); });
    document.addEventListener("keydown", (event) => {
      if (transport.classList.contains("away")) return; // no video in sight: the keys scroll
      if (event.target.closest("input, select, button, summary, a") || event.metaKey || event.ctrlKey || event.altKey) return;
      if (event.key === " ") { event.preventDefault(); setPlaying(!clock.playing); }
      const rate = screens[0].clip.rate;
      if (event.key === "ArrowRight") { setPlaying(false); seek((Math.floor(clock.time * rate + 1e-6) + 1.001) / rate); }
      if (event.key === "ArrowLeft") { setPlaying(false); seek((Math.floor(clock.time * rate + 1e-6) - 0.999) / rate); }
    });
  }
  function durationOf(film) { return film.screen ? film.screen.clip.frames / film.screen.clip.rate : 0; }
  for (const film of films) {
    for (const track of all(".track", film.element)) {
      track.addEventListener("click", (event) => {
        const box = track.getBoundingClientRect();
        seek(((event.clientX - box.left) / box.width) * durationOf(film));
      });
    }
    for (const button of all("[data-seek]", film.element)) {
      button.addEventListener("click", () => { setPlaying(false); seek(Number(button.dataset.seek) * durationOf(film) + 1e-3); });
    }
  }
  for (const box of all("[data-difference]")) box.addEventListener("change", () => { clock.dirty = true; });

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const screen = screens.find((one) => one.element === entry.target);
      screen.visible = entry.isIntersecting;
    }
    transport.classList.toggle("away", !screens.some((screen) => screen.visible));
    clock.dirty = true;
  }, { rootMargin: "80px" });
  screens.forEach((screen) => watcher.observe(screen.element));
  const stillWatcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      const still = entry.target;
      stillWatcher.unobserve(still);
      paint(still.getContext("2d"), still.dataset.clip, Number(still.dataset.still));
    }
  }, { rootMargin: "200px" });
  all("canvas[data-still]").forEach((still) => stillWatcher.observe(still));

  // ---- sorting and tabs ----
  for (const select of all("select[data-sort]")) {
    select.addEventListener("change", () => {
      const list = document.getElementById(select.dataset.sort);
      const descending = select.value !== "order" && !select.value.startsWith("-");
      const key = select.value.replace(/^-/, "");
      const value = (item) => {
        if (item.classList.contains("anchor")) return -Infinity;
        const text = item.dataset[key];
        return text === "" || text === undefined ? Infinity : Number(text) * (descending ? -1 : 1);
      };
      const items = Array.from(list.children);
      items.sort((a, b) => { const x = value(a), y = value(b); return x < y ? -1 : x > y ? 1 : 0; });
      list.append(...items);
    });
  }
  for (const list of all("[role=tablist]")) {
    const tabs = all("[role=tab]", list);
    for (const tab of tabs) {
      tab.addEventListener("click", () => {
        for (const other of tabs) {
          const chosen = other === tab;
          other.setAttribute("aria-selected", String(chosen));
          document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
        }
      });
    }
  }

  // ---- values under the pointer ----
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  function format(value) {
    if (value === null || value === undefined) return "n/a";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace(/^-/, "\u2212");
  }
  for (const chart of all(".chart")) {
    const data = JSON.parse(chart.dataset.chart), plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * 100;
      let nearest = 0;
      data.at.forEach((value, index) => { if (Math.abs(value - at) < Math.abs(data.at[nearest] - at)) nearest = index; });
      cursor.style.left = data.at[nearest] + "%";
      const lines = data.series.map((series) => {
        const spread = series.spread && series.spread[nearest] !== null ? " \u00b1 " + format(series.spread[nearest]) : "";
        return series.name + "  " + format(series.y[nearest]) + spread;
      });
      tip.textContent = ["update " + data.x[nearest], ...lines].join("\n");
      tip.hidden = false;
      tip.style.left = clamp(event.clientX + 14, 8, window.innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = clamp(event.clientY - tip.offsetHeight - 12, 8, window.innerHeight - tip.offsetHeight - 8) + "px";
    });
    plot.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // ---- copying, navigation ----
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected"; // no clipboard access from this page: the text is selected instead
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const reader = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.get(entry.target.id);
      if (!link) continue;
      link.classList.toggle("here", entry.isIntersecting);
      if (entry.isIntersecting) link.parentElement.scrollLeft = link.offsetLeft - 40;
    }
  }, { rootMargin: "-30% 0px -70% 0px" });
  all("main > section").forEach((section) => reader.observe(section));

  setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  requestAnimationFrame(tick);
})();
