// Lists the endpoints that openapi.json describes.
"use strict";

function add(parent, tag, text) {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;
  return element;
}

async function list() {
  const main = document.getElementById("endpoints");
  const response = await fetch("openapi.json");
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
