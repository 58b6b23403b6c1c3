// The pages work without this: it says that something is under way, keeps forms from being sent twice, and lets
// Ctrl+Enter send them.
"use strict";

for (const form of document.forms) {
  const button = form.querySelector("button[data-busy]");
  if (!button) continue;
  const label = button.textContent;

  form.addEventListener("submit", (event) => {
    if (form.ariaBusy === "true") {
      event.preventDefault();
      return;
    }
    form.ariaBusy = "true";
    button.textContent = button.dataset.busy;
  });

  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit(button);
    }
  });

  // The form is kept for when the user returns to the page.
  window.addEventListener("pageshow", () => {
    form.ariaBusy = null;
    button.textContent = label;
  });
}
