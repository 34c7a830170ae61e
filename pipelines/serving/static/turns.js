// The turns of a conversation as the page shows them: text, waveform, replay. Where they come from is conversation.js.

import { WIRE_RATE, concat, peaks } from "./pcm.js";
import { clock, duration } from "./words.js";

const BAR = 4; // CSS pixels of a bar of the waveform and the gap beside it
const PLAY = "M8 5.5v13l11-6.5z";
const HALT = "M7 6h4v12H7zM13.5 6h4v12h-4z";

function make(parent, tag, className = "", text = "") {
  const element = parent.appendChild(document.createElement(tag));
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

/** One turn: of the `user`, or of the `model`. */
export class Turn {
  constructor(list, role, player) {
    this.role = role;
    this.player = player;
    this.pieces = [];
    this.samples = 0;
    this.text = "";
    this.played = null; // samples that were heard, while or after it is played
    this.element = make(list, "li", `turn ${role}`);
    make(this.element, "h3", "who", role === "user" ? "You" : "Model");
    this.body = make(this.element, "div", "bubble");
    this.words = make(this.body, "p", "words");
    this.heard = make(this.words, "span");
    this.unheard = make(this.words, "span", "unheard");
    this.meta = make(this.element, "p", "meta quiet");
    this.observer = new ResizeObserver(() => this.draw());
  }

  /** Say in the text's place what is going on: "Listening", "Thinking". */
  wait(text) {
    this.waiting = text;
    this.element.setAttribute("aria-busy", String(Boolean(text)));
    this.show();
  }

  /** Set the text; of one that was cut off, `heard` is what was spoken. */
  setText(text, heard = text) {
    this.text = text;
    this.heardText = heard;
    this.show();
  }

  show() {
    const heard = this.heardText ?? this.text;
    const waits = !this.text && this.waiting;
    this.words.classList.toggle("waiting", Boolean(waits));
    this.heard.textContent = waits ? this.waiting : heard;
    this.unheard.textContent = !waits && this.text.startsWith(heard) ? this.text.slice(heard.length) : "";
    this.words.hidden = !this.heard.textContent && !this.unheard.textContent;
  }

  /** Take more of its sound (PCM16). */
  add(pcm) {
    this.pieces.push(pcm);
    this.samples += pcm.length;
    this.sound();
  }

  /** Set its sound. */
  setSound(pcm) {
    this.pieces = [pcm];
    this.samples = pcm.length;
    this.sound();
  }

  get pcm() {
    if (this.pieces.length > 1) this.pieces = [concat(this.pieces)];
    return this.pieces[0] ?? new Int16Array(0);
  }

  get seconds() {
    return this.samples / WIRE_RATE;
  }

  sound() {
    if (!this.canvas) {
      const strip = make(this.body, "div", "strip");
      this.button = make(strip, "button", "icon small");
      this.button.type = "button";
      this.button.innerHTML = '<svg viewBox="0 0 24 24" aria-hidden="true"><path class="solid"/></svg>';
      this.button.addEventListener("click", () => (this.replaying ? this.halt() : this.replay()));
      this.canvas = make(strip, "canvas");
      this.canvas.setAttribute("role", "img");
      this.time = make(strip, "span", "time quiet");
      this.look(false);
      this.observer.observe(this.canvas);
    }
    this.time.textContent = clock(this.seconds);
    this.canvas.setAttribute("aria-label", `Waveform, ${duration(this.seconds * 1000)}`);
    this.soon();
  }

  look(playing) {
    this.button.setAttribute("aria-label", playing ? "Stop replay" : "Replay this turn");
    this.button.title = playing ? "Stop" : "Replay";
    this.button.querySelector("path").setAttribute("d", playing ? HALT : PLAY);
  }

  async replay() {
    this.element.dispatchEvent(new CustomEvent("replay", { bubbles: true, detail: this }));
    this.replaying = await this.player.replay(this.pcm);
    this.look(true);
    const follow = () => {
      if (!this.replaying) return;
      this.draw();
      requestAnimationFrame(follow);
    };
    follow();
    await this.replaying.ended;
    this.replaying = null;
    this.look(false);
    this.draw();
  }

  /** Stop the replay, if there is one. */
  halt() {
    this.replaying?.stop();
  }

  /** Show how much of it was heard. */
  progress(played) {
    this.played = played;
    this.soon();
  }

  soon() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      this.draw();
    });
  }

  draw() {
    const { canvas } = this;
    const width = canvas?.clientWidth;
    if (!width) return;
    const height = canvas.clientHeight;
    const scale = devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.fillStyle = getComputedStyle(canvas).color;
    const bars = peaks(this.pcm, Math.floor(width / BAR));
    const played = this.played === null ? this.samples : this.played;
    const done = this.replaying ? this.replaying.progress() : played / Math.max(1, this.samples);
    bars.forEach((peak, bar) => {
      const size = Math.max(2, Math.sqrt(peak) * height);
      pen.globalAlpha = bar < done * bars.length ? 1 : 0.3;
      pen.beginPath();
      pen.roundRect(bar * BAR, (height - size) / 2, BAR - 1.5, size, 1.2);
      pen.fill();
    });
  }

  /** Add a remark below it, once. */
  remark(text, className = "") {
    if (![...this.meta.children].some((child) => child.textContent === text)) make(this.meta, "span", className, text);
  }

  /** Say that it failed, with a button to try again. */
  fail(text, again) {
    this.wait("");
    const problem = make(this.body, "p", "problem", text);
    if (!again) return;
    const button = make(problem, "button", "pill", "Try again");
    button.type = "button";
    button.addEventListener("click", () => {
      button.remove();
      again();
    });
  }

  remove() {
    this.halt();
    this.observer.disconnect();
    this.element.remove();
  }
}

/** Add a line between turns. */
export function divider(list, text) {
  make(list, "li", "divider quiet", text);
}
