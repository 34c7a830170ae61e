// Lists the endpoints that openapi.json describes.
"use strict";

function add(parent, tag, text) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;
  return element;
}

/** The API key that the page keeps for this tab. */
function keyOfPage() {
  try {
    return sessionStorage.getItem("ttt.key");
  } catch {
    return null; // storage is switched off
  }
}

async function list() {
  const main = document.getElementById("endpoints");
  const key = keyOfPage();
  const response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (response.status === 401) {
    add(main, "p", "This server asks for an API key. Enter it on its page, then come back here in the same tab.");
    return;
  }
  if (!response.ok) {
    add(main, "p", `openapi.json: ${response.status} ${response.statusText}`);
    return;
  }
  const api = await response.json();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      add(main, "h2", `${method.toUpperCase()} ${path}`);
      add(main, "p", operation.description || operation.summary || "");
      for (const [kind, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
        const details = main.appendChild(document.createElement("details"));
        add(details, "summary", kind);
        add(details, "pre", JSON.stringify(schema.properties, null, 2));
      }
    }
  }
}

list();
