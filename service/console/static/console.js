// What the console does beside reading: new messages and conversations appear, pictures are shown after a
// click, and earlier messages are loaded by scrolling. Pages are complete without it.
"use strict";

const EVERY_MS = 2000;
// After an answer that was waited for, the next question follows at once.
const SOON_MS = 50;
const REST_MS = 500;
const AGAIN_MS = 10000;
const AWAY = "No answer from the service. Trying again.";
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Returns the nodes of a page or of a part of one. The service has escaped every text in it, and the policy of
// the page runs nothing that stands in it.
async function load(address, signal) {
  const answer = await fetch(address, { signal, redirect: "manual", headers: { Accept: "text/html" } });
  if (answer.type === "opaqueredirect" || answer.status === 401) throw new Ended();
  if (answer.status === 204) return null;
  if (!answer.ok) throw new Error(String(answer.status));
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

class Ended extends Error {}

function prepare(within) {
  for (const button of all("[data-picture], [data-copy]", within)) button.hidden = false;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.picture) {
    const picture = new Image();
    picture.referrerPolicy = "no-referrer";
    picture.alt = "Picture of this message";
    picture.src = button.dataset.picture;
    button.replaceWith(picture);
  } else if (button?.dataset.copy) {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  }
  for (const menu of all("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of all("details.menu[open]")) {
    menu.open = false;
    one("summary", menu).focus();
  }
});

// Looks for news while the page is visible and not paused. `look` returns what to tell, or nothing, and is
// interrupted by its signal, so that nothing changes on a page that is paused.
function follow(look) {
  const box = one("[data-live]");
  if (!box) return;
  const [state, button] = [one(".state", box), one("button", box)];
  let paused = false;
  let asking = new AbortController();
  const rests = () => paused || document.hidden;
  const say = (text) => { if (state.textContent !== text) state.textContent = text; };
  const show = () => { box.classList.toggle("on", !paused); say(paused ? "Paused" : "Live"); };
  const later = (ms) => setTimeout(step, ms);
  async function step() {
    if (rests()) return later(REST_MS);
    asking = new AbortController();
    try {
      const told = await look(asking.signal);
      box.classList.add("on");
      if (told) say(told);
      else if (state.textContent === AWAY) say("Live");
    } catch (error) {
      if (rests()) return later(REST_MS);
      box.classList.remove("on");
      if (error instanceof Ended) {
        button.hidden = true;
        return say("The session is over. Load the page again to sign in.");
      }
      say(AWAY);
      return later(AGAIN_MS);
    }
    return later(Number(box.dataset.every ?? EVERY_MS));
  }
  document.addEventListener("visibilitychange", () => { if (document.hidden) asking.abort(); });
  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    if (paused) asking.abort();
    button.setAttribute("aria-pressed", String(paused));
    button.textContent = paused ? "Go on" : "Pause";
    show();
  });
  show();
  later(REST_MS);
}

const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 120;

function followConversation(talk) {
  const list = one("[data-messages]", talk);
  const earlier = one("[data-earlier]", talk);
  if (earlier) scrollUp(talk, list, earlier);
  if (!("newest" in talk.dataset)) { one("[data-live]").hidden = true; return; }
  let last = Number(talk.dataset.last);
  if (!location.hash && !("linked" in talk.dataset)) scrollTo(0, document.documentElement.scrollHeight);
  one("[data-live]").dataset.every = SOON_MS;
  follow(async (signal) => {
    const found = await load(`new?id=${talk.dataset.id}&after=${last}&wait=10`, signal);
    const messages = found ? all(".message", found) : [];
    if (!messages.length) return "";
    const stay = atEnd();
    for (const each of messages) {
      prepare(each);
      each.classList.add("new");
      list.append(each);
      last = Math.max(last, Number(each.dataset.seq));
    }
    one("[data-none]", talk)?.remove();
    if (stay) scrollTo(0, document.documentElement.scrollHeight);
    return messages.length === 1 ? `Message ${last} is new` : `${messages.length} messages are new`;
  });
}

// Loads earlier messages when their link comes into view, and keeps what the reader sees in its place.
function scrollUp(talk, list, link) {
  let loading = false;
  const more = async () => {
    if (loading) return;
    loading = true;
    try {
      const found = await load(link.href);
      const height = document.documentElement.scrollHeight;
      const messages = all(".message", found);
      for (const each of messages) prepare(each);
      list.prepend(...messages);
      const next = one("[data-earlier]", found);
      if (next) link.href = next.href;
      else link.parentElement.remove();
      scrollBy(0, document.documentElement.scrollHeight - height);
    } catch {
      return; // the link is still there
    } finally {
      loading = false;
    }
  };
  link.addEventListener("click", (event) => { event.preventDefault(); more(); });
  const seen = new IntersectionObserver((entries) => { if (entries[0].isIntersecting && scrollY < 400) more(); });
  // Not before the page has been scrolled to its end, or the first look would load a page at once.
  setTimeout(() => seen.observe(link), 500);
}

function followList() {
  follow(async (signal) => {
    const found = await load(location.href, signal);
    const [now, then] = [one("table.list", found), one("table.list")];
    if (!now || !then) {
      if (now) location.reload();
      return "";
    }
    const known = new Set(all("tr[data-id]", then).map((row) => row.dataset.id));
    const fresh = all("tr[data-id]", now).filter((row) => !known.has(row.dataset.id));
    for (const row of fresh) row.classList.add("new");
    if (!then.contains(document.activeElement)) one("tbody", then).replaceWith(one("tbody", now));
    filterRows();
    return fresh.length ? (fresh.length === 1 ? "1 conversation is new" : `${fresh.length} conversations are new`) : "";
  });
}

function filterRows() {
  const words = one("[data-filter]")?.value.trim().toLowerCase() ?? "";
  for (const row of all("tr[data-id]")) row.hidden = !one(".titled a", row).textContent.toLowerCase().includes(words);
}

prepare(document);
one("[data-filter]")?.addEventListener("input", filterRows);
const talk = one(".talk");
if (talk) followConversation(talk);
else followList();
