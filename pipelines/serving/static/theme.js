// Puts the theme that was chosen before on the page, ahead of its first paint; `auto` follows the system.
"use strict";

try {
  document.documentElement.dataset.theme = localStorage.getItem("ttt.theme") || "auto";
} catch {
  document.documentElement.dataset.theme = "auto"; // storage is switched off
}
