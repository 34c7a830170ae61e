// The jitter buffer: takes the pieces of answers as they come and gives blocks of samples without gaps. Pure logic; the
// worklet around it is player-worklet.js.

const FADE = 120; // samples over which sound begins and ends where it is cut, 5 ms
const FIRST_WAIT = 0.12; // seconds that are held before an answer begins
const MOST_WAIT = 1.0; // however often it ran dry

/**
 * A queue of answers, each a stream of samples under an id.
 *
 * `read` gives what is played, and silence while there is too little: before an answer begins, and again after it ran
 * dry, `wait` seconds are held (twice as much each time it runs dry, up to a second), unless all of it has come.
 */
export class JitterBuffer {
  constructor(rate) {
    this.rate = rate;
    this.wait = FIRST_WAIT;
    this.answers = [];
    this.dry = 0; // how often it ran dry
    this.fade = 0; // samples left of the way from the last one into silence
    this.last = 0;
    this.gain = 0; // 0 to 1 on the way out of silence
  }

  /** Take a piece of an answer. */
  push(id, samples) {
    let answer = this.answers.find((one) => one.id === id);
    if (!answer) {
      answer = { id, pieces: [], offset: 0, held: 0, played: 0, complete: false, flowing: false, started: false };
      this.answers.push(answer);
    }
    answer.pieces.push(samples);
    answer.held += samples.length;
  }

  /** Note that all of an answer has come. */
  complete(id) {
    const answer = this.answers.find((one) => one.id === id);
    if (answer) answer.complete = true;
  }

  /** Forget everything at once; return `{id, played}` of the answer that was being played, or null. */
  stop() {
    const answer = this.answers[0];
    this.answers = [];
    this.fade = FADE;
    return answer ? { id: answer.id, played: answer.played } : null;
  }

  /** Fill a block; return what happened: `[{type: "started" | "dry" | "ended", id, played}]`. */
  read(block) {
    const events = [];
    let at = 0;
    while (at < block.length && this.answers.length) {
      const answer = this.answers[0];
      if (answer.held === 0 && answer.complete) {
        this.answers.shift();
        events.push({ type: "ended", id: answer.id, played: answer.played });
        continue;
      }
      if (!this.ready(answer)) break;
      if (!answer.started) {
        answer.started = true;
        events.push({ type: "started", id: answer.id, played: 0 });
      }
      at += this.copy(answer, block, at);
      if (answer.held > 0 || answer.complete) continue;
      answer.flowing = false;
      this.dry += 1;
      this.wait = Math.min(MOST_WAIT, 2 * this.wait);
      this.fade = FADE;
      events.push({ type: "dry", id: answer.id, played: answer.played });
    }
    this.silence(block, at);
    return events;
  }

  ready(answer) {
    if (answer.flowing) return true;
    if (!answer.complete && answer.held < this.wait * this.rate) return false;
    answer.flowing = true;
    this.gain = 0;
    return true;
  }

  copy(answer, block, at) {
    const piece = answer.pieces[0];
    const count = Math.min(block.length - at, piece.length - answer.offset);
    for (let i = 0; i < count; i++) {
      this.gain = Math.min(1, this.gain + 1 / FADE);
      block[at + i] = piece[answer.offset + i] * this.gain;
    }
    if (count) this.last = block[at + count - 1];
    answer.offset += count;
    answer.held -= count;
    answer.played += count;
    if (answer.offset === piece.length) {
      answer.pieces.shift();
      answer.offset = 0;
    }
    return count;
  }

  /** Fill the rest of a block with silence, which begins without a click. */
  silence(block, at) {
    for (let i = at; i < block.length; i++) {
      block[i] = this.fade > 0 ? (this.last * this.fade) / FADE : 0;
      if (this.fade > 0) this.fade -= 1;
    }
  }
}
