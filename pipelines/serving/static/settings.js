// What the user may set, where it is kept, and what of it the session is told.

export const DEFAULTS = Object.freeze({
  mode: "hold", // or "free"
  task: "",
  instructions: "",
  speak: true,
  block: "",
  steps: "",
  threshold: "",
  prefix: "",
  echo: true,
  transcribe: true,
  silence: "500",
});
const STORED = "ttt.settings";
const NUMBERS = {
  block: "audio_block_size",
  steps: "audio_steps_per_block",
  threshold: "audio_confidence_threshold",
  prefix: "audio_prefix_probability",
};

/** Return the settings that were kept, with defaults for what is missing or no longer fits. */
export function load(storage) {
  try {
    const kept = JSON.parse(storage.getItem(STORED)) ?? {};
    const fitting = Object.entries(kept).filter(([name, value]) => typeof value === typeof DEFAULTS[name]);
    return { ...DEFAULTS, ...Object.fromEntries(fitting) };
  } catch {
    return { ...DEFAULTS };
  }
}

/** Keep settings; where storage is switched off, they last as long as the page. */
export function save(storage, settings) {
  try {
    storage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // nothing is lost but convenience
  }
}

/** Return what `session.update` says of settings; an empty field is the model's default. */
export function session(settings) {
  const ttt = { task: settings.task || null };
  for (const [name, option] of Object.entries(NUMBERS)) ttt[option] = number(settings[name]);
  const vad = { type: "server_vad", silence_duration_ms: number(settings.silence) ?? Number(DEFAULTS.silence) };
  return {
    type: "realtime",
    instructions: settings.instructions.trim(),
    output_modalities: [settings.speak ? "audio" : "text"],
    audio: {
      input: {
        transcription: settings.transcribe ? { model: "default" } : null,
        turn_detection: settings.mode === "free" ? vad : null,
      },
    },
    ttt,
  };
}

function number(text) {
  const value = Number(text);
  return text.trim() === "" || Number.isNaN(value) ? null : value;
}

/** Put settings into the form, and what the server offers beside them. */
export function fill(form, settings) {
  for (const [name, value] of Object.entries(settings)) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
}

/** Return the settings that the form holds; what the browser finds invalid stays as it was. */
export function read(form, settings) {
  const changed = { ...settings };
  for (const name of Object.keys(DEFAULTS)) {
    const field = form.elements[name];
    if (!field || !field.validity.valid) continue;
    changed[name] = field.type === "checkbox" ? field.checked : field.value;
  }
  return changed;
}

/** Show what the server has: its tasks, and its defaults where a field is empty. */
export function offer(form, choices, nameOf) {
  const select = form.elements.task;
  const chosen = select.value;
  while (select.options.length > 1) select.remove(1);
  for (const task of choices.tasks ?? []) select.add(new Option(nameOf(task), task));
  select.value = chosen;
  if (select.selectedIndex < 0) select.value = "";
  for (const [name, option] of Object.entries(NUMBERS)) {
    form.elements[name].placeholder = choices.defaults?.[option] ?? "none";
  }
}
