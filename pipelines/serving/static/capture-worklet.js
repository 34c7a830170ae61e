// Hands the microphone's sound to the page, in pieces of 40 ms, at the protocol's rate whatever the device's is.
import { Resampler, WIRE_RATE, concat } from "./pcm.js";

const PIECE = WIRE_RATE / 25;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, WIRE_RATE);
    this.pieces = [];
    this.length = 0;
    this.open = true;
    this.port.onmessage = () => {
      this.flush();
      this.open = false;
    };
  }

  process([channels]) {
    if (channels.length && this.open) {
      const mono = Float32Array.from(channels[0]);
      for (const channel of channels.slice(1)) for (let i = 0; i < mono.length; i++) mono[i] += channel[i];
      const samples = this.resampler.push(mono.map((sample) => sample / channels.length));
      this.pieces.push(samples);
      this.length += samples.length;
      if (this.length >= PIECE) this.flush();
    }
    return this.open;
  }

  flush() {
    const whole = concat(this.pieces, Float32Array);
    this.pieces = [];
    this.length = 0;
    if (whole.length) this.port.postMessage(whole, [whole.buffer]);
  }
}

registerProcessor("capture", Capture);
