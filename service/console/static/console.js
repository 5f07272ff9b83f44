// What the console does beside reading: pages show what happens to conversations and messages, pictures are
// shown after a click, and earlier messages are loaded by scrolling. Pages are complete without it.
"use strict";

const EVERY_MS = 2000;
const REST_MS = 500;
const AGAIN_MS = 10000;
const ABOUT_MS = 1000;
const AWAY = "No answer from the service. Trying again.";
const OVER = "The session is over. Load the page again to sign in.";
const DELETED = "The conversation was deleted";
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Returns the nodes of a page or of a part of one. The service has escaped every text in it, and the policy of
// the page runs nothing that stands in it.
async function load(address, signal) {
  return parsed(await (await ask(address, signal)).text());
}

const parsed = (text) => new DOMParser().parseFromString(text, "text/html");

async function ask(address, signal) {
  const answer = await fetch(address, { signal, redirect: "manual", headers: { Accept: "text/html" } });
  if (answer.type === "opaqueredirect" || answer.status === 401) throw new Ended(OVER);
  if (answer.status === 404) throw new Ended(DELETED);
  if (!answer.ok) throw new Error(String(answer.status));
  return answer;
}

// There is nothing to look for any more. The message says why.
class Ended extends Error {}

// Yields the server-sent events of a stream, those that arrive together as one list.
async function* eventsOf(address, signal) {
  const reader = (await ask(address, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    const fields = blocks.map((block) => Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/))));
    // A block without data, such as a comment by itself, is no event.
    yield fields.filter(({ data }) => data).map(({ id, event, data }) => ({ id, event, data: JSON.parse(data) }));
  }
}

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

// Looks for news while the page is visible and not paused. `look` gives what is to be told to its second
// parameter, and is interrupted by its signal, so that nothing changes on a page that is paused.
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
  const tell = (text) => {
    box.classList.add("on");
    // A new text node is announced even if it says the same as before.
    if (text) state.replaceChildren(text);
    else if (state.textContent === AWAY) say("Live");
  };
  async function step() {
    if (rests()) return later(REST_MS);
    asking = new AbortController();
    try {
      await look(asking.signal, tell);
    } catch (error) {
      if (rests()) return later(REST_MS);
      box.classList.remove("on");
      if (error instanceof Ended) {
        button.hidden = true;
        return say(error.message);
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

// Takes an element out. If it has the focus, that goes to the element in its place, because it would be lost.
function remove(element, instead) {
  const held = element.contains(document.activeElement);
  element.remove();
  if (held) hold(instead);
}

function hold(element) {
  if (!element.matches("a, button, summary")) element.tabIndex = -1;
  element.focus({ preventScroll: true });
}

function followConversation(talk) {
  const list = one("[data-messages]", talk);
  const earlier = one("[data-earlier]", talk);
  if (earlier) scrollUp(talk, list, earlier);
  if (!("newest" in talk.dataset)) { one("[data-live]").hidden = true; return; }
  let last = Number(talk.dataset.last);
  if (!location.hash && !("linked" in talk.dataset)) scrollTo(0, document.documentElement.scrollHeight);
  const seq = (message) => Number(message.dataset.seq);
  // Each returns the `seq` of the messages that it changed, which may be none: the page may know already.
  const put = (html) => all(".message", parsed(html)).filter((each) => place(list, each, earlier?.isConnected)).map(seq);
  const drop = ({ after, upto }) => all(".message", list)
    .filter((each) => seq(each) > after && seq(each) <= upto)
    .map((each) => { remove(each, each.nextElementSibling ?? each.previousElementSibling ?? talk); return seq(each); });
  const clear = () => {
    drop({ after: -1, upto: Infinity });
    earlier?.parentElement?.remove();
    remove(one(".actions"), talk);
    explain(talk, `${DELETED}.`);
  };
  // Title, count and times are read again after what happened. A new title makes no event, so they also are after
  // the comments by which the service shows that it is there.
  let waiting = false;
  const refresh = (signal) => {
    if (waiting) return;
    waiting = true;
    setTimeout(async () => {
      waiting = false;
      if (!signal.aborted) await about(`conversation?id=${talk.dataset.id}&after=${last}`, signal).catch(() => {});
    }, ABOUT_MS);
  };
  const words = { message: ["is new", "are new"], updated: ["was changed", "were changed"], deleted: ["was deleted", "were deleted"] };
  follow(async (signal, tell) => {
    try {
      for await (const events of eventsOf(`events?id=${talk.dataset.id}&after=${last}`, signal)) {
        const [stay, told] = [atEnd(), { deleted: [], updated: [], message: [] }];
        for (const { id, event, data } of events) {
          if (id) last = Number(id);
          if (event === "gone") throw new Ended(DELETED);
          if (event in told) told[event].push(...(event === "deleted" ? drop(data) : put(data.html)));
        }
        pair(list);
        explain(talk, list.children.length ? "" : `This conversation has no messages${earlier?.isConnected ? " here" : ""}.`);
        if (stay && told.message.length) scrollTo(0, document.documentElement.scrollHeight);
        const changed = Object.entries(told).filter(([, seqs]) => seqs.length);
        if (changed.length || !events.length) refresh(signal);
        tell(changed.map(([event, seqs]) => (
          seqs.length === 1 ? `Message ${seqs[0]} ${words[event][0]}` : `${seqs.length} messages ${words[event][1]}`
        )).join(", "));
      }
    } catch (error) {
      if (error.message === DELETED) clear();
      throw error;
    }
  });
}

// Shows what is told about the conversation as it is now. If it cannot be read, the events say why.
async function about(address, signal) {
  const found = await load(address, signal);
  const now = all("[data-about]", found);
  document.title = found.title;
  all("[data-about]").forEach((each, index) => {
    if (!each.contains(document.activeElement)) each.replaceChildren(...now[index].childNodes);
  });
}

// Says in the place of the messages why there are none, or removes the paragraph that did.
function explain(talk, text) {
  let told = one("[data-none]", talk);
  if (!text) return told?.remove();
  if (!told) {
    told = document.createElement("p");
    told.className = "empty";
    told.dataset.none = "";
    one("[data-messages]", talk).after(told);
  }
  if (told.textContent !== text) told.textContent = text;
}

// Puts a message in its place, or in the place of its older form. Returns whether this changed the page.
function place(list, message, hasEarlier) {
  const old = document.getElementById(message.id);
  if (old?.dataset.sum === message.dataset.sum) return false;
  const shown = all(".message", list);
  const after = (each) => Number(each.dataset.seq) > Number(message.dataset.seq);
  // It stands among the earlier messages, which the page has not loaded.
  if (!old && hasEarlier && shown.length && after(shown[0])) return false;
  prepare(message);
  message.classList.add("new");
  if (!old) {
    list.insertBefore(message, shown.find(after) ?? null);
    return true;
  }
  const opened = all("details", old).map((each) => each.open);
  all("details", message).forEach((each, index) => { each.open = opened[index] ?? false; });
  const focused = all("a, button, summary, pre", old).indexOf(document.activeElement);
  list.insertBefore(message, old);
  remove(old, all("a, button, summary, pre", message)[focused] ?? message);
  return true;
}

// Says of each call and each result on the page where its other half is.
function pair(list) {
  const of = (kind) => all(`.part.${kind}[data-call]`, list);
  const seqs = (parts) => new Map(parts.map((part) => [part.dataset.call, part.closest(".message").dataset.seq]));
  const tell = (parts, others, found, missing) => parts.forEach((part) => {
    const other = others.get(part.dataset.call);
    const [tag, link] = [one("summary .tag", part), one(".id a", part)];
    tag.textContent = other ? found + other : missing;
    if (missing) tag.className = other ? "tag ok" : "tag open";
    link.hidden = !other;
    link.href = `#m${other}`;
    link.textContent = `go to #${other}`;
  });
  tell(of("call"), seqs(of("result")), "result in #", "no result on this page");
  tell(of("result"), seqs(of("call")), "of the call in #", "");
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
      pair(list);
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
  follow(async (signal, tell) => {
    const found = await load(location.href, signal);
    // Each is the body of the table, or says that there is no conversation.
    const [now, then] = [one("[data-rows]", found), one("[data-rows]")];
    const rows = all("tr[data-id]", now);
    if (rows.length && then.matches("tbody")) tell(mergeRows(rows, then, one("[rel=next]", found)));
    else {
      const [fresh, gone] = [rows.length, all("tr[data-id]", then).length];
      if (fresh || gone) {
        prepare(now);
        const box = then.closest("table") ?? then;
        box.before(now.closest("table") ?? now);
        remove(box, one("#main"));
      }
      tell(changes(fresh, 0, gone));
    }
    // What follows behind the page has changed, too, so its link leads on from another place.
    const [after, before] = [one(".after", found), one(".after")];
    if (after && before && after.innerHTML !== before.innerHTML && !before.contains(document.activeElement)) {
      before.replaceChildren(...after.childNodes);
    }
    filterRows();
  });
}

// Makes the rows of the list those that were read. A row with the focus stays where it is in the document, and
// the others move around it, because an element that is moved loses the focus. Returns what to tell.
function mergeRows(rows, body, hasMore) {
  const known = new Map(all("tr[data-id]", body).map((row) => [row.dataset.id, row]));
  const title = (row) => one(".titled a", row);
  const time = (row) => one("time", row).dateTime;
  let [fresh, renamed, gone] = [0, 0, 0];
  const wanted = rows.map((row) => {
    const old = known.get(row.dataset.id);
    known.delete(row.dataset.id);
    if (!old) {
      fresh += 1;
      row.classList.add("new");
      return row;
    }
    if (title(old).textContent !== title(row).textContent) {
      renamed += 1;
      title(old).textContent = title(row).textContent;
    }
    [...row.cells].forEach((cell, index) => {
      if (index > 1 && old.cells[index].innerHTML !== cell.innerHTML) old.cells[index].replaceChildren(...cell.childNodes);
    });
    return old;
  });
  for (const old of known.values()) {
    // A row that is older than the page reaches has moved to the next page.
    if (!hasMore || time(old) > time(wanted.at(-1))) gone += 1;
    const next = old.nextElementSibling ?? old.previousElementSibling;
    remove(old, next ? title(next) : one("#main"));
  }
  const held = wanted.findIndex((row) => row.contains(document.activeElement));
  if (wanted.some((row, index) => body.rows[index] !== row)) {
    wanted.forEach((row, index) => {
      if (index < held) wanted[held].before(row);
      else if (index > held) body.append(row);
    });
  }
  return changes(fresh, renamed, gone);
}

function changes(fresh, renamed, gone) {
  const told = [[fresh, "is new", "are new"], [renamed, "was renamed", "were renamed"], [gone, "is gone", "are gone"]];
  return told.filter(([number]) => number).map(([number, one, many]) => (
    number === 1 ? `1 conversation ${one}` : `${number} conversations ${many}`
  )).join(", ");
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
