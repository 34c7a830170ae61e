// The Realtime session as a connection: opens it, says how it stands, comes back when it is lost. What its events mean
// is the caller's business.

import { connectionError } from "./words.js";

const KEY_SUBPROTOCOL = "openai-insecure-api-key.";
const FIRST_DELAY = 500; // ms before it is tried again, doubled each time
const MOST_DELAY = 10000;

/**
 * Dispatches `state` ({state, message}), `model` (what /v1/models says of it) and `event` (one of the server's).
 *
 * States: connecting, open, waiting (to try again), locked (a key is asked for), asleep (the server ended an idle
 * session; `wake` opens another).
 */
export class Connection extends EventTarget {
  constructor() {
    super();
    this.state = "connecting";
    this.key = "";
    this.delay = FIRST_DELAY;
    this.number = 0; // events sent
    this.waiters = [];
    addEventListener("online", () => this.state === "waiting" && this.connect());
  }

  get isOpen() {
    return this.state === "open";
  }

  /** Open a session, instead of the one there is. */
  async connect(key = this.key) {
    this.key = key;
    clearTimeout(this.timer);
    this.drop();
    const attempt = (this.attempt = {});
    this.become("connecting", "Connecting");
    const { status, model } = await this.ask();
    if (attempt !== this.attempt) return;
    if (status === 401) {
      this.become("locked", key ? "The server does not know this API key." : connectionError(401));
      return;
    }
    if (status !== 200) {
      this.retry(connectionError(status));
      return;
    }
    this.tell("model", model);
    this.open(attempt);
  }

  /** Ask for the model by plain HTTP, whose status says what a refused WebSocket does not. */
  async ask() {
    try {
      const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
      const response = await fetch("v1/models", { headers, cache: "no-store", signal: AbortSignal.timeout(15000) });
      return { status: response.status, model: response.ok ? (await response.json()).data[0] : null };
    } catch {
      return { status: 0, model: null };
    }
  }

  open(attempt) {
    const address = new URL("v1/realtime", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const protocols = ["realtime"];
    if (this.key) protocols.push(KEY_SUBPROTOCOL + this.key);
    try {
      this.socket = new WebSocket(address, protocols);
    } catch {
      this.become("locked", "This key has signs that a browser cannot send. Use one of letters, digits, - and _.");
      return;
    }
    let ended = "";
    this.socket.addEventListener("message", ({ data }) => {
      if (attempt !== this.attempt) return;
      const event = JSON.parse(data);
      if (event.type === "session.created") {
        this.delay = FIRST_DELAY;
        this.become("open", "Connected");
      }
      if (event.type === "error") ended = event.error.code;
      this.tell("event", event);
    });
    this.socket.addEventListener("close", async (close) => {
      if (attempt !== this.attempt) return;
      if (["session_idle", "session_expired"].includes(close.reason || ended)) {
        this.become("asleep", "Asleep");
        return;
      }
      const wasOpen = this.isOpen;
      this.become("waiting", "The connection was lost.");
      const { status } = wasOpen ? { status: null } : await this.ask();
      if (attempt !== this.attempt) return;
      this.retry(wasOpen ? "The connection was lost." : connectionError(status));
    });
  }

  retry(message) {
    const delay = this.delay * (0.75 + 0.5 * Math.random());
    this.delay = Math.min(MOST_DELAY, 2 * this.delay);
    this.become("waiting", message);
    this.timer = setTimeout(() => this.connect(), delay);
  }

  /** Close the connection and forget it. */
  drop() {
    this.attempt = null;
    this.socket?.close();
    this.socket = null;
  }

  /** Resolve to whether a session is open, having opened one if the last fell asleep. */
  async wake() {
    if (this.state === "asleep") await this.connect();
    if (this.state !== "connecting") return this.isOpen;
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  /** Send an event; return its id, or null where there is no session. */
  send(event) {
    if (!this.isOpen || this.socket?.readyState !== WebSocket.OPEN) return null;
    const id = event.event_id ?? `page_${this.number++}`;
    this.socket.send(JSON.stringify({ ...event, event_id: id }));
    return id;
  }

  become(state, message) {
    this.state = state;
    if (state !== "connecting") for (const resolve of this.waiters.splice(0)) resolve(this.isOpen);
    this.tell("state", { state, message });
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
