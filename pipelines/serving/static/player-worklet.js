// Plays what the page sends it; says what is heard.
import { JitterBuffer } from "./playout.js";

const REPORT = 0.05; // seconds between reports

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.buffer = new JitterBuffer(sampleRate);
    this.samples = 0;
    this.squares = 0;
    this.port.onmessage = ({ data }) => {
      if (data.type === "push") this.buffer.push(data.id, data.samples);
      else if (data.type === "complete") this.buffer.complete(data.id);
      else if (data.type === "stop") {
        this.port.postMessage({ type: "stopped", number: data.number, heard: this.buffer.stop() });
      }
    };
  }

  process(inputs, [[block]]) {
    for (const event of this.buffer.read(block)) this.port.postMessage(event);
    for (const sample of block) this.squares += sample * sample;
    this.samples += block.length;
    if (this.samples >= REPORT * sampleRate) {
      const answer = this.buffer.answers[0];
      const loudness = Math.sqrt(this.squares / this.samples);
      this.port.postMessage({ type: "report", loudness, id: answer?.id ?? null, played: answer?.played ?? 0 });
      this.samples = this.squares = 0;
    }
    return true;
  }
}

registerProcessor("player", Player);
