"use strict";
// The link of an invitation ends in #TOKEN: fragments are not sent, so no log holds it.
const token = location.hash.slice(1);
const at = (id) => document.getElementById(id);
const ANSWERS = [["left", "Left", "ArrowLeft"], ["same", "Same", "ArrowDown"], ["right", "Right", "ArrowRight"], ["both_bad", "Both bad", "ArrowUp"]];
const SPEEDS = [1, 0.5, 0.25, 2];
const DRIFT = 0.06;
const state = { session: null, ballot: null, videos: [], answers: {}, order: [], shown: 0, watched: false, speed: 0, ahead: null, busy: false };

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (response.ok) return response;
  const detail = (await response.json().catch(() => ({}))).detail;
  const error = new Error(typeof detail === "string" ? detail : `the server answers ${response.status}`);
  error.status = response.status;
  throw error;
}
const askJson = async (path, body) => (await ask(path, body)).json();

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
function show(id) {
  for (const section of ["welcome", "ballot", "message"]) at(section).hidden = section !== id;
}
function say(headline, detail) {
  at("headline").textContent = headline;
  at("detail").textContent = detail;
  at("undo-last").hidden = true;
  show("message");
}
function note(text, wrong = false) {
  at("note").textContent = text;
  at("note").classList.toggle("wrong", wrong);
}

// ---- ballots

async function load(position) {
  const ballot = await askJson(`/ballots/${position}`);
  const places = [...Array(ballot.videos).keys()];
  ballot.sources = await Promise.all(places.map(async (place) =>
    URL.createObjectURL(await (await ask(`/ballots/${position}/videos/${place}`)).blob())));
  return ballot;
}

function showProgress({ done, ballots }) {
  at("progress").style.width = `${100 * done / Math.max(1, ballots)}%`;
  at("progress").parentElement.setAttribute("aria-valuemax", ballots);
  at("progress").parentElement.setAttribute("aria-valuenow", done);
  at("count").textContent = `${done} of ${ballots}`;
}

async function present() {
  const { session } = state;
  if (session.closed || session.done >= session.ballots) showProgress(session);
  if (session.closed) return say("This study is closed.", "Thank you for taking part. Voting has ended.");
  if (session.done >= session.ballots) {
    say("That was the last one. Thank you!", `${session.done} votes of ${session.rater} are stored. You can close this page.`);
    at("undo-last").hidden = session.done === 0;
    return;
  }
  const former = state.ballot;
  const ahead = state.ahead && state.ahead.position === session.done ? state.ahead.loaded : load(session.done);
  const ballot = await ahead;
  for (const source of former ? former.sources : []) URL.revokeObjectURL(source);
  Object.assign(state, { ballot, answers: {}, order: [...ballot.sources.keys()], watched: false, shown: performance.now(), ahead: null });
  draw(ballot);
  showProgress(session);
  show("ballot");
  note("");
  if (session.done + 1 < session.ballots) {
    state.ahead = { position: session.done + 1, loaded: load(session.done + 1) };
    state.ahead.loaded.catch(() => { state.ahead = null; });
  }
}

function draw(ballot) {
  at("prompts").replaceChildren(...ballot.prompts.map((text, n) =>
    element("li", { dir: "auto" }, ...(ballot.prompts.length > 1 ? [element("b", { textContent: n + 1 })] : []), text)));
  at("stage").classList.toggle("ranked", ballot.ranked);
  at("stage").style.setProperty("--columns", ballot.ranked && (ballot.videos === 3 || ballot.videos > 4) ? 3 : 2);
  const names = ballot.ranked ? ballot.sources.map((_, n) => `${n + 1}`) : ["Left", "Right"];
  state.videos = ballot.sources.map((src) => element("video", { src, muted: true, playsInline: true, preload: "auto" }));
  at("stage").replaceChildren(...state.videos.map((video, n) => {
    const shot = element("figure", { className: "shot" }, video, element("figcaption", { textContent: names[n] }));
    shot.dataset.place = n;
    if (ballot.ranked) {
      shot.tabIndex = 0;
      shot.setAttribute("aria-label", `Video in position ${n + 1}; move it with the arrow keys`);
    }
    return shot;
  }));
  state.videos[0].addEventListener("loadedmetadata", () =>
    at("stage").classList.toggle("wide", state.videos[0].videoWidth > 1.3 * state.videos[0].videoHeight));
  const asked = state.session.questions.filter((one) => ballot.questions.includes(one.name));
  at("questions").replaceChildren(...(ballot.ranked
    ? [element("p", { className: "question due", textContent: `${asked[0].text} Drag the videos into order, the best first.` })]
    : asked.map(questionCard)));
  at("next").disabled = !ballot.ranked;
  at("undo").disabled = state.session.done === 0;
  mark();
  setPlaying(true);
}

function questionCard(question) {
  const buttons = ANSWERS.map(([answer, label]) => {
    const button = element("button", { type: "button", textContent: label });
    button.dataset.answer = answer;
    button.addEventListener("click", () => choose(question.name, answer));
    return button;
  });
  const card = element("div", { className: "question" }, element("h2", { textContent: question.text, title: question.hint }),
    element("div", { className: "answers" }, ...buttons));
  card.dataset.question = question.name;
  card.setAttribute("role", "group");
  card.setAttribute("aria-label", question.text);
  return card;
}

const due = () => state.ballot.questions.find((name) => !state.answers[name]);

function choose(name, answer) {
  if (state.busy) return;
  state.answers[name] = answer;
  mark();
}

function mark() {
  const { ballot, answers } = state;
  if (ballot.ranked) return;
  const next = due();
  for (const card of at("questions").children) {
    const name = card.dataset.question;
    card.classList.toggle("due", name === next);
    card.classList.toggle("said", Boolean(answers[name]));
    for (const button of card.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.answer === answers[name]));
    }
  }
  const first = answers[ballot.questions[0]];
  [...at("stage").children].forEach((shot, n) => shot.classList.toggle("chosen", first === ["left", "right"][n]));
  at("next").disabled = next !== undefined;
  const card = at("questions").querySelector(".due");
  if (card && Object.keys(answers).length) card.scrollIntoView({ block: "nearest" });
}

async function submit() {
  const { ballot, session } = state;
  if (state.busy || at("next").disabled) return;
  state.busy = true;
  at("next").disabled = true;
  const sent = { position: ballot.position, milliseconds: Math.min(86400000, Math.round(performance.now() - state.shown)), finished: state.watched };
  if (ballot.ranked) sent.ranking = state.order;
  else sent.answers = state.answers;
  let stored = false;
  try {
    session.done = (await askJson("/votes", sent)).done;
    stored = true;
    window.scrollTo({ top: 0 });
    await present();
  } catch (error) {
    if (stored) return lost(error);
    at("next").disabled = false;
    note(error.status ? error.message : "No connection: your vote is not stored yet. Press Next again.", true);
    if (error.status === 409) await start();
  } finally {
    state.busy = false;
  }
}

async function undo() {
  if (state.busy || state.session.done === 0) return;
  state.busy = true;
  let taken = false;
  try {
    state.session.done = (await askJson("/undo", {})).done;
    taken = true;
    await present();
    note("Taken back. Vote again.");
  } catch (error) {
    if (taken) return lost(error);
    const said = error.status ? error.message : "No connection: nothing was taken back. Try again.";
    if (at("ballot").hidden) at("detail").textContent = said;
    else note(said, true);
  } finally {
    state.busy = false;
  }
}

// ---- playback in step: the longest video is the clock

const clock = () => state.videos.reduce((a, b) => ((b.duration || 0) > (a.duration || 0) ? b : a));
let playing = false;

function setPlaying(value) {
  playing = value;
  at("play").textContent = value ? "❚❚" : "▶";
  for (const video of state.videos) {
    video.playbackRate = SPEEDS[state.speed];
    if (value && !video.ended) video.play().catch(() => {});
    else video.pause();
  }
}
function seek(seconds) {
  for (const video of state.videos) video.currentTime = Math.max(0, Math.min(seconds, video.duration || 0));
}
function step(frames) {
  setPlaying(false);
  seek(clock().currentTime + frames / state.ballot.rate);
}
function replay() {
  seek(0);
  setPlaying(true);
}
function keepInStep() {
  requestAnimationFrame(keepInStep);
  if (at("ballot").hidden || !state.videos.length) return;
  const lead = clock();
  if (!lead.duration || state.videos.some((video) => video.readyState < 2)) return;
  const share = lead.currentTime / lead.duration;
  if (lead.ended || share > 0.995) state.watched = true;
  if (document.activeElement !== at("scrub")) at("scrub").value = 1000 * share;
  [...at("prompts").children].forEach((line, n, all) => {
    const starts = state.ballot.starts;
    const now = starts.length ? share >= starts[n] && (n + 1 === all.length || share < starts[n + 1]) : true;
    line.classList.toggle("now", now);
  });
  if (!playing) return;
  if (lead.ended) return replay();
  for (const video of state.videos) {
    if (video !== lead && lead.currentTime < video.duration && Math.abs(video.currentTime - lead.currentTime) > DRIFT * SPEEDS[state.speed]) {
      video.currentTime = lead.currentTime;
      if (video.paused) video.play().catch(() => {});
    }
  }
}

// ---- rankings: drag a video before another, by pointer or by arrow keys

function move(shot, to) {
  const shots = [...at("stage").children], from = shots.indexOf(shot);
  if (to < 0 || to >= shots.length || to === from) return;
  at("stage").insertBefore(shot, to > from ? shots[to].nextSibling : shots[to]);
  const now = [...at("stage").children];
  state.order = now.map((one) => Number(one.dataset.place));
  now.forEach((one, n) => { one.querySelector("figcaption").textContent = n + 1; });
  if (playing) setPlaying(true);
}
let lifted = null;
at("stage").addEventListener("pointerdown", (event) => {
  const shot = event.target.closest(".ranked .shot");
  if (!shot || event.button) return;
  event.preventDefault();
  lifted = shot;
  shot.classList.add("lifted");
});
window.addEventListener("pointermove", (event) => {
  if (!lifted) return;
  const under = document.elementFromPoint(event.clientX, event.clientY);
  const shot = under && under.closest(".shot");
  if (shot && shot !== lifted) move(lifted, [...at("stage").children].indexOf(shot));
});
for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, () => {
  if (lifted) lifted.classList.remove("lifted");
  lifted = null;
});

// ---- controls

at("play").addEventListener("click", () => setPlaying(!playing));
at("back").addEventListener("click", () => step(-1));
at("on").addEventListener("click", () => step(1));
at("replay").addEventListener("click", replay);
at("speed").addEventListener("click", nextSpeed);
// the second click of a double click would act on the next ballot
for (const [id, act] of [["next", submit], ["undo", undo], ["undo-last", undo]]) {
  at(id).addEventListener("click", (event) => { if (event.detail < 2) act(); });
}
at("begin").addEventListener("click", () => begin().catch(lost));
at("help").addEventListener("click", toggleHelp);
at("scrub").addEventListener("input", () => { setPlaying(false); seek(clock().duration * at("scrub").value / 1000); });

function nextSpeed() {
  state.speed = (state.speed + 1) % SPEEDS.length;
  at("speed").textContent = `${{ 1: "1", 0.5: "½", 0.25: "¼", 2: "2" }[SPEEDS[state.speed]]}×`;
  for (const video of state.videos) video.playbackRate = SPEEDS[state.speed];
}
function toggleHelp() {
  if (!state.session) return;
  if (at("welcome").hidden) {
    setPlaying(false);
    at("begin").textContent = state.ballot ? "Back" : "Begin";
    show("welcome");
  } else begin().catch(lost);
}
async function begin() {
  if (state.ballot && !state.session.closed) {
    show("ballot");
    return setPlaying(true);
  }
  await present();
}
// A click by pointer leaves the keys to the page; what Tab has reached keeps its own.
document.addEventListener("click", (event) => { if (event.detail && document.activeElement) document.activeElement.blur(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.session) return;
  const key = event.key, focused = document.activeElement;
  if (key === "?") return toggleHelp();
  if (!at("message").hidden && key.toLowerCase() === "u") return undo();
  if (at("ballot").hidden) return;
  const control = focused && focused.closest("button, input");
  if (control === at("scrub") && key.startsWith("Arrow")) return;
  if (control && !event.repeat && (key === "Enter" || key === " ")) return;
  const answer = ANSWERS.find(([, , name]) => name === key);
  const shot = focused && focused.closest(".ranked .shot");
  const acts = { " ": () => setPlaying(!playing), r: replay, ",": () => step(-1), ".": () => step(1), s: nextSpeed, u: undo, Enter: submit };
  let act = acts[key.length === 1 ? key.toLowerCase() : key];
  if (answer && state.ballot.ranked) {
    act = shot && (() => {
      move(shot, [...at("stage").children].indexOf(shot) + (key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1));
      shot.focus();
    });
  } else if (answer && due() !== undefined) act = () => choose(due(), answer[0]);
  if (!act) return;
  event.preventDefault();
  if (!event.repeat || key === "," || key === ".") act(); // a key that is held acts once
});

// ---- start

const lost = (error) => (error.status === 401
  ? say("This page needs an invitation.", "Open the whole link that you were sent, including everything after the #.")
  : say("The study cannot be reached.", error.status ? error.message : "Votes that you gave are stored. Load this page again in a moment."));

async function start() {
  try {
    state.session = await askJson("/session");
    const { session } = state;
    document.title = `${session.title} · kvpo arena`;
    document.body.classList.toggle("ranking", session.ranked);
    at("title").textContent = session.title;
    at("instructions").textContent = session.instructions;
    at("rater").textContent = `You vote as ${session.rater}.`;
    at("examples").replaceChildren(...session.questions.flatMap((one) =>
      [element("dt", { textContent: one.text }), element("dd", { textContent: one.hint })]));
    if (session.done || session.closed) await present();
    else show("welcome");
  } catch (error) {
    lost(error);
  }
}
keepInStep();
start();
