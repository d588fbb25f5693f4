"use strict";
const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
const withToken = (path) => path + (token ? (path.includes("?") ? "&" : "?") + "token=" + encodeURIComponent(token) : "");
const KEPT = 600; // thumbnails
let socket, info, session = null, paused = false, waitingForStart = false, queue = [], speed = 3;
let frames = new Map(); // latent frame -> {urls, node, segment}
let chosen = new Set(), anchor = null, sees = null, numbers = null, shownArm = "", playing = [], shownFrames = [];
let screens = new Map(), clock = 0, lastCaption = "", branches = null, pending = null;

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}
function say(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => ($("toast").hidden = true), 5000);
}
function send(type, values = {}) {
  const open = Boolean(socket) && socket.readyState === WebSocket.OPEN;
  if (open) socket.send(JSON.stringify({ type, ...values }));
  else say("There is no connection to the server.");
  return open;
}
function state(text, on) {
  $("state").textContent = text;
  document.body.classList.toggle("on", Boolean(on));
}
const onAir = () => state(paused ? "paused" : "live", !paused);

/* connection */
async function begin() {
  const answer = await fetch(withToken("/v1/info"));
  if (!answer.ok) return state("a token is needed: open the printed address");
  info = await answer.json();
  $("model").textContent = info.model || "";
  const two = info.arms_there.length > 1;
  $("arms").parentElement.hidden = !two;
  $("story").hidden = !info.story;
  $("blend").placeholder = info.transition_blocks || 0;
  screenFor(info.arms_there);
  connect();
  if (info.story) {
    const told = await story(1 + Math.floor(Math.random() * 1e6));
    if (!$("prompt").value) $("prompt").value = told[0].prompt;
  }
}
function connect() {
  const scheme = location.protocol === "https:" ? "wss://" : "ws://";
  socket = new WebSocket(scheme + location.host + withToken("/v1/realtime/video"));
  socket.binaryType = "arraybuffer";
  socket.onopen = () => state("ready");
  socket.onclose = () => { ended("disconnected"); setTimeout(connect, 1500); };
  socket.onmessage = (message) => (typeof message.data === "string" ? event(JSON.parse(message.data)) : binary(message.data));
}
async function story(seed) {
  return (await (await fetch(withToken("/v1/story?seed=" + seed))).json()).prompts;
}

/* events */
function event(message) {
  switch (message.type) {
    case "video.start": return started(message);
    case "session.done": return ended(message.reason);
    case "error": waitingForStart = false; if (session && !branches) onAir(); return say(message.message);
    case "session.prompt_update.accepted": return remark(message.notice);
    case "session.pause.accepted":
      paused = message.paused; document.body.classList.toggle("paused", paused); return onAir();
    case "session.route.accepted":
      return say(message.frames.length ? `back for ${message.blocks} blocks: ${message.frames.join(", ")}` : "back to the deployment context");
    case "session.pin.accepted": if (numbers) { numbers.pinned = message.pinned; mark(); } return;
    case "session.reset.accepted": forget(0); playing = []; return listQueue(true);
    case "session.choose.accepted": forget(message.frame); playing = []; return;
    case "session.snapshot.accepted": return saved("Snapshot " + message.snapshot, null, message.snapshot);
    case "session.export.accepted": return saved(message.file, message.url);
  }
}
function remark(notice) {
  $("notice").textContent = notice; $("notice").hidden = !notice;
}
function started(message) {
  session = message.session; waitingForStart = false; paused = false;
  document.body.classList.remove("paused");
  forget(0); playing = [];
  screenFor(message.arms);
  $("seed").value = message.seed;
  remark(message.notice);
  $("send").textContent = "Switch at next block";
  state("live", true);
  if (queue.length && queue[0].prompt === message.prompt) queue.shift();
  if (queue.length) listQueue(true); // a new session knows nothing of it
}
function ended(reason) {
  session = null; waitingForStart = false; branches = null; state(reason); $("send").textContent = "Start";
  if ($("branches").open) $("branches").close();
  const next = pending; // another session takes its place
  pending = null;
  if (next) send("session.start", next);
}
function saved(text, url, snapshot) {
  const line = $("saved");
  line.replaceChildren(make("span", text + " "));
  if (url) {
    const link = make("a", "download");
    link.href = withToken(url); link.download = text;
    line.append(link);
  } else {
    const again = make("a", "continue it"), then = [...queue];
    again.href = "#"; again.onclick = (e) => { e.preventDefault(); queue = [...then]; listQueue(); restore(snapshot); };
    line.append(again);
  }
  line.hidden = false;
}
function restore(snapshot) {
  if (session) { pending = { snapshot, speed }; send("session.stop"); } else send("session.start", { snapshot, speed });
}

/* blocks */
function binary(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const cut = (size) => { const blob = new Blob([new Uint8Array(buffer, at, size)]); at += size; return blob; };
  if (header.type === "session.fork.accepted") return openFork(header, header.frames.map((sizes) => sizes.map(cut)));
  const pictures = {};
  for (const [arm, sizes] of Object.entries(header.frames)) pictures[arm] = sizes.map(cut);
  block(header, pictures);
}
async function block(header, pictures) {
  const arms = Object.keys(pictures);
  const bitmaps = {};
  const entry = { header, bitmaps, at: 0, count: pictures[arms[0]].length, ready: false };
  playing.push(entry);
  keep(header, pictures);
  for (const arm of arms) bitmaps[arm] = await Promise.all(pictures[arm].map((blob) => createImageBitmap(blob)));
  entry.ready = true;
}
function keep(header, pictures) {
  const arms = Object.keys(pictures), each = info.frames_per_latent, strip = $("strip");
  const newest = strip.scrollLeft + strip.clientWidth > strip.scrollWidth - 60; // else somebody looks back
  forget(header.start);
  for (let n = 0; n < info.block; n++) {
    const frame = header.start + n;
    const pixel = frame === 0 ? 0 : 1 + each * (frame - 1);
    const urls = {};
    for (const arm of arms) urls[arm] = URL.createObjectURL(pictures[arm][Math.min(pixel - header.latent, pictures[arm].length - 1)]);
    const node = make("button", undefined, "frame");
    node.type = "button"; node.title = `frame ${frame}: ${header.prompt}`;
    node.setAttribute("aria-pressed", "false"); node.setAttribute("aria-label", "frame " + frame);
    const image = make("img"); image.alt = ""; image.src = urls[shownArm in urls ? shownArm : arms[arms.length - 1]];
    node.append(image);
    if (n === 0) {
      node.classList.add("start");
      node.append(make("span", frame));
      const before = frames.get(frame - 1);
      if (before && before.segment !== header.segment) node.classList.add("switch");
    }
    node.onclick = (e) => choose(frame, e.shiftKey);
    frames.set(frame, { urls, node, segment: header.segment });
    strip.append(node);
  }
  numbers = header.numbers; sees = header.sees;
  while (frames.size > KEPT) drop(frames.keys().next().value);
  mark();
  if (newest && !chosen.size) strip.scrollLeft = strip.scrollWidth;
}
function drop(frame) {
  const gone = frames.get(frame);
  for (const url of Object.values(gone.urls)) URL.revokeObjectURL(url);
  gone.node.remove(); frames.delete(frame); chosen.delete(frame);
}
function forget(from) {
  for (const frame of [...frames.keys()]) if (frame >= from) drop(frame);
  if (!from) { chosen.clear(); $("caption").textContent = ""; lastCaption = ""; }
  selection();
}
function mark() {
  if (!sees) return;
  const resident = new Set(numbers.resident), pinned = new Set(numbers.pinned);
  const of = {};
  for (const kind of ["local", "sink", "routed"]) for (const frame of sees[kind]) of[frame] = kind;
  for (const [frame, { node }] of frames) {
    const kind = of[frame] || (resident.has(frame) ? "resident" : "freed");
    for (const name of ["sink", "routed", "local", "resident", "freed"]) node.classList.toggle(name, name === kind);
    node.classList.toggle("seen", frame in of);
    node.classList.toggle("pinned", pinned.has(frame));
  }
  tiles();
}

/* selection */
function choose(frame, range) {
  if (range && anchor !== null) for (let n = Math.min(anchor, frame); n <= Math.max(anchor, frame); n++) chosen.add(n);
  else if (chosen.has(frame)) chosen.delete(frame);
  else chosen.add(frame);
  anchor = frame;
  selection();
}
function selection() {
  for (const [frame, { node }] of frames) node.setAttribute("aria-pressed", String(chosen.has(frame)));
  const list = [...chosen].sort((a, b) => a - b);
  $("route").disabled = $("pin").disabled = !list.length;
  $("chosen").textContent = list.length ? `${list.length > 1 ? "frames" : "frame"} ${list.join(", ")}` : "Click frames to steer by them; shift-click takes a range.";
  const all = list.length && numbers && list.every((frame) => numbers.pinned.includes(frame));
  $("pin").textContent = all ? "Unpin" : "Pin";
}
const picked = () => [...chosen].sort((a, b) => a - b);
function route() {
  if (!chosen.size) return;
  let list = picked();
  if (list.length > info.routed_slots) list = list.slice(-info.routed_slots);
  send("session.route", { frames: list, blocks: Number($("blocks").value) || 1 });
  chosen.clear(); selection();
}
function pin() {
  if (!chosen.size) return;
  send("session.pin", { frames: picked(), pinned: $("pin").textContent === "Pin" });
  chosen.clear(); selection();
}
function fork() {
  if (!session) return;
  const list = picked();
  const frame = list.length ? Math.floor(list[0] / info.block) * info.block : -1;
  send("session.fork", { frame: frame === 0 ? info.block : frame });
  state("forking", true);
}

/* forks */
async function openFork(header, pictures) {
  const grid = $("grid");
  grid.replaceChildren();
  const own = branches = { canvases: [], bitmaps: [], at: 0, frame: header.frame };
  for (const [n, blobs] of pictures.entries()) {
    const bitmaps = await Promise.all(blobs.map((blob) => createImageBitmap(blob)));
    if (branches !== own) return; // the session has ended
    const button = make("button", undefined, "branch"); button.type = "button";
    const canvas = make("canvas"); canvas.width = bitmaps[0].width; canvas.height = bitmaps[0].height;
    canvas.style.setProperty("--ratio", bitmaps[0].width / bitmaps[0].height);
    const label = make("span"); label.append(make("kbd", n + 1));
    if (!header.routes[n].length) label.append("as deployed");
    else {
      label.append("with");
      for (const frame of header.routes[n]) {
        const known = frames.get(frame);
        if (known) { const image = make("img"); image.alt = "frame " + frame; image.title = image.alt; image.src = known.urls[header.arm] || Object.values(known.urls)[0]; label.append(image); }
        else label.append(" " + frame);
      }
    }
    button.append(canvas, label); button.onclick = () => decide(n);
    button.dataset.branch = n; button.draggable = true;
    button.ondragstart = () => { branches.held = button; };
    button.ondragover = (e) => { e.preventDefault(); if (branches.held) rank(branches.held, [...grid.children].indexOf(button)); };
    grid.append(button);
    branches.canvases.push(canvas); branches.bitmaps.push(bitmaps);
  }
  if (!$("branches").open) $("branches").showModal();
}
function rank(button, to) { // the order of the grid, the best first
  const all = [...$("grid").children], from = all.indexOf(button);
  if (from === to || !all[to]) return;
  if (from < to) all[to].after(button); else all[to].before(button);
  branches.ranked = true;
}
function decide(branch) {
  if (!branches) return;
  const others = [...$("grid").children].map((button) => Number(button.dataset.branch)).filter((n) => n !== branch);
  const ranking = branches.ranked && branch >= 0 ? [branch, ...others] : [];
  branches = null;
  if ($("branches").open) $("branches").close();
  send("session.choose", { branch, ranking });
  chosen.clear(); selection();
  onAir();
}

/* screens */
function screenFor(arms) {
  if (arms.join() === [...screens.keys()].join()) return;
  screens = new Map(); $("screens").replaceChildren();
  for (const arm of arms) {
    const figure = make("figure", undefined, "screen " + arm);
    const canvas = make("canvas"); canvas.width = canvas.height = 32; canvas.id = "screen-" + arm;
    figure.append(canvas, make("figcaption", arm));
    $("screens").append(figure);
    screens.set(arm, canvas);
  }
  $("shown").replaceChildren(...arms.slice().reverse().map((arm) => { const o = make("option", arm); o.value = arm; return o; }));
  $("shown").parentElement.hidden = arms.length < 2;
  shownArm = arms[arms.length - 1];
}
function paint(canvas, bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width; canvas.height = bitmap.height;
    document.documentElement.style.setProperty("--ratio", bitmap.width / bitmap.height);
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}
function period() { // milliseconds per frame: the stream's rate, a little faster where blocks wait
  const rate = info.rate * (speed || 3);
  const waiting = playing.reduce((sum, one) => sum + one.count - one.at, 0);
  const first = playing[0];
  const backlog = first ? waiting / first.count : 0;
  return (1000 / rate) * (speed === 0 ? Math.max(0.05, 1 / Math.max(1, backlog * 2)) : backlog > 2 ? 0.6 : 1);
}
function tick(now) {
  requestAnimationFrame(tick);
  if (branches && now - (branches.last || 0) > 1000 / (info.rate * 1.5)) {
    branches.last = now;
    branches.canvases.forEach((canvas, n) => paint(canvas, branches.bitmaps[n][branches.at % branches.bitmaps[n].length]));
    branches.at++;
  }
  if (!info || paused || !playing.length || !playing[0].ready) return;
  if (now - clock < period() - 4) return;
  clock = now - clock > 500 ? now : clock + period();
  const entry = playing[0];
  for (const [arm, bitmaps] of Object.entries(entry.bitmaps)) {
    const canvas = screens.get(arm);
    if (canvas) paint(canvas, bitmaps[entry.at]);
  }
  shownFrames.push(now);
  const { header } = entry;
  if (header.prompt !== lastCaption) {
    $("caption").textContent = lastCaption = header.prompt;
    $("caption").classList.add("fresh"); setTimeout(() => $("caption").classList.remove("fresh"), 900);
    if (queue.length && queue[0].prompt === header.prompt) { queue.shift(); listQueue(); }
  }
  $("clock").textContent = `frame ${header.start + Math.floor((entry.at / entry.count) * info.block)}`;
  if (++entry.at >= entry.count) {
    playing.shift();
    for (const bitmaps of Object.values(entry.bitmaps)) for (const bitmap of bitmaps) bitmap.close();
  }
}

/* numbers */
const seconds = (value) => (value === null || value === undefined ? "–" : value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`);
function tiles() {
  const now = performance.now();
  shownFrames = shownFrames.filter((at) => now - at < 2000);
  const share = numbers.deadlines_met;
  const list = [
    ["frames shown per second", shownFrames.length ? Math.round(shownFrames.length / 2) : "–"],
    ["first frame", seconds(numbers.first_frame_s)],
    ["between blocks, p50", seconds(numbers.block_p50_s)],
    ["p95", seconds(numbers.block_p95_s)],
    ["p99", seconds(numbers.block_p99_s)],
    ["blocks in time", share === null ? "–" : `${(100 * share).toFixed(1)} %`, share === null ? "" : share > 0.98 ? "good" : "bad"],
    ["stalls", `${numbers.stalls} (${seconds(numbers.stalled_s)})`],
    ["prompt → shown", seconds(numbers.switch_shown_s)],
    ["prompt → scorer sees it", seconds(numbers.switch_seen_s)],
    ["pages in use", `${numbers.pages_in_use} / ${numbers.pages_total}`],
    ["memory, peak", `${Math.round(numbers.memory_bytes / 1e6)} MB`],
    ["viewers / sessions", `${numbers.viewers} / ${numbers.sessions}`],
  ];
  $("tiles").replaceChildren(...list.map(([name, value, tone]) => {
    const tile = make("div", undefined, tone || "");
    tile.append(make("dt", name), make("dd", value));
    return tile;
  }));
}

/* controls */
const blend = () => ($("blend").value === "" ? null : Number($("blend").value));
function cue() {
  return { prompt: $("prompt").value.trim(), frames: Number($("lasts").value) || 0, transition_blocks: blend() };
}
function show(one) {
  if (!one.prompt) return $("prompt").focus();
  if (session) return send("session.prompt_update", one);
  if (waitingForStart) return;
  waitingForStart = send("session.start", opening(one));
}
function opening({ prompt, frames }) {
  return { prompt, frames, seed: Number($("seed").value) || 0, arms: $("arms").value, speed };
}
function listQueue(push) {
  $("next").hidden = !queue.length;
  $("queue").replaceChildren(...queue.map((one, n) => {
    const row = make("li");
    const lasts = one.frames ? `${one.frames} frames` : "∞", soft = one.transition_blocks ? `, blends over ${one.transition_blocks}` : "";
    const prompt = make("span", one.prompt);
    prompt.dir = "auto";
    row.append(prompt, make("span", lasts + soft, "soft"));
    const gone = make("button", "×", "quiet"); gone.setAttribute("aria-label", "remove"); gone.onclick = () => { queue.splice(n, 1); listQueue(true); };
    row.append(gone);
    return row;
  }));
  if (push && session) send("session.queue", { prompts: queue });
}
async function tell() {
  const prompts = await story(1 + Math.floor(Math.random() * 1e6)).catch(() => null);
  if (!prompts) return say("There is no connection to the server.");
  $("prompt").value = prompts[0].prompt;
  show(prompts[0]);
  queue = prompts.slice(1);
  listQueue(true);
}
$("form").onsubmit = (e) => { e.preventDefault(); show(cue()); };
$("prompt").onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); show(cue()); } };
$("enqueue").onclick = () => { const one = cue(); if (one.prompt) { queue.push(one); listQueue(true); } };
$("next").onclick = () => { const [one, ...rest] = queue; queue = rest; show(one); listQueue(true); };
$("story").onclick = tell;
$("pause").onclick = () => (session ? send("session.pause", { paused: !paused }) : show(cue()));
$("reset").onclick = () => (session ? send("session.reset", { seed: Number($("seed").value) || 0 }) : show(cue()));
$("speed").onchange = () => { speed = Number($("speed").value); if (session) send("session.speed", { speed }); };
$("arms").onchange = () => { if (session) { pending = opening({ ...cue(), prompt: lastCaption || cue().prompt }); send("session.stop"); } };
$("shown").onchange = () => { shownArm = $("shown").value; for (const { urls, node } of frames.values()) node.firstChild.src = urls[shownArm]; };
$("route").onclick = route; $("pin").onclick = pin; $("fork").onclick = fork;
$("dismiss").onclick = () => decide(-1);
$("branches").oncancel = (e) => { e.preventDefault(); decide(-1); };
$("snapshot").onclick = () => send("session.snapshot");
for (const button of document.querySelectorAll("[data-export]")) button.onclick = () => send("session.export", { what: button.dataset.export });
document.onkeydown = (e) => {
  if (branches && /^[1-9]$/.test(e.key) && Number(e.key) <= branches.canvases.length) return decide(Number(e.key) - 1);
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[e.key];
  if (branches && step && e.target.matches(".branch")) {
    e.preventDefault(); rank(e.target, [...$("grid").children].indexOf(e.target) + step); return e.target.focus();
  }
  if (e.target.matches("input, textarea, select") || e.metaKey || e.ctrlKey || e.altKey || branches) return;
  const act = { " ": () => $("pause").click(), s: tell, r: () => $("reset").click(), f: fork, b: route, p: pin, Escape: () => { chosen.clear(); selection(); } }[e.key];
  if (!act || (e.key === " " && e.target.matches("button"))) return;
  e.preventDefault();
  if (!e.repeat) act(); // a key that is held acts once
};
begin();
requestAnimationFrame(tick);
