// A conversation over a connection: what the user says goes out, answers come in, are shown, played and interrupted.
// Buttons and the microphone are main.js's.

import { WIRE_RATE, concat, decodePcm, encodePcm, toPcm16 } from "./pcm.js";
import { Turn, divider } from "./turns.js";
import { TOO_SHORT, duration, protocolError } from "./words.js";

const KEPT = 75 * WIRE_RATE; // samples of what was sent, to cut turns out of
const SHORTEST = 250; // ms that the button is held for a turn
const SHORTEST_COMMIT = 0.1 * WIRE_RATE; // samples the server takes as a turn
const TAIL = 150; // ms that are still recorded after the button is let go
const IGNORED = ["response_cancel_not_active"]; // it was done meanwhile

/** Dispatches `change` (what goes on, see `doing`), `problem` ({message}), `announce` ({message}), `refused` ({error}). */
export class Conversation extends EventTarget {
  constructor(connection, player, list) {
    super();
    this.connection = connection;
    this.player = player;
    this.list = list;
    this.turns = new Map(); // by item and, of answers, by response
    this.begin();
    connection.addEventListener("event", ({ detail }) => this.receive(detail));
    player.addEventListener("started", ({ detail }) => this.startedPlaying(detail.id));
    player.addEventListener("report", ({ detail }) => this.turns.get(detail.id)?.progress(detail.played));
    player.addEventListener("ended", ({ detail }) => this.endedPlaying(detail.id));
    list.addEventListener("replay", ({ detail }) => this.quiet(detail));
  }

  /** Begin a session: nothing of the one before is known to the server. */
  begin() {
    this.answer = null; // the one that is being written
    this.playing = null; // the one that is being played
    this.speaking = null; // what the user is saying
    this.position = 0; // samples sent in this session
    this.sent = []; // {start, pcm}
    this.sentAt = { position: 0, time: 0 };
    this.asked = 0; // when the question ended
    this.held = null;
  }

  /** What goes on: "speaking" (the model), "thinking", "hearing" (the user speaks) or "idle". */
  get doing() {
    if (this.speaking) return "hearing";
    if (this.playing) return "speaking";
    return this.answer ? "thinking" : "idle";
  }

  get isEmpty() {
    return this.list.children.length === 0;
  }

  /** Forget all turns. */
  clear() {
    this.player.stop();
    for (const turn of new Set(this.turns.values())) turn.remove();
    this.turns.clear();
    this.list.replaceChildren();
    this.begin();
    this.changed();
  }

  /** The connection was lost, or another session begins. */
  lost() {
    if (this.speaking) this.drop(this.speaking);
    const { answer, playing } = this;
    if (answer) {
      answer.fail("The connection was lost before this answer was complete.");
      if (answer.item) this.player.complete(answer.item);
    }
    this.begin();
    this.playing = playing; // what has come is played
    if (!this.isEmpty && !this.list.lastElementChild.classList.contains("divider")) {
      divider(this.list, "New session: the model does not remember what is above");
    }
    this.changed();
  }

  // ---- what the user says ------------------------------------------------------------------------------------------

  /** Send a piece of the microphone's sound. */
  send(samples) {
    const pcm = toPcm16(samples);
    if (!this.connection.send({ type: "input_audio_buffer.append", audio: encodePcm(pcm) })) return;
    this.sent.push({ start: this.position, pcm });
    this.position += pcm.length;
    this.sentAt = { position: this.position, time: performance.now() };
    while (this.sent.length && this.sent[0].start + KEPT < this.position) this.sent.shift();
    if (this.speaking) this.speaking.setSound(this.cut(this.speaking.from, this.position));
  }

  /** Return what was sent between two positions. */
  cut(from, to) {
    const pieces = this.sent.filter(({ start, pcm }) => start + pcm.length > from && start < to);
    return concat(pieces.map(({ start, pcm }) => pcm.subarray(Math.max(0, from - start), to - start)));
  }

  hear(from) {
    this.speaking = new Turn(this.list, "user", this.player);
    this.speaking.from = from;
    this.speaking.wait("Listening");
    this.changed();
    return this.speaking;
  }

  drop(turn) {
    if (this.speaking === turn) this.speaking = null;
    for (const [id, one] of this.turns) if (one === turn) this.turns.delete(id);
    turn.remove();
    this.changed();
  }

  /** The button is held: a turn begins, with what was recorded just before. */
  async hold(before = []) {
    if (this.held) return;
    const turn = this.hear(this.position);
    turn.began = performance.now();
    this.held = turn;
    this.interrupt(true);
    for (const samples of before) this.send(samples);
  }

  /** The button was let go: have the turn answered, unless it was too short to be one. */
  async release() {
    const turn = this.held;
    if (!turn || turn.released) return;
    turn.released = true;
    const asked = performance.now();
    await new Promise((resolve) => setTimeout(resolve, TAIL));
    if (this.held !== turn) return; // the connection was lost
    this.held = null;
    if (asked - turn.began < SHORTEST || turn.samples < SHORTEST_COMMIT) {
      this.connection.send({ type: "input_audio_buffer.clear" });
      this.drop(turn);
      this.tell("problem", { message: TOO_SHORT });
      return;
    }
    this.speaking = null;
    this.asked = asked;
    this.committing = turn;
    turn.wait("");
    this.connection.send({ type: "input_audio_buffer.commit" });
    this.connection.send({ type: "response.create" });
    this.changed();
  }

  /** Take back what is being said. */
  forget() {
    const turn = this.speaking;
    this.held = null;
    if (!turn) return;
    this.connection.send({ type: "input_audio_buffer.clear" });
    this.drop(turn);
  }

  /** Ask in writing. */
  async ask(text) {
    await this.interrupt(true);
    const content = [{ type: "input_text", text }];
    const item = { id: `item_page_${crypto.randomUUID?.().slice(0, 18) ?? Math.random().toString(36).slice(2)}` };
    if (!this.connection.send({
      type: "conversation.item.create",
      item: { ...item, type: "message", role: "user", content },
    })) return false;
    const turn = new Turn(this.list, "user", this.player);
    turn.setText(text);
    this.turns.set(item.id, turn);
    this.asked = performance.now();
    this.connection.send({ type: "response.create" });
    this.changed();
    return true;
  }

  // ---- interruption ------------------------------------------------------------------------------------------------

  /**
   * Fall silent at once, and have the conversation hold what was heard.
   *
   * @param {boolean} cancel whether the server is to be told to stop; where it noticed speech itself, it has.
   */
  async interrupt(cancel) {
    const { answer, playing } = this;
    for (const turn of new Set(this.turns.values())) turn.halt();
    const stopping = this.player.stop();
    for (const turn of [answer, playing]) if (turn) turn.cut = true;
    this.playing = null;
    if (answer && cancel) this.connection.send({ type: "response.cancel" });
    const delay = this.player.delay * WIRE_RATE;
    const heard = await stopping;
    for (const turn of new Set([answer, playing])) {
      if (!turn?.item || !turn.samples) continue;
      const played = heard?.id === turn.item ? Math.max(0, heard.played - delay) : (turn.played ?? 0);
      turn.progress(played);
      turn.remark("interrupted");
      const audio_end_ms = Math.floor((played / WIRE_RATE) * 1000);
      this.connection.send({ type: "conversation.item.truncate", item_id: turn.item, content_index: 0, audio_end_ms });
      // Whether the answer had ended when this reached the server is not known here: its end or this says what stays.
      this.connection.send({ type: "conversation.item.retrieve", item_id: turn.item });
    }
    this.changed();
  }

  /** Stop all sound but a replay's. */
  quiet(replayed) {
    for (const turn of new Set(this.turns.values())) if (turn !== replayed) turn.halt();
    if (this.playing) this.interrupt(true);
  }

  startedPlaying(id) {
    const turn = this.turns.get(id);
    if (!turn || turn.cut) return;
    this.playing = turn;
    turn.progress(0);
    if (turn.asked) {
      turn.latency = performance.now() + this.player.delay * 1000 - turn.asked;
      turn.remark(`first sound after ${duration(turn.latency)}`, "latency");
    }
    this.changed();
  }

  endedPlaying(id) {
    const turn = this.turns.get(id);
    turn?.progress(turn.samples);
    if (turn && this.playing === turn) this.playing = null;
    this.changed();
  }

  // ---- what the server says ----------------------------------------------------------------------------------------

  receive(event) {
    const handler = this.handlers[event.type];
    handler?.call(this, event, this.turns.get(event.item_id));
  }

  handlers = {
    "input_audio_buffer.speech_started"(event) {
      this.interrupt(false);
      if (this.speaking) this.drop(this.speaking);
      this.turns.set(event.item_id, this.hear((event.audio_start_ms * WIRE_RATE) / 1000));
    },

    "input_audio_buffer.speech_stopped"(event, turn) {
      if (!turn) return;
      const end = (event.audio_end_ms * WIRE_RATE) / 1000;
      turn.setSound(this.cut(turn.from, end));
      turn.wait("");
      if (this.speaking === turn) this.speaking = null;
      const spoke = end - (this.silence / 1000) * WIRE_RATE; // the turn ends with the silence that ended it
      this.asked = this.sentAt.time - ((this.sentAt.position - spoke) / WIRE_RATE) * 1000;
      this.changed();
    },

    "input_audio_buffer.committed"(event, turn) {
      if (!turn && this.committing) this.turns.set(event.item_id, this.committing);
      this.committing = null;
    },

    "conversation.item.input_audio_transcription.delta"(event, turn) {
      turn?.setText((turn.text + event.delta).trimStart());
    },

    "conversation.item.input_audio_transcription.completed"(event, turn) {
      turn?.setText(event.transcript);
    },

    "conversation.item.input_audio_transcription.failed"(event, turn) {
      turn?.remark("not written down");
    },

    "response.created"({ response }) {
      const turn = new Turn(this.list, "model", this.player);
      turn.wait("Thinking");
      turn.asked = this.asked;
      this.asked = 0;
      this.answer = turn;
      this.turns.set(response.id, turn);
      this.changed();
    },

    "response.output_item.added"({ response_id, item }) {
      const turn = this.turns.get(response_id);
      if (!turn) return;
      turn.item = item.id;
      this.turns.set(item.id, turn);
    },

    "response.output_audio_transcript.delta": addText,
    "response.output_text.delta": addText,

    "response.output_audio.delta"(event, turn) {
      if (!turn || turn.cut) return;
      const pcm = decodePcm(event.delta);
      if (turn.played === null) turn.played = 0;
      turn.add(pcm);
      this.player.push(event.item_id, pcm);
    },

    "response.output_audio.done"(event, turn) {
      if (turn && !turn.cut) this.player.complete(event.item_id);
    },

    "response.done"({ response }) {
      const turn = this.turns.get(response.id);
      if (this.answer === turn) this.answer = null;
      if (turn) this.finish(turn, response);
      this.changed();
    },

    "conversation.item.retrieved"({ item }) {
      const turn = this.turns.get(item.id);
      if (turn?.cut) showHeard(turn, item);
    },

    error({ error }) {
      if (error.event_id?.startsWith("settings")) {
        this.tell("refused", { error });
      } else if (!IGNORED.includes(error.code)) {
        this.committing = null;
        this.tell("problem", { message: protocolError(error) });
      }
    },
  };

  finish(turn, response) {
    turn.wait("");
    const [item] = response.output;
    if (response.status === "failed") {
      turn.fail(protocolError(response.status_details?.error), () => {
        turn.asked = 0;
        this.asked = performance.now();
        if (!this.connection.send({ type: "response.create" })) {
          this.tell("problem", { message: "There is no connection to try again on." });
        }
      });
    } else if (response.status === "incomplete") {
      turn.remark("cut at the most tokens");
    } else if (response.status === "cancelled") {
      turn.cut = true;
      turn.remark("interrupted");
      if (item && turn.text) showHeard(turn, item);
      if (!turn.text && !turn.samples) turn.setText("…");
    } else if (!turn.text) {
      turn.setText("…");
    }
    if (response.status === "completed" && turn.text) this.tell("announce", { message: `Model: ${turn.text}` });
  }

  changed() {
    this.tell("change", {});
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function addText(event, turn) {
  if (!turn || turn.cut) return;
  turn.setText((turn.text + event.delta).trimStart());
  this.changed();
}

/** Show what of a cut answer the conversation holds, and pale what was not heard. */
function showHeard(turn, item) {
  const part = item.content[0];
  turn.setText(turn.text, (part?.transcript ?? part?.text ?? "").trimStart());
}
