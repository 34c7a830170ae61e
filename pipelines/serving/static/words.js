// What went wrong, in words a user can act on. Pure functions.

export const TOO_SHORT = "Hold the button, or the space bar, for as long as you speak.";

const CODES = {
  server_overloaded: "The server is busy just now. Try again in a moment.",
  server_shutting_down: "The server is shutting down. This page reconnects by itself when it is back.",
  deadline_exceeded: "The answer took too long and was given up.",
  context_length_exceeded: "This conversation has grown too long for the model. Start a new one.",
  conversation_full: "This conversation is full. Start a new one.",
  input_audio_buffer_commit_empty: TOO_SHORT,
  input_audio_buffer_full: "That was longer than the server takes in one turn. Let go sooner.",
  session_expired: "The session reached its time limit. The next question begins a new one.",
  session_idle: "The session was idle for a while and has ended. The next question begins a new one.",
};

/** Return what an error of the protocol (`{code, message}`) says to a user. */
export function protocolError(error) {
  return CODES[error?.code] ?? error?.message ?? "Something went wrong, and the server did not say what.";
}

/** Return why there is no microphone. */
export function microphoneError(error) {
  const names = {
    NotAllowedError:
      "The browser may not use the microphone. Allow it in the address bar's settings for this page, or type instead.",
    NotFoundError: "No microphone was found. Plug one in, or type your question instead.",
    NotReadableError: "The microphone is taken by another program. Close that, or type your question instead.",
    SecurityError:
      "Browsers give the microphone only to pages of https or of localhost. Open this page by one of them, or type.",
  };
  return names[error?.name] ?? `The microphone did not start (${error?.message || error?.name}). You can type instead.`;
}

/** Return why the server was not reached, by the status of its answer to a plain request (0: none came). */
export function connectionError(status) {
  if (status === 0) return "The server does not answer. Is ttt-serve running?";
  if (status === 401) return "The server asks for an API key.";
  if (status === 403) return "The server does not take this page's address. Open it by the name it was started with.";
  if (status === 503) return "The server is shutting down or has failed.";
  if (status === 200) return "The server is up but opened no session: it may have as many as it takes.";
  return `The server answered with status ${status}.`;
}

/** Return milliseconds as people read them. */
export function duration(milliseconds) {
  if (milliseconds < 995) return `${Math.round(milliseconds / 10) * 10} ms`;
  return `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 1 : 0)} s`;
}

/** Return seconds as minutes and seconds. */
export function clock(seconds) {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Return the name of a task as a menu shows it. */
export function taskName(name) {
  const names = { asr: "Write down what I say", tts: "Read aloud what I type", spoken_qa: "Answer questions" };
  const more = { spoken_chat: "Talk", text_chat: "Talk, asked in writing", captioning: "Describe sounds" };
  return names[name] ?? more[name] ?? name.replaceAll("_", " ");
}
