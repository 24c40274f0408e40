// The page follows what changes: the list gets a line for each change, and what the server made is fetched again.
"use strict";
const live = document.getElementById("live");
if (live && window.EventSource) {
  const list = live.querySelector("ol");
  const most = 100;
  let waiting = false;
  const refresh = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(async () => {
      waiting = false;
      const answer = await fetch(location.href).catch(() => null);
      if (!answer || !answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const id of ["counts", "problems", "table", "readers"]) {
        const old = document.getElementById(id), fresh = page.getElementById(id);
        // Not under somebody's hands: who types a token would lose it.
        if (old && fresh && !old.contains(document.activeElement)) old.replaceWith(fresh);
      }
    }, 500);
  };
  const source = new EventSource("/events");
  source.onmessage = (message) => {
    const change = JSON.parse(message.data);
    const line = document.createElement("li");
    line.textContent = `${change.at} ${change.action} ${change.hotkey ?? ""} by ${change.program}`;
    list.prepend(line);
    if (list.children.length > most) list.lastChild.remove();
    live.hidden = false;
    refresh();
  };
  source.addEventListener("look", refresh);
  // What nobody announces: a problem, an age, who reads and how much.
  setInterval(() => document.hidden || refresh(), 10000);
}
