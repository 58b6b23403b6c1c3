// The pages work without this: it shows an answer while it is written, says that something is under way, keeps forms
// from being sent twice, lets Ctrl+Enter send them, and keeps the dashboard fresh.
"use strict";

const prepared = [];

// Puts the content of another page's main element into this one.
const replace = (html) => {
  const found = new DOMParser().parseFromString(html, "text/html").getElementById("main");
  if (!found) return false;
  prepared.length = 0;
  document.getElementById("main").replaceChildren(...found.childNodes);
  prepare();
  return true;
};

// Asks for an answer as events and shows it as it comes; the last event is the whole page with it.
const ask = async (form) => {
  const live = document.getElementById("live");
  const [words, text] = ["[data-words]", "[data-text]"].map((name) => live.querySelector(name));
  for (const old of document.querySelectorAll(".answer, #feedback")) old.closest("section").hidden = true;
  live.hidden = live.querySelector(".spinner").hidden = false;
  words.textContent = "Waiting for the answer …";
  text.textContent = "";
  const reply = await fetch(form.dataset.live, {
    method: "POST",
    headers: { accept: "text/event-stream" },
    body: new URLSearchParams(new FormData(form)),
  });
  if (!(reply.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    // A page that says what is wrong.
    if (!replace(await reply.text())) throw new Error(`status ${reply.status}`);
    return;
  }
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    waiting += value ?? "";
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      if (event.page) {
        replace(event.page);
        document.getElementById("answer")?.scrollIntoView();
        return;
      }
      text.textContent += event.choices?.[0]?.delta?.content ?? "";
      if (text.textContent) words.textContent = "Writing …";
    }
    if (done) throw new Error("the answer broke off");
  }
};

const failed = (message) => {
  const live = document.getElementById("live");
  live.querySelector(".spinner").hidden = true;
  live.querySelector("[data-words]").textContent = `No answer: ${message}`;
};

const prepare = () => {
  for (const form of document.forms) {
    const button = form.querySelector("button[data-busy]");
    if (!button) continue;
    const label = button.textContent;
    const rest = () => {
      form.ariaBusy = null;
      button.textContent = label;
    };
    prepared.push(rest);

    form.addEventListener("submit", (event) => {
      if (form.ariaBusy === "true") {
        event.preventDefault();
        return;
      }
      form.ariaBusy = "true";
      button.textContent = button.dataset.busy;
      if (!form.dataset.live) return;
      event.preventDefault();
      ask(form)
        .catch((error) => failed(error.message))
        .finally(rest);
    });

    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        form.requestSubmit(button);
      }
    });
  }
  for (const note of document.querySelectorAll("[data-refreshed]")) note.hidden = false;
};

prepare();

// A form is kept for when the user returns to the page.
window.addEventListener("pageshow", () => {
  for (const rest of prepared) rest();
});

const main = document.getElementById("main");
if (main.dataset.refresh) {
  setInterval(async () => {
    // Not while somebody reads a detail, or stands somewhere in the page with the keyboard.
    const busy = document.hidden || main.querySelector("details[open]") || main.contains(document.activeElement?.closest("main *"));
    if (busy) return;
    try {
      const reply = await fetch(location.href, { headers: { accept: "text/html" } });
      if (reply.ok && !reply.redirected) replace(await reply.text());
    } catch {
      // The next try may find the server again.
    }
  }, main.dataset.refresh * 1000);
}
