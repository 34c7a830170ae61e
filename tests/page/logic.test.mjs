// What of the page's code needs no browser, under `node --test`. The modules lie beside this file when it runs.
import assert from "node:assert/strict";
import { test } from "node:test";

import { Resampler, concat, decodePcm, encodePcm, level, peaks, toFloat, toPcm16 } from "./pcm.js";
import { JitterBuffer } from "./playout.js";
import { DEFAULTS, load, save, session } from "./settings.js";
import { clock, connectionError, duration, microphoneError, protocolError, taskName } from "./words.js";

const RATE = 24000;
const sine = (frequency, rate, count) =>
  Float32Array.from({ length: count }, (_, i) => 0.5 * Math.sin((2 * Math.PI * frequency * i) / rate));
const ramp = (count, from = 0.1) => Float32Array.from({ length: count }, (_, i) => from + i / 1e6);

function readAll(buffer, count, block = 128) {
  const blocks = [];
  const events = [];
  for (let at = 0; at < count; at += block) {
    const samples = new Float32Array(block);
    events.push(...buffer.read(samples).map((event) => ({ ...event, at })));
    blocks.push(samples);
  }
  return { samples: concat(blocks, Float32Array), events };
}

test("PCM16 survives base64, whatever the values", () => {
  const pcm = Int16Array.from({ length: 30001 }, (_, i) => ((i * 7919) % 65536) - 32768);
  assert.deepEqual(decodePcm(encodePcm(pcm)), pcm);
  assert.equal(encodePcm(Int16Array.of(1, -2)), "AQD+/w=="); // little-endian
  assert.equal(decodePcm("").length, 0);
});

test("samples beyond full scale are clipped, not wrapped", () => {
  assert.deepEqual(toPcm16(Float32Array.of(2, -2, 0, 1)), Int16Array.of(32767, -32767, 0, 32767));
  assert.deepEqual(toFloat(Int16Array.of(-32768, 16384)), Float32Array.of(-1, 0.5));
});

test("a level is 0 in silence, 1 at full scale, and between them in decibels", () => {
  assert.equal(level(new Float32Array(10)), 0);
  assert.equal(level(Float32Array.of(1, -1)), 1);
  assert.ok(Math.abs(level(Float32Array.of(0.1, -0.1)) - 2 / 3) < 1e-6);
  assert.equal(level([1e-9]), 0);
});

test("peaks cover all samples, also where there are fewer than bars", () => {
  const pcm = new Int16Array(1000);
  pcm[999] = -32768;
  assert.deepEqual([...peaks(pcm, 4)], [0, 0, 0, 1]);
  assert.equal(peaks(Int16Array.of(16384), 7).filter((peak) => peak === 0.5).length, 1);
  assert.deepEqual([...peaks(new Int16Array(0), 3)], [0, 0, 0]);
});

for (const from of [44100, 48000, 16000, 96000]) {
  test(`a tone at ${from} Hz is the same tone at ${RATE} Hz, however it is cut`, () => {
    const resampler = new Resampler(from, RATE);
    const tone = sine(1000, from, from);
    const pieces = [];
    for (let at = 0, size = 1; at < tone.length; at += size, size = (size * 7) % 997 || 128) {
      pieces.push(resampler.push(tone.subarray(at, at + size)));
    }
    const out = concat(pieces, Float32Array);
    assert.ok(Math.abs(out.length - RATE) < 40, `${out.length}`);
    const expected = sine(1000, RATE, out.length);
    for (let i = 100; i < out.length; i++) assert.ok(Math.abs(out[i] - expected[i]) < 0.005, `${i}`);
  });
}

test("what the lower rate cannot hold is filtered away, not folded back", () => {
  const out = new Resampler(48000, RATE).push(sine(16000, 48000, 48000));
  assert.ok(Math.max(...out.subarray(200).map(Math.abs)) < 0.01);
});

test("pieces that come late enough are played without a gap", () => {
  const buffer = new JitterBuffer(RATE);
  const whole = ramp(9600);
  for (let at = 0; at < whole.length; at += 700) buffer.push("a", whole.slice(at, at + 700));
  buffer.complete("a");
  const { samples, events } = readAll(buffer, 9600 + 1280);
  assert.deepEqual(events.map(({ type }) => type), ["started", "ended"]);
  assert.deepEqual(samples.subarray(120, 9600), whole.subarray(120)); // after the fade in
  assert.ok(samples.subarray(9600).every((sample) => sample === 0));
  assert.equal(events[1].played, 9600);
});

test("an answer waits until enough is held, or all of it has come", () => {
  const buffer = new JitterBuffer(RATE);
  buffer.push("a", ramp(1000));
  assert.equal(readAll(buffer, 1280).events.length, 0);
  buffer.complete("a");
  assert.deepEqual(readAll(buffer, 1280).events.map(({ type }) => type), ["started", "ended"]);
});

test("running dry is no click, and makes the next wait longer", () => {
  const buffer = new JitterBuffer(RATE);
  buffer.push("a", ramp(3000, 0.5));
  const { samples, events } = readAll(buffer, 6400);
  assert.deepEqual(events.map(({ type }) => type), ["started", "dry"]);
  for (let i = 1; i < samples.length; i++) assert.ok(Math.abs(samples[i] - samples[i - 1]) < 0.01, `${i}`);
  buffer.push("a", ramp(3000, 0.5)); // enough for the first wait, not for the second
  assert.equal(readAll(buffer, 640).events.length, 0);
  buffer.push("a", ramp(3000, 0.5));
  const again = readAll(buffer, 6400);
  assert.deepEqual(again.events.map(({ type }) => type), ["dry"]); // it has started before
  buffer.complete("a");
  assert.deepEqual(readAll(buffer, 128).events, [{ type: "ended", id: "a", played: 9000, at: 0 }]);
});

test("stopping is silence within 5 ms, and tells how much was played", () => {
  const buffer = new JitterBuffer(RATE);
  buffer.push("a", ramp(24000, 0.5));
  buffer.push("b", ramp(24000, 0.5));
  readAll(buffer, 12800);
  assert.deepEqual(buffer.stop(), { id: "a", played: 12800 });
  const { samples, events } = readAll(buffer, 1280);
  assert.equal(events.length, 0);
  assert.ok(samples.subarray(120).every((sample) => sample === 0));
  assert.ok(samples[0] > 0.4 && samples[60] < samples[0]);
  assert.equal(buffer.stop(), null);
});

test("two answers are played one after the other", () => {
  const buffer = new JitterBuffer(RATE);
  for (const id of ["a", "b"]) {
    buffer.push(id, ramp(1000));
    buffer.complete(id);
  }
  const { events } = readAll(buffer, 2560);
  assert.deepEqual(events.map(({ type, id }) => type + id), ["starteda", "endeda", "startedb", "endedb"]);
});

test("settings are what session.update takes; empty fields are the model's defaults", () => {
  assert.deepEqual(session({ ...DEFAULTS }), {
    type: "realtime",
    instructions: "",
    output_modalities: ["audio"],
    audio: { input: { transcription: { model: "default" }, turn_detection: null } },
    ttt: {
      task: null,
      audio_block_size: null,
      audio_steps_per_block: null,
      audio_confidence_threshold: null,
      audio_prefix_probability: null,
    },
  });
  const changed = session({ ...DEFAULTS, mode: "free", block: "8", threshold: "0.9", speak: false, silence: "700", task: "asr" });
  assert.deepEqual(changed.audio.input.turn_detection, { type: "server_vad", silence_duration_ms: 700 });
  assert.deepEqual(changed.output_modalities, ["text"]);
  assert.equal(changed.ttt.audio_block_size, 8);
  assert.equal(changed.ttt.audio_confidence_threshold, 0.9);
  assert.equal(changed.ttt.task, "asr");
});

test("kept settings come back; broken or foreign ones are left out", () => {
  const store = new Map();
  const storage = { getItem: (name) => store.get(name) ?? null, setItem: (name, value) => store.set(name, value) };
  save(storage, { ...DEFAULTS, block: "8", echo: false });
  assert.deepEqual(load(storage), { ...DEFAULTS, block: "8", echo: false });
  store.set("ttt.settings", '{"echo": "no", "block": 3, "unknown": 1}');
  assert.deepEqual(load(storage), { ...DEFAULTS });
  store.set("ttt.settings", "{broken");
  assert.deepEqual(load(storage), { ...DEFAULTS });
  assert.deepEqual(load(null), { ...DEFAULTS });
  save(null, DEFAULTS);
});

test("errors are words", () => {
  assert.match(protocolError({ code: "server_overloaded", message: "x" }), /busy/);
  assert.equal(protocolError({ code: "other", message: "Said so." }), "Said so.");
  assert.match(protocolError(undefined), /went wrong/);
  assert.match(microphoneError({ name: "NotAllowedError" }), /Allow it/);
  assert.match(microphoneError({ name: "Odd", message: "why" }), /why/);
  assert.match(connectionError(0), /does not answer/);
  assert.match(connectionError(401), /API key/);
  assert.match(connectionError(418), /418/);
});

test("times and names", () => {
  assert.deepEqual([0, 444, 994, 995, 2249, 12400].map(duration), ["0 ms", "440 ms", "990 ms", "1.0 s", "2.2 s", "12 s"]);
  assert.deepEqual([0, 59.6, 125].map(clock), ["0:00", "1:00", "2:05"]);
  assert.equal(taskName("my_task"), "my task");
});
