// The microphone and the loudspeaker, by the Web Audio API. What is said and heard is the caller's business.

import { WIRE_RATE, toFloat } from "./pcm.js";

const STOP_TIMEOUT = 500; // ms

/** Plays answers without gaps, and recordings of turns. */
export class Player extends EventTarget {
  /** Make the loudspeaker ready. Browsers let a page sound only after the user touched it: call this when they do. */
  async open() {
    this.opening ??= this.start();
    await this.opening;
    if (this.context.state !== "running") {
      // Where the browser waits for a touch, `resume` stays pending: nobody may wait for it.
      this.context.resume().catch(() => {});
    }
  }

  async start() {
    this.context = new AudioContext({ sampleRate: WIRE_RATE, latencyHint: "interactive" });
    this.context.addEventListener("statechange", () => this.tell("state", { state: this.context.state }));
    try {
      await this.context.audioWorklet.addModule("player-worklet.js");
    } catch (error) {
      this.opening = undefined;
      await this.context.close();
      throw error;
    }
    this.node = new AudioWorkletNode(this.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.node.port.onmessage = ({ data }) => this.hear(data);
    this.node.connect(this.context.destination);
    this.stops = new Map();
    this.number = 0;
  }

  /** Whether sound comes out. */
  get sounds() {
    return this.context?.state === "running";
  }

  /** Seconds between what is played and what is heard. */
  get delay() {
    return this.context?.outputLatency || this.context?.baseLatency || 0;
  }

  /** Play a piece (PCM16) of the answer `id`, after what came before. */
  push(id, pcm) {
    if (!this.node) return;
    const samples = toFloat(pcm);
    this.node.port.postMessage({ type: "push", id, samples }, [samples.buffer]);
  }

  /** Note that all of an answer has come. */
  complete(id) {
    this.node?.port.postMessage({ type: "complete", id });
  }

  /** Fall silent at once; resolve to `{id, played}` (samples) of the answer that was cut, or null. */
  stop() {
    if (!this.node) return Promise.resolve(null);
    return new Promise((resolve) => {
      const number = this.number++;
      this.stops.set(number, resolve);
      setTimeout(resolve, STOP_TIMEOUT, null); // a context that never ran does not answer
      this.node.port.postMessage({ type: "stop", number });
    });
  }

  hear(data) {
    if (data.type === "stopped") {
      this.stops.get(data.number)?.(data.heard);
      this.stops.delete(data.number);
    } else {
      this.tell(data.type, data);
    }
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** Play a recording (PCM16); return `{stop, progress, ended}`. */
  async replay(pcm) {
    await this.open();
    const buffer = this.context.createBuffer(1, Math.max(1, pcm.length), WIRE_RATE);
    buffer.copyToChannel(toFloat(pcm), 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    const began = this.context.currentTime;
    const ended = new Promise((resolve) => source.addEventListener("ended", resolve, { once: true }));
    source.start();
    return {
      stop: () => source.stop(),
      progress: () => Math.min(1, (this.context.currentTime - began) / buffer.duration),
      ended,
    };
  }
}

/** The user's microphone: `piece` events carry float samples at the protocol's rate. */
export class Microphone extends EventTarget {
  /** Ask for the microphone and begin. Rejects with a DOMException where there is none, or the user says no. */
  async open(echoCancellation) {
    if (!navigator.mediaDevices) throw new DOMException("no secure context", "SecurityError");
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation, noiseSuppression: echoCancellation, autoGainControl: true, channelCount: 1 },
    });
    try {
      await this.connect();
    } catch (error) {
      this.close();
      throw error;
    }
    const [track] = this.stream.getAudioTracks();
    track.addEventListener("ended", () => {
      this.close();
      this.dispatchEvent(new Event("lost"));
    });
  }

  async connect() {
    try {
      this.context = new AudioContext({ sampleRate: WIRE_RATE });
      this.source = this.context.createMediaStreamSource(this.stream);
    } catch (error) {
      if (error.name !== "NotSupportedError") throw error;
      await this.context?.close();
      this.context = new AudioContext(); // the device's own rate; the worklet makes the protocol's of it
      this.source = this.context.createMediaStreamSource(this.stream);
    }
    await this.context.audioWorklet.addModule("capture-worklet.js");
    this.node = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    this.node.port.onmessage = ({ data }) => this.dispatchEvent(new CustomEvent("piece", { detail: data }));
    this.source.connect(this.node);
    this.context.resume().catch(() => {});
  }

  get isOpen() {
    return Boolean(this.node);
  }

  /** Let go of the microphone. */
  close() {
    this.node?.port.postMessage("close");
    this.source?.disconnect();
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.context?.close().catch(() => {});
    this.node = this.source = this.stream = this.context = undefined;
  }
}
