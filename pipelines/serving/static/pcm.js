// Samples and what is made of them: PCM16 in base64, levels, peaks of a waveform, WAV, another rate. Pure functions.

export const WIRE_RATE = 24000; // Hz, of the protocol's sound in both directions

/** Return float samples (full scale 1) as PCM16. */
export function toPcm16(samples) {
  const pcm = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) {
    pcm[i] = Math.round(Math.max(-1, Math.min(1, samples[i])) * 32767);
  }
  return pcm;
}

/** Return PCM16 as float samples. */
export function toFloat(pcm) {
  const samples = new Float32Array(pcm.length);
  for (let i = 0; i < pcm.length; i++) samples[i] = pcm[i] / 32768;
  return samples;
}

/** Return PCM16 as base64 of its little-endian bytes. */
export function encodePcm(pcm) {
  const bytes = new Uint8Array(pcm.length * 2);
  const view = new DataView(bytes.buffer);
  for (let i = 0; i < pcm.length; i++) view.setInt16(2 * i, pcm[i], true);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

/** Return the PCM16 that base64 holds. */
export function decodePcm(base64) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const pcm = new Int16Array(bytes.length >> 1);
  for (let i = 0; i < pcm.length; i++) pcm[i] = view.getInt16(2 * i, true);
  return pcm;
}

/** Return pieces of one type as one. */
export function concat(pieces, Type = Int16Array) {
  const whole = new Type(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

/** Return how loud float samples are, 0 (-60 dB and below) to 1 (full scale): what a meter shows. */
export function level(samples) {
  let sum = 0;
  for (let i = 0; i < samples.length; i++) sum += samples[i] * samples[i];
  if (sum === 0) return 0;
  const decibels = 10 * Math.log10(sum / samples.length);
  return Math.max(0, Math.min(1, 1 + decibels / 60));
}

/** Return the largest magnitude (0 to 1) in each of `count` equal parts of PCM16. */
export function peaks(pcm, count) {
  const found = new Float32Array(count);
  for (let bar = 0; bar < count; bar++) {
    const end = Math.floor(((bar + 1) * pcm.length) / count);
    let most = 0;
    for (let i = Math.floor((bar * pcm.length) / count); i < end; i++) most = Math.max(most, Math.abs(pcm[i]));
    found[bar] = most / 32768;
  }
  return found;
}

const TAPS = 16; // of the low-pass, on either side, at the lower of the two rates

/** Turns a stream of float samples into one of another rate, by a windowed sinc. */
export class Resampler {
  constructor(from, to) {
    this.step = from / to;
    this.cutoff = Math.min(1, to / from);
    this.reach = Math.ceil(TAPS / this.cutoff);
    this.held = new Float32Array(this.reach); // silence before the stream
    this.next = this.reach; // where the next sample lies in what is held
  }

  /** Take samples; return those of the other rate that they complete. */
  push(samples) {
    if (this.step === 1) return samples;
    const all = concat([this.held, samples], Float32Array);
    const out = [];
    while (this.next + this.reach < all.length) {
      out.push(this.at(all, this.next));
      this.next += this.step;
    }
    const done = Math.max(0, Math.floor(this.next) - this.reach);
    this.held = all.slice(done);
    this.next -= done;
    return Float32Array.from(out);
  }

  at(all, position) {
    const first = Math.max(0, Math.ceil(position - this.reach));
    let sum = 0;
    for (let i = first; i <= position + this.reach; i++) {
      const x = (position - i) * this.cutoff;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * (position - i)) / this.reach);
      const sinc = Math.abs(x) < 1e-9 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
      sum += all[i] * sinc * window;
    }
    return sum * this.cutoff;
  }
}
