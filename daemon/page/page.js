
"use strict";
(() => {
  const EVERY_MS = 2000, HIDDEN_MS = 20000, LONGEST_MS = 15000, TIMEOUT_MS = 8000;
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);

  // Everything from the daemon comes in as text: names in records are anybody's.
  function text(node, value) { if (node.textContent !== value) node.textContent = value; }
  function el(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const key in attributes || {}) node.setAttribute(key, attributes[key]);
    node.append(...children);
    return node;
  }
  function draw(name, attributes, words) {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (words !== undefined) node.textContent = words;
    return node;
  }

  const known = (value) => value !== null && value !== undefined;
  const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const error = (value) => known(value) ? value.toFixed(value < 0.0995 ? 3 : 2) : "–";
  const number = (value) => !known(value) ? "–" : Math.abs(value) >= 100 ? grouped.format(value) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);
  const count = (value) => known(value) ? grouped.format(value) : "–";
  const clock = (at, seconds) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined, hour12: false });
  const day = (at) => new Date(at * 1000).toLocaleDateString([], { day: "numeric", month: "short" });
  function moment(at, now) {
    const same = new Date(at * 1000).toDateString() === new Date(now * 1000).toDateString();
    return same ? clock(at) : `${day(at)}, ${clock(at)}`;
  }
  const plural = (n, word) => `${n ? count(n) : "no"} ${word}${n === 1 ? "" : "s"}`;
  function span(seconds) {
    if (!known(seconds)) return "–";
    const s = Math.max(0, Math.round(seconds));
    if (s < 90) return `${s} s`;
    if (s < 5400) return `${Math.round(s / 60)} min`;
    if (s < 172800) return `${Math.round(s / 3600)} h`;
    return `${Math.round(s / 86400)} days`;
  }
  const changed = (() => {
    const last = new Map();
    return (name, value) => {
      const now = JSON.stringify(value);
      if (last.get(name) === now) return false;
      last.set(name, now);
      return true;
    };
  })();

  // ---- the sentence on top, and the figures

  function parts(list, now) {
    return list.map((part) => typeof part === "string" ? part : moment(part.at, now)).join("");
  }

  function showVerdict(state) {
    $("top").dataset.tone = state.verdict.tone;
    // Written only when it is another sentence: it is read aloud each time.
    text($("verdict"), parts(state.verdict.text, state.now));
    text($("verdict-numbers"), state.verdict.numbers);
    document.title = `${state.loop.state}: homeostat`;
    text($("product"), state.product);
    text($("source"), state.source);
  }

  function showFigures(state) {
    const { error: errors, flow } = state;
    const classes = state.task === "classification";
    text($("served"), error(errors.served));
    text($("frozen"), error(errors.frozen));
    text($("served-note"), known(errors.served) && classes ? `about ${Math.round(errors.served * 100)} of 100 answers wrong` : known(errors.served) ? "squared error over the reference's" : state.labels.joined ? "not known yet of what answers now" : "no labels have come yet");
    text($("rate"), number(flow.in_per_s));
    text($("rate-note"), `${count(flow.in)} read since the start`);
    text($("lag"), count(flow.lag));
    text($("lag-note"), known(flow.lag_s) ? `${span(flow.lag_s)} of work` : known(flow.lag) ? "records" : "not known");
  }

  // ---- error over time

  const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];
  const FLAGS = { promoted: "", "rolled back": "hand", withdrawn: "gone", frozen: "hand", resumed: "hand", "safety stop": "gone" };
  const NAMES = { drift: "drift noticed", promoted: "promoted", "rolled back": "rolled back to", withdrawn: "withdrawn", frozen: "frozen by an operator", resumed: "resumed by an operator", "safety stop": "safety stop" };

  function niceTop(highest) {
    for (const top of [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1]) if (highest <= top) return top;
    const power = Math.pow(10, Math.floor(Math.log10(highest)));
    return [1, 2, 5, 10].map((n) => n * power).find((top) => highest <= top);
  }

  function markWords(mark) {
    const which = known(mark.version) ? (mark.version === 0 ? " the frozen model" : ` version ${mark.version}`) : "";
    const times = mark.count > 1 ? ` (${mark.count} times)` : "";
    return mark.kind === "promoted" || mark.kind === "withdrawn" ? `${which.trim()} ${mark.kind}${times}` : `${NAMES[mark.kind] || mark.kind}${which}${times}`;
  }

  function upToNow(state) {
    // The present is the last point, so that the curves end at the figures above them.
    const { history, error: errors, loop, now } = state;
    return { ...history, at: [...history.at, now], served: [...history.served, errors.served], frozen: [...history.frozen, errors.frozen],
      state: [...history.state, history.states.indexOf(loop.state)] };
  }

  function showChart(state) {
    const svg = $("chart"), history = upToNow(state);
    const width = Math.max(280, svg.clientWidth), height = 284;
    const left = 40, right = 56, top = 44, bottom = 40, strip = 8;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const at = history.at, begin = Math.min(state.started, at.length ? at[0] : state.now), end = Math.max(state.now, begin + 10);
    const finite = [...history.served, ...history.frozen].filter(known);
    const highest = niceTop(Math.max(0.01, ...finite));
    const x = (t) => left + (t - begin) / (end - begin) * (width - left - right);
    const y = (v) => height - bottom - v / highest * (height - top - bottom);
    const nodes = [];
    for (let i = 0; i <= 4; i++) {
      const v = highest * i / 4;
      nodes.push(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
      nodes.push(draw("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, `${parseFloat(v.toPrecision(3))}`));
    }
    const room = Math.max(2, Math.floor((width - left - right) / 92));
    const step = STEPS.find((s) => (end - begin) / s <= room) || STEPS[STEPS.length - 1];
    const zone = new Date(end * 1000).getTimezoneOffset() * 60;
    for (let t = Math.ceil((begin - zone) / step) * step + zone; t <= end; t += step)
      nodes.push(draw("text", { x: x(t), y: height - 6, "text-anchor": "middle" }, step >= 86400 ? day(t) : clock(t, step < 60)));
    // The state as a strip below, neighbours of one state as one piece.
    for (let i = 0; i < at.length;) {
      let j = i;
      while (j + 1 < at.length && history.state[j + 1] === history.state[i]) j++;
      const from = i ? x(at[i - 1]) : x(begin), to = j + 1 < at.length ? x(at[j]) : x(end);
      nodes.push(draw("rect", { class: `s${history.state[i]}`, x: from, width: Math.max(1, to - from), y: height - bottom + 7, height: strip }));
      i = j + 1;
    }
    // The newest first: a flag that would lie on a newer one has its line and its title alone.
    let free = 1e9;
    for (const mark of [...history.marks].reverse()) {
      const place = x(mark.at), group = draw("g", {});
      group.append(draw("title", {}, `${moment(mark.at, state.now)}: ${markWords(mark)}`));
      if (mark.kind === "drift") {
        group.append(draw("line", { class: "drift-line", x1: place, x2: place, y1: top, y2: height - bottom }));
        group.append(draw("path", { class: "drift", d: `M${place - 5} ${top - 9}h10l-5 9z` }));
      } else {
        group.append(draw("line", { class: "version-line", x1: place, x2: place, y1: 22, y2: height - bottom }));
        const words = mark.kind === "promoted" ? `v${mark.version}` : mark.kind === "withdrawn" ? `v${mark.version} out` : mark.kind === "rolled back" ? `to v${mark.version}` : mark.kind === "safety stop" ? "stop" : mark.kind;
        const wide = words.length * 6.6 + 10, middle = Math.min(width - wide / 2 - 1, Math.max(wide / 2 + 1, place));
        if (middle + wide / 2 < free) {
          group.append(draw("rect", { class: `flag ${FLAGS[mark.kind] || ""}`, x: middle - wide / 2, y: 3, width: wide, height: 18, rx: 4 }));
          group.append(draw("text", { class: "flag-text", x: middle, y: 16 }, words));
          free = middle - wide / 2 - 2;
        }
      }
      nodes.push(group);
    }
    const ends = [];
    for (const name of ["frozen", "served"]) {
      let d = "", pen = false;
      const last = history[name][at.length - 1];
      const usual = at.length > 1 ? (at[at.length - 1] - at[0]) / (at.length - 1) : 1;
      history[name].forEach((value, i) => {
        if (!known(value)) { pen = false; return; }
        if (i && at[i] - at[i - 1] > Math.max(10, 5 * usual)) pen = false;
        d += `${pen ? "L" : "M"}${x(at[i]).toFixed(1)} ${y(Math.min(value, highest)).toFixed(1)}`;
        pen = true;
      });
      if (d) nodes.push(draw("path", { class: name, d }));
      if (known(last)) ends.push({ name, value: last, y: y(Math.min(last, highest)) + 4 });
    }
    if (ends.length === 2 && Math.abs(ends[0].y - ends[1].y) < 14) {
      const [lower, upper] = ends[0].y >= ends[1].y ? ends : [ends[1], ends[0]], middle = (lower.y + upper.y) / 2;
      lower.y = Math.min(middle + 7, height - bottom + 4);
      upper.y = lower.y - 14;
    }
    for (const one of ends) nodes.push(draw("text", { class: `end-${one.name}`, x: width - right + 6, y: one.y }, error(one.value)));
    svg.replaceChildren(...nodes);
    showChartWords(state);
  }

  function showChartWords(state) {
    const { marks, served } = state.history, values = served.filter(known);
    const drifts = marks.filter((m) => m.kind === "drift").reduce((sum, m) => sum + m.count, 0);
    const promoted = marks.filter((m) => m.kind === "promoted").reduce((sum, m) => sum + m.count, 0);
    const range = values.length ? `Served error between ${error(Math.min(...values))} and ${error(Math.max(...values))}` : "No labels have come yet";
    text($("chart-words"), `${range} since ${moment(state.started, state.now)}; ${plural(drifts, "drift")}, ${plural(promoted, "promoted version")}. The strip below is the state, grey while in its working range.`);
    if (!$("chart-rows").closest("details").open) return;
    const { at, frozen, states, state: ranks } = state.history, each = Math.max(1, Math.ceil(at.length / 40)), rows = [];
    for (let i = at.length - 1; i >= 0; i -= each) rows.push([at[i], el("tr", {}, el("td", {}, clock(at[i], true)), el("td", {}, error(served[i])), el("td", {}, error(frozen[i])), el("td", {}, states[ranks[i]] || ""))]);
    for (const mark of marks) rows.push([mark.at, el("tr", {}, el("td", {}, clock(mark.at, true)), el("td", { colspan: 3 }, markWords(mark)))]);
    rows.sort((a, b) => b[0] - a[0]);
    $("chart-rows").replaceChildren(...rows.map((row) => row[1]));
  }

  // ---- the loop

  function showLoop(state) {
    const loop = state.loop, frozen = loop.frozen;
    const fast = !frozen && (loop.state === "fast" || loop.state === "slow"), slow = !frozen && loop.state === "slow";
    for (const [name, on] of [["fast", fast], ["slow", slow]]) for (const id of [`loop-${name}`, `box-${name}`]) $(id).classList.toggle("on", on);
    $("box-model").classList.toggle("on", loop.state === "fallback");
    text($("box-version"), loop.version ? `version ${loop.version}` : "as delivered");
    text($("box-fast-words"), frozen ? "frozen" : fast ? `at work, ${Math.round((loop.gain || 0) * 100)} %` : loop.state === "fallback" ? "off for a while" : "looks on");
    text($("box-slow-words"), frozen ? "frozen" : slow ? "at work" : loop.state === "settling" ? "just done" : state.held ? "held" : "looks on");
    text($("loop-words"), frozen ? "Frozen by an operator: neither loop does anything until somebody asks for resume." : `${loop.title}. ${loop.meaning}`);
    const names = ["steady", "fast", "slow", "settling", "fallback"];
    const total = names.reduce((sum, name) => sum + (loop.seconds[name] || 0), 0) || 1, list = $("states");
    if (!list.children.length) for (const name of names) list.append(el("li", { class: name }, el("span", {}, name), el("span", { class: "now" }), el("span", { class: "share" })));
    names.forEach((name, i) => {
      const item = list.children[i], on = loop.state === name;
      if (on) item.setAttribute("aria-current", "true"); else item.removeAttribute("aria-current");
      text(item.children[1], on ? span(state.now - loop.since) : "");
      text(item.children[2], `${Math.round((loop.seconds[name] || 0) / total * 100)} %`);
    });
  }

  // ---- signals

  function meter(value, half) {
    const box = el("span", { class: half ? "meter half" : "meter", "aria-hidden": "true" }, el("span"));
    setMeter(box, value, half);
    return box;
  }
  function setMeter(box, value, half) {
    const share = known(value) ? Math.min(1, Math.max(0, value) / (half ? 2 : 1)) : 0;
    box.firstChild.style.width = `${Math.round(share * 100)}%`;
    box.classList.toggle("over", known(value) && value >= 1);
  }
  function showSignals(state) {
    const rows = state.signals.filter((s) => known(s.deviation) || known(s.threshold) || ["error"].includes(s.name)), body = $("signals");
    if (changed("signals", rows.map((s) => s.name)))
      body.replaceChildren(...rows.map((s) => el("tr", {},
        el("th", { scope: "row" }, s.words, el("span", { class: "code" }, "")),
        el("td", {}, el("span", {}, "–"), meter(null, true)), el("td", {}, el("span", {}, "–"), meter(null, false)))));
    rows.forEach((s, i) => {
      const row = body.children[i], alarm = known(s.threshold) && s.threshold > 0 && known(s.statistic) ? s.statistic / s.threshold : null;
      text(row.children[0].lastChild, `${s.name}${known(s.level) ? ` ${number(s.level)}` : ""}`);
      [[row.children[1], s.deviation, true], [row.children[2], alarm, false]].forEach(([cell, value, half]) => {
        const shown = known(value) ? Math.abs(value) < 0.005 ? "0.00" : number(value) : "–";
        text(cell.firstChild, known(value) && value >= 1 ? `${shown} ▲` : shown);
        cell.firstChild.className = known(value) && value >= 1 ? "out" : "";
        setMeter(cell.lastChild, value, half);
      });
    });
  }

  // ---- decisions, versions, flow, dead letters

  function showDecisions(state) {
    if (!changed("decisions", [state.decisions, new Date(state.now * 1000).toDateString()])) return;
    const items = state.decisions.map((d) => el("li", {}, el("time", { datetime: new Date(d.at * 1000).toISOString() }, clock(d.at, true)), el("span", { class: `words ${d.tone}` }, d.text)));
    if (!items.length) items.push(el("li", {}, el("span", {}, ""), el("span", { class: "words quiet" }, "Nothing has been decided since the start.")));
    $("decisions").replaceChildren(...items);
  }

  function plain(value) {
    if (value === null) return "–";
    if (Array.isArray(value)) return value.map(plain).join(", ") || "none";
    if (typeof value === "object") return Object.keys(value).map((key) => `${key} ${plain(value[key])}`).join("; ");
    return typeof value === "number" && !Number.isInteger(value) ? String(parseFloat(value.toPrecision(4))) : String(value);
  }

  function showVersions(state) {
    if (!changed("versions", [state.versions, state.held])) return;
    const list = $("versions"), open = new Set([...list.querySelectorAll("details[open]")].map((d) => d.dataset.number));
    const focus = list.contains(document.activeElement) ? document.activeElement.closest("details") : null;
    const items = state.versions.map((v) => {
      const line = el("div", { class: "line" }, el("b", {}, v.number ? `Version ${v.number}` : "Version 0"));
      if (v.made_at) line.append(el("span", { class: "dim" }, moment(Date.parse(v.made_at) / 1000, state.now)));
      const tag = (words, kind) => line.append(el("span", { class: `tag ${kind || ""}` }, words));
      if (v.serves) tag("answers now", "serves");
      if (v.serves && state.held) tag("held");
      if (v.pinned) tag("pinned");
      if ("withdrawn" in v.record) tag("withdrawn", "withdrawn");
      if (!v.kept) tag("no longer kept");
      const item = el("li", {}, line, el("p", {}, v.words));
      const fields = Object.entries({ ...(v.parent === null ? {} : { "stands on": v.parent ? `version ${v.parent}` : "the frozen model" }), ...v.record });
      if (fields.length) {
        const details = el("details", { "data-number": v.number }, el("summary", {}, `Record of version ${v.number}`),
          el("dl", {}, ...fields.flatMap(([name, value]) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, plain(value))])));
        details.open = open.has(String(v.number));
        item.append(details);
      }
      return item;
    });
    list.replaceChildren(...items);
    if (focus) list.querySelector(`details[data-number="${focus.dataset.number}"] summary`)?.focus({ preventScroll: true });
    const select = $("version");
    if (!select) return;
    const chosen = select.value, choice = state.versions.filter((v) => v.kept && !v.serves);
    select.replaceChildren(...choice.map((v) => el("option", { value: v.number }, v.number ? `version ${v.number}${"withdrawn" in v.record ? ", withdrawn" : ""}` : "0, the frozen model")));
    if (choice.some((v) => String(v.number) === chosen)) select.value = chosen;
  }

  function pairs(id, entries) {
    const list = $(id);
    if (list.children.length !== entries.length) list.replaceChildren(...entries.map(() => el("div", {}, el("dt"), el("dd"))));
    entries.forEach(([name, value], i) => { text(list.children[i].firstChild, name); text(list.children[i].lastChild, value); });
  }

  const WAYS = { model: "the model as it is", adapted: "the fast method", aligned: "re-aligned inputs", runs: "runs of classes", memory: "remembered labels", version: "a version", both: "a version, adapted" };
  function shares(answered) {
    const all = Object.values(answered).reduce((sum, n) => sum + n, 0);
    const found = Object.entries(answered).filter(([, n]) => n / all >= 0.005).sort((a, b) => b[1] - a[1]).slice(0, 2);
    return found.map(([by, n]) => `${WAYS[by] || by} ${Math.round(n / all * 100)} %`).join(", ") || "–";
  }

  function showFlow(state) {
    const flow = state.flow, checkpoint = state.checkpoint;
    pairs("flow", [
      ["Read", `${number(flow.in_per_s)} a second`],
      ["Answered", `${number(flow.out_per_s)} a second`],
      ["Waiting to be read", known(flow.lag) ? `${count(flow.lag)} records` : "not known"],
      ["Answered by", shares(state.loop.answered)],
      ["Under load", flow.gives_way],
      ["Skipped or shed", count(flow.skipped + flow.shed)],
      ["Labels that found their answer", count(state.labels.joined)],
      ["Labels too late, or refused", `${count(state.labels.late)}, ${count(state.labels.rejected)}`],
      ["Last progress", known(flow.progress) ? moment(flow.progress, state.now) : "–"],
      ["Last checkpoint", checkpoint.failures ? `${checkpoint.failures} failed; last ${known(checkpoint.at) ? moment(checkpoint.at, state.now) : "never"}` : known(checkpoint.at) ? moment(checkpoint.at, state.now) : "none in this run"],
    ]);
  }

  function showDead(state) {
    const dead = state.dead, reasons = Object.entries(dead.reasons);
    const told = reasons.map(([name, n]) => `${count(n)} ${name.replaceAll("_", " ")}`).join(", ");
    text($("dead-words"), !reasons.length && !dead.total ? "None: every record could be answered." : `${count(dead.total)} dead letters${dead.place.startsWith("null:") ? "" : `, kept at ${dead.place}`}. Records that could not be used in this run: ${told || "none"}.`);
    if (!changed("dead", dead.last)) return;
    // What is empty needs no stop on the way through the page.
    $("dead").parentElement.tabIndex = dead.last.length ? 0 : -1;
    $("dead").replaceChildren(...dead.last.map((d) => el("li", {}, `${clock(d.at, true)} ${d.reason.replaceAll("_", " ")}: ${d.detail}`, el("span", { class: "note" }, d.where))));
  }

  // ---- asking

  let last = null, failures = 0, lostAt = null, timer = 0, asking = false;

  function show(state) {
    last = state;
    showVerdict(state); showFigures(state); showChart(state); showLoop(state); showSignals(state);
    showDecisions(state); showVersions(state); showFlow(state); showDead(state);
    text($("footer"), `Running since ${moment(state.started, state.now)}, ${span(state.now - state.started)}. ${plural(state.loop.drifts, "drift")}, ${plural(state.loop.bursts.promoted, "promoted version")}, ${plural(state.loop.trips, "safety stop")}.`);
  }

  function link(how, words) {
    $("link").dataset.link = document.body.dataset.link = how;
    text($("link-text"), words);
  }

  async function ask() {
    clearTimeout(timer);
    if (asking) return;
    asking = true;
    const abort = new AbortController(), late = setTimeout(() => abort.abort(), TIMEOUT_MS);
    try {
      const answer = await fetch("state", { signal: abort.signal, cache: "no-store", credentials: "same-origin" });
      if (!answer.ok) throw new Error(String(answer.status));
      const state = await answer.json();
      failures = 0; lostAt = null;
      link("live", "Live");
      show(state);
    } catch (problem) {
      failures += 1;
      lostAt = lostAt || Date.now() / 1000;
      // One answer that does not come may be the network's fault; two are news.
      if (failures > 1 || !last) {
        const since = moment(lostAt, Date.now() / 1000);
        link("lost", `No answer since ${since}`);
        $("top").dataset.tone = "alarm";
        text($("verdict"), `The daemon has not answered since ${since}.`);
        text($("verdict-numbers"), last ? "What is below is the last that it said." : "Nothing is known of it yet.");
        document.title = "no answer: homeostat";
      }
    } finally {
      clearTimeout(late);
      asking = false;
      const pause = document.hidden ? HIDDEN_MS : failures ? Math.min(LONGEST_MS, EVERY_MS * failures) : EVERY_MS;
      timer = setTimeout(ask, pause);
    }
  }
  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
  new ResizeObserver(() => { if (last) showChart(last); }).observe($("chart").parentElement);
  $("chart-rows").closest("details").addEventListener("toggle", () => { if (last) showChartWords(last); });
  ask();

  // ---- an operator's actions

  const form = $("form");
  if (!form) return;
  const dialog = $("ask");
  let confirmed = null;

  function say(fine, words) {
    $("answer").dataset.fine = fine === null ? "" : fine ? "yes" : "no";
    text($("answer"), words);
  }

  async function act(action, body) {
    const token = $("token").value.trim();
    if (!token) { say(false, "Type the operator's token first."); $("token").focus(); return; }
    const buttons = [...form.querySelectorAll("button")];
    for (const button of buttons) button.setAttribute("aria-disabled", "true");
    say(null, "Asked for; it is done between two batches.");
    try {
      // Only Latin-1 fits into a header; a token with anything else would be refused anyhow.
      const answer = await fetch(`ctl/${action}`, { method: "POST", body: JSON.stringify(body), credentials: "omit",
        headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" } });
      const found = await answer.json();
      say(found.done, `${found.done ? "Done" : "Not done"}: ${found.text}`);
    } catch (problem) {
      say(false, "Not done, as far as is known: the daemon did not answer.");
    } finally {
      for (const button of buttons) button.removeAttribute("aria-disabled");
      ask();
    }
  }

  function wanted(action) {
    if (action !== "rollback" && action !== "drain") return act(action, {});
    const number = Number($("version").value), hold = $("hold").checked;
    if (action === "rollback" && !$("version").value) return say(false, "There is no other version to go back to.");
    const which = number ? `version ${number}` : "the frozen model";
    text($("ask-title"), action === "drain" ? "Drain and end?" : `Go back to ${which}?`);
    text($("ask-words"), action === "drain"
      ? "The daemon answers what it has read, writes a checkpoint and ends. Nothing is answered until somebody starts it again."
      : `From the next batch on ${which} answers.${hold ? " Nothing is promoted until resume." : " What is learnt later may take its place."}`);
    text($("ask-yes"), action === "drain" ? "Drain and end" : "Roll back");
    confirmed = () => act(action, action === "drain" ? {} : { version: number, hold });
    dialog.showModal();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-action]");
    if (button && button.getAttribute("aria-disabled") !== "true") wanted(button.dataset.action);
  });
  $("ask-no").addEventListener("click", () => dialog.close());
  $("ask-yes").addEventListener("click", () => { dialog.close(); confirmed?.(); confirmed = null; });
})();
