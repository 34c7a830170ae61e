// The page: its buttons, keys, microphone and settings. What is said and answered is conversation.js's.

import { Microphone, Player } from "./audio.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { level } from "./pcm.js";
import { DEFAULTS, fill, load, offer, read, save, session } from "./settings.js";
import { TOO_SHORT, microphoneError, taskName } from "./words.js";

const PREROLL = 6; // pieces of 40 ms that are kept from before the button is held
const MICROPHONE_IDLE = 60000; // ms after which a microphone that is not held is let go
const SILENT = "The browser keeps this page silent until you allow it.";
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const KEY = "ttt.key";

const element = (id) => document.getElementById(id);
const form = element("settings-form");
const talk = element("talk");
const log = element("log");

const player = new Player();
const microphone = new Microphone();
const connection = new Connection();
const conversation = new Conversation(connection, player, element("turns"));
let settings = load(localStorageOrNone());
let listening = false; // hands free
let holding = false; // the button, or the space bar
let openingMicrophone = null;
let recent = []; // pieces from before the button is held
let letGo = null; // timer
let wasOpen = false;

function localStorageOrNone() {
  try {
    return localStorage;
  } catch {
    return null;
  }
}

// ---- what is said to the user --------------------------------------------------------------------------------------

function notify(message, action, act) {
  element("notice-text").textContent = message;
  const button = element("notice-action");
  button.hidden = !action;
  button.textContent = action ?? "";
  button.onclick = () => {
    hideNotice();
    act();
  };
  element("notice").hidden = false;
}

function hideNotice() {
  element("notice").hidden = true;
}

function announce(message) {
  element("announcer").textContent = message;
}

element("notice-close").addEventListener("click", hideNotice);

// ---- the connection ------------------------------------------------------------------------------------------------

connection.addEventListener("state", ({ detail: { state, message } }) => {
  const names = { connecting: "Connecting", open: "Connected", waiting: "Reconnecting", locked: "Locked", asleep: "Asleep" };
  const chip = element("connection");
  chip.dataset.state = state;
  chip.title = message;
  element("connection-text").textContent = names[state];
  if (state === "open") {
    wasOpen = true;
    hideNotice();
    configure();
  } else if (wasOpen && state !== "connecting") {
    wasOpen = false;
    stopListening();
    holding = false;
    conversation.lost();
  }
  if (state === "waiting") notify(`${message} Trying again.`, "Try now", () => connection.connect());
  if (state === "locked") {
    element("key-field").hidden = false;
    openSettings(message);
    form.elements.key.focus();
  }
  show();
});

connection.addEventListener("model", ({ detail }) => {
  element("model").textContent = detail.id;
  offer(form, detail.ttt ?? {}, taskName);
  form.elements.task.value = settings.task;
  if (form.elements.task.selectedIndex < 0) form.elements.task.value = settings.task = ""; // of another model
});

conversation.addEventListener("problem", ({ detail }) => notify(detail.message));
conversation.addEventListener("announce", ({ detail }) => announce(detail.message));
conversation.addEventListener("refused", ({ detail: { error } }) => {
  if (element("settings").open) showSettingsError(error.message);
  else notify(error.message, "Settings", () => openSettings());
});
conversation.addEventListener("change", show);

/** Tell the session what the settings are. */
function configure() {
  conversation.silence = Number(settings.silence) || Number(DEFAULTS.silence);
  const event_id = `settings_${Date.now()}`;
  connection.send({ type: "session.update", event_id, session: session(settings) });
}

// ---- what is shown -------------------------------------------------------------------------------------------------

let following = true; // the newest turn
log.addEventListener("scroll", () => {
  following = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
});
new ResizeObserver(() => {
  if (following && !conversation.isEmpty) log.scrollTo({ top: log.scrollHeight });
}).observe(element("turns"));

function show() {
  const free = settings.mode === "free";
  const { doing } = conversation;
  const active = listening || holding;
  talk.dataset.state = openingMicrophone ? "opening" : active && doing === "idle" ? "listening" : doing;
  talk.classList.toggle("on", active);
  talk.disabled = !connection.isOpen && connection.state !== "asleep";
  if (free) talk.setAttribute("aria-pressed", String(listening));
  else talk.removeAttribute("aria-pressed");
  element("talk-label").textContent = free ? "Listen" : "Hold to talk";
  element("stop").hidden = !["speaking", "thinking"].includes(doing);
  element("empty").hidden = !conversation.isEmpty;
  element("hint").textContent = hint(free, doing);
}

function hint(free, doing) {
  if (connection.state === "asleep") return "The session fell asleep. Your next question wakes it.";
  if (connection.state === "locked") return "An API key opens this server: see Settings.";
  if (!connection.isOpen) return "Waiting for the server";
  if (openingMicrophone) return "Waiting for the microphone: the browser may ask you";
  if (doing === "hearing") return holding ? "Listening. Let go when you are done" : "Listening";
  if (doing === "thinking") return "Thinking";
  if (doing === "speaking") return free ? "Speak to interrupt, or press Esc" : "Hold to interrupt, or press Esc";
  if (!free) return "Hold the button or the space bar while you speak";
  return listening ? "Just speak: it answers when you pause" : "Press the button or the space bar to start listening";
}

const meters = { you: { aim: 0, level: 0 }, model: { aim: 0, level: 0 } };
let metering = false;

/** Move the meters towards a level: up at once, down slowly. */
function meter(name, aim) {
  meters[name].aim = aim;
  if (metering) return;
  metering = true;
  requestAnimationFrame(move);
}

function move() {
  let moves = false;
  for (const [name, one] of Object.entries(meters)) {
    one.level = one.aim > one.level ? one.aim : Math.max(one.aim, one.level * 0.9 - 0.002);
    const place = element(`meter-${name}`);
    place.firstElementChild.style.transform = `scaleX(${one.level.toFixed(3)})`;
    place.setAttribute("aria-valuenow", String(Math.round(100 * one.level)));
    moves ||= one.level !== one.aim || one.level > 0;
  }
  talk.style.setProperty("--level", Math.max(meters.you.level, meters.model.level).toFixed(3));
  metering = moves;
  if (moves) requestAnimationFrame(move);
}

player.addEventListener("report", ({ detail: { loudness } }) => meter("model", level([loudness])));
player.addEventListener("state", () => player.sounds && element("notice-text").textContent === SILENT && hideNotice());
connection.addEventListener("event", ({ detail: { type } }) => {
  if (type !== "response.output_audio.delta" || player.sounds || !element("notice").hidden) return;
  notify(SILENT, "Turn sound on", haveSound);
});

// ---- the microphone ------------------------------------------------------------------------------------------------

microphone.addEventListener("piece", ({ detail: samples }) => {
  const active = listening || conversation.held;
  meter("you", active ? level(samples) : 0);
  if (active) {
    conversation.send(samples);
  } else {
    recent = [...recent.slice(1 - PREROLL), samples];
    if (letGo === null) letGoLater(); // however it came about that nobody listens
  }
});

microphone.addEventListener("lost", () => {
  stopListening();
  release();
  notify("The microphone was unplugged or switched off.");
});

/** Have the microphone; resolve to whether it is there. */
async function haveMicrophone() {
  keepMicrophone();
  if (microphone.isOpen) return true;
  openingMicrophone ??= microphone.open(settings.echo);
  show();
  try {
    await openingMicrophone;
    return true;
  } catch (error) {
    notify(microphoneError(error));
    return false;
  } finally {
    openingMicrophone = null;
    show();
  }
}

function closeMicrophone() {
  keepMicrophone();
  microphone.close();
  recent = [];
  meter("you", 0);
}

/** Make the loudspeaker ready, in the user's own click or key: otherwise the browser stays silent. */
async function haveSound() {
  try {
    await player.open();
  } catch (error) {
    notify(`The sound did not start (${error.message}). Answers come as text.`);
  }
}

async function hold() {
  if (holding || talk.disabled) return;
  holding = true;
  haveSound();
  show();
  const wasReady = microphone.isOpen;
  const ready = (await haveMicrophone()) && (await connection.wake());
  if (!ready || !holding) {
    if (ready) notify(wasReady ? TOO_SHORT : "The microphone is ready. Hold the button while you speak.");
    holding = false;
    letGoLater();
    show();
    return;
  }
  hideNotice();
  conversation.hold(recent);
  recent = [];
  show();
}

async function release() {
  if (!holding) return;
  holding = false;
  show();
  await conversation.release();
  letGoLater();
  show();
}

function letGoLater() {
  keepMicrophone();
  letGo = setTimeout(() => {
    letGo = null;
    if (!listening && !holding) closeMicrophone();
  }, MICROPHONE_IDLE);
}

function keepMicrophone() {
  clearTimeout(letGo);
  letGo = null;
}

async function listen() {
  if (listening || talk.disabled) return;
  haveSound();
  if (!(await haveMicrophone()) || !(await connection.wake()) || settings.mode !== "free") return;
  hideNotice();
  recent = [];
  listening = true;
  show();
}

function stopListening() {
  if (!listening) return;
  listening = false;
  conversation.forget();
  closeMicrophone();
  show();
}

// ---- buttons and keys ----------------------------------------------------------------------------------------------

const isFree = () => settings.mode === "free";
const toggle = () => (listening ? stopListening() : listen());

talk.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || isFree()) return;
  talk.setPointerCapture(event.pointerId);
  hold();
});
for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) talk.addEventListener(name, release);
talk.addEventListener("contextmenu", (event) => event.preventDefault());
talk.addEventListener("click", ({ detail }) => {
  if (isFree()) toggle();
  else if (detail === 0) (holding ? release : hold)(); // by a screen reader, which cannot hold
});

const isField = (target) => target.closest("input:not([type=radio]):not([type=checkbox]), textarea, select, dialog");
const isTalkKey = ({ key, target }) => {
  if (target === talk) return key === " " || key === "Enter";
  return key === " " && !isField(target) && !target.closest("button, a, input");
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !element("settings").open) {
    stop();
  } else if (isTalkKey(event) && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault();
    if (event.repeat) return;
    if (isFree()) toggle();
    else hold();
  }
});
addEventListener("keyup", (event) => {
  if (event.key !== " " && event.key !== "Enter") return;
  if (isTalkKey(event)) event.preventDefault(); // it would click as well
  release();
});
addEventListener("blur", release); // a key that is let go elsewhere is never told
document.addEventListener("visibilitychange", () => document.hidden && release());

function stop() {
  if (holding) {
    holding = false;
    conversation.forget();
  } else {
    conversation.interrupt(true);
  }
  show();
}

element("stop").addEventListener("click", () => {
  stop();
  element("text").focus({ preventScroll: true });
});

async function ask(text) {
  following = true;
  haveSound();
  if (await connection.wake() && (await conversation.ask(text))) {
    hideNotice();
    return true;
  }
  notify("There is no connection to the server, so your question was not sent.", "Try now", () => connection.connect());
  return false;
}

element("typing").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = element("text");
  const text = field.value.trim();
  if (!text) {
    field.focus();
    return;
  }
  field.value = "";
  if (!(await ask(text))) field.value = text;
});

element("examples").addEventListener("click", ({ target }) => {
  if (target.closest("button")) ask(target.textContent);
});

element("new").addEventListener("click", () => {
  stopListening();
  holding = false;
  wasOpen = false;
  conversation.clear();
  hideNotice();
  connection.connect();
  log.focus({ preventScroll: true });
});

for (const radio of document.getElementsByName("mode")) {
  radio.checked = radio.value === settings.mode;
  radio.addEventListener("change", () => {
    stopListening();
    if (holding) stop();
    settings.mode = radio.value;
    save(localStorageOrNone(), settings);
    configure();
    show();
  });
}

// ---- theme and settings --------------------------------------------------------------------------------------------

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").setAttribute("aria-label", `Theme: ${THEMES[name]}`);
  element("theme").title = `Theme: ${THEMES[name]}`;
  for (const turn of new Set(conversation.turns.values())) turn.soon();
}

element("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  setTheme(next);
  try {
    localStorage.setItem("ttt.theme", next);
  } catch {
    // it lasts as long as the page
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  setTheme(document.documentElement.dataset.theme);
});

function showSettingsError(message) {
  element("settings-error").textContent = message ?? "";
  element("settings-error").hidden = !message;
}

function openSettings(problem) {
  fill(form, settings);
  form.elements.key.value = connection.key;
  if (connection.key) element("key-field").hidden = false;
  showSettingsError(problem);
  if (!element("settings").open) element("settings").showModal();
}

element("settings-open").addEventListener("click", () => openSettings());

form.addEventListener("change", ({ target }) => {
  if (target.name === "key") return; // it is used when the sheet is closed
  if (!target.validity.valid) {
    showSettingsError(`${target.closest("label").firstElementChild.firstChild.textContent.trim()}: ${target.validationMessage}`);
    return;
  }
  showSettingsError();
  apply(read(form, settings));
});

function apply(changed) {
  const reopen = changed.echo !== settings.echo && microphone.isOpen;
  settings = changed;
  save(localStorageOrNone(), settings);
  configure();
  if (reopen) {
    stopListening();
    closeMicrophone(); // the next turn asks for it anew
  }
  show();
}

element("settings-reset").addEventListener("click", () => {
  fill(form, { ...DEFAULTS });
  showSettingsError();
  apply({ ...DEFAULTS, mode: settings.mode });
});

element("settings").addEventListener("close", () => {
  const key = form.elements.key.value.trim();
  if (key === connection.key) return;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it lasts as long as the page
  }
  connection.connect(key);
});

element("settings").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) event.currentTarget.close(); // beside the sheet
});

setTheme(document.documentElement.dataset.theme);
fill(form, settings);
show();
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // no storage, no key
}
connection.connect(key);
