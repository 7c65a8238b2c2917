"""The reader's part of the page: controls, style and the script that fills it from data (`reader.py`).

The script sets text only through `textContent`, so that nothing in a prompt or response becomes markup.
"""

from html import escape

from megatron_bai.monitor.report.reader import ReaderData

STYLE = """
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; margin: 0 0 1rem }
.controls label { display: grid; grid-template-columns: minmax(0, 1fr); font-size: .78rem; color: var(--soft);
  max-width: min(20rem, 100%) }
.controls label[hidden] { display: none }
select, button { font: inherit; font-size: .9rem; color: var(--text); background: var(--card); border-radius: 7px;
  border: 1px solid var(--line); padding: .35rem .6rem; max-width: 100% }
button { cursor: pointer; padding: .5rem 1rem }
#cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1rem;
  align-items: start }
.sample h3 { margin: 0 0 .2rem } .sample .facts { margin: 0 0 .6rem; font-size: .85rem; max-width: none }
.sample h4 { font-size: .75rem; font-weight: 500; color: var(--soft); margin: .6rem 0 .15rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 26rem; overflow-y: auto;
  font: 13.5px/1.65 ui-monospace, SFMono-Regular, Menlo, monospace; margin: 0 }
.text.prompt { max-height: 9rem; color: var(--soft) }
.text span { border-radius: 3px; cursor: help } .text span.on { outline: 2px solid var(--text) }
.text span.given { opacity: .55; font-style: italic }
.detail { font-size: .8rem; color: var(--soft); min-height: 1.3em; margin: .4rem 0 0; max-width: none;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .6rem; font-size: .78rem; color: var(--soft);
  margin: 0 0 1rem }
.scale i { display: inline-block; padding: 0 .6rem; border-radius: 3px; font-style: normal; color: var(--text) }
"""

_CONTROLS = """
<div class="controls">
<label>Run<select id="pick-run"></select></label>
<label>First<select id="pick-sort"><option value="best">best</option><option value="worst">worst</option>
<option value="longest">longest</option><option value="discrepancy">highest discrepancy</option>
<option value="mismatch">most routes that differ</option></select></label>
<label>Step<select id="pick-step"></select></label>
<label>Of<select id="pick-split"><option value="">training and evaluation</option>
<option value="train">training</option><option value="eval">evaluation</option></select></label>
<label>Prompt<select id="pick-prompt"></select></label>
<label>Shade tokens by<select id="pick-shade"><option value="discrepancy">discrepancy</option>
<option value="routes">routes that differ</option><option value="">nothing</option></select></label>
</div><div class="scale" id="scale"></div><div id="cards"></div><button id="more" hidden>Show more</button>
<noscript><p>The reader needs JavaScript.</p></noscript>
"""

SCRIPT = """
const samples = JSON.parse(document.getElementById("samples").textContent);
const pick = name => document.getElementById("pick-" + name);
const orders = { best: s => s.reward === null ? null : -s.reward, worst: s => s.reward, longest: s => -s.length,
  discrepancy: s => s.discrepancy === null ? null : -s.discrepancy,
  mismatch: s => s.mismatch === null ? null : -s.mismatch };
const PAGE = 6;
let limit = PAGE;
function element(parent, tag, text, name) {
  const child = parent.appendChild(document.createElement(tag));
  if (text !== undefined) child.textContent = text;
  if (name) child.className = name;
  return child;
}
function options(name, entries, chosen) {
  const select = pick(name), before = select.options.length ? select.value : undefined;
  select.replaceChildren();
  for (const [value, text] of entries) element(select, "option", text).value = value;
  const values = entries.map(([value]) => String(value));
  select.value = values.includes(before) ? before : values.includes(chosen) ? chosen : values[0];
  select.parentElement.hidden = entries.length < 2;
}
const unique = values => [...new Set(values)];
// Discrepancy on a logarithmic scale from 0.001 to 1 nat, routes by the square root of the share of layers.
const strength = { discrepancy: x => Math.min(Math.max((Math.log10(Math.max(x, 1e-9)) + 3) / 3, 0), 1),
  routes: x => Math.sqrt(Math.min(x, 1)) };
const tint = (shade, x) => x > 0 ? `rgba(${shade === "routes" ? "150, 80, 240" : "236, 120, 20"}, ${.7 * x})` : "";
const short = x => x === null ? "unknown" : x.toFixed(4);
function tokenNumbers(sample, i) {
  const a = sample.training[i], b = sample.inference[i];
  return { discrepancy: a === null || b === null ? null : Math.abs(a - b),
    routes: sample.mismatch === null ? null : sample.routes[i] / Math.max(sample.layers, 1) };
}
function describeToken(sample, i) {
  const a = sample.training[i], b = sample.inference[i], d = tokenNumbers(sample, i).discrepancy;
  const place = sample.left_out && i >= sample.head ? i + sample.left_out : i;
  const words = [`token ${place + 1} ${JSON.stringify(sample.texts[i])}`];
  words.push(sample.given[i] ? "the environment's" : `log \\u03bc ${short(b)} (inference)`);
  if (a !== null) words.push(`log \\u03c0 ${short(a)} (training)`);
  if (d !== null) words.push(`discrepancy ${d.toPrecision(2)} nats`);
  if (sample.mismatch !== null) words.push(`routes differ in ${sample.routes[i]} of ${sample.layers} layers`);
  return words.join(" \\u00b7 ");
}
function card(sample, shade) {
  const box = document.createElement("div");
  box.className = "card sample";
  const run = pick("run").options.length > 2 ? `${sample.run} \\u00b7 ` : "";
  const kind = sample.split === "eval" ? "evaluation after step" : "step";
  element(box, "h3", `${run}${kind} ${sample.step} \\u00b7 prompt ${sample.index}, sample ${sample.member}`);
  element(box, "p", [...sample.facts, "kept as " + sample.kept.join(", ")].join(" \\u00b7 "), "facts");
  element(box, "h4", "Prompt");
  element(box, "div", sample.prompt, "text prompt").dir = "auto";
  element(box, "h4", "Response");
  const text = element(box, "div", undefined, "text"), detail = document.createElement("p");
  text.dir = "auto";
  sample.texts.forEach((token, i) => {
    if (sample.left_out && i === sample.head) element(text, "i", `\\n[\\u2026 ${sample.left_out} tokens \\u2026]\\n`);
    const span = element(text, "span", token), value = shade ? tokenNumbers(sample, i)[shade] : null;
    span.dataset.i = i;
    if (sample.given[i]) span.className = "given";
    if (value !== null && value > 0) span.style.background = tint(shade, strength[shade](value));
  });
  detail.className = "detail"; detail.textContent = sample.texts.length ? "" : "The response is empty.";
  const show = event => {
    const span = event.target.closest("span");
    if (!span) return;
    text.querySelector(".on")?.classList.remove("on");
    span.classList.add("on");
    span.title = detail.textContent = describeToken(sample, +span.dataset.i);
  };
  text.addEventListener("mouseover", show); text.addEventListener("click", show);
  box.appendChild(detail);
  if (sample.last_reply) {
    element(box, "h4", "Last reply, which the model did not read");
    element(box, "div", sample.last_reply, "text").dir = "auto";
  }
  if (sample.answer) { element(box, "h4", "Answer"); element(box, "div", sample.answer, "text").dir = "auto"; }
  return box;
}
function scale(shade) {
  const box = document.getElementById("scale");
  box.replaceChildren();
  element(box, "span", "Point at a token, or tap it, for its numbers.");
  const marks = shade === "routes" ? [["1 %", .01], ["10 %", .1], ["50 %", .5], ["all", 1]]
    : [["0.003", .003], ["0.01", .01], ["0.1", .1], ["1 and more", 1]];
  if (!shade) return;
  element(box, "span", shade === "routes" ? "Layers whose routes differ, where the token was predicted:"
    : "|log \\u03c0 \\u2212 log \\u03bc| between the engines, nats:");
  for (const [text, x] of marks) element(box, "i", text).style.background = tint(shade, strength[shade](x));
}
function read() {
  const run = pick("run").value, split = pick("split").value, shade = pick("shade").value;
  const here = samples.filter(s => (!run || s.run === run) && (!split || s.split === split));
  const steps = unique(here.map(s => s.step)).sort((a, b) => a - b);
  options("step", [["", `all ${steps.length}`], ...steps.map(s => [s, s])], String(steps.at(-1)));
  const ofStep = here.filter(s => !pick("step").value || String(s.step) === pick("step").value);
  const prompts = new Map(here.map(s => [`${s.split} ${s.index}`, s]));
  const names = [...prompts].sort((a, b) => a[1].index - b[1].index)
    .map(([key, s]) => [key, `${key}: ${s.prompt.slice(0, 50).replace(/\\s+/g, " ")}`]);
  options("prompt", [["", `all ${names.length}`], ...names]);
  const prompt = pick("prompt").value;
  pick("step").disabled = prompt !== "";  // of any step: how its responses changed is the question then
  const found = (prompt ? here.filter(s => `${s.split} ${s.index}` === prompt) : ofStep).slice();
  const order = orders[pick("sort").value], rank = s => order(s) === null ? Infinity : order(s);
  found.sort((a, b) => rank(a) - rank(b) || a.step - b.step);
  scale(shade);
  document.getElementById("cards").replaceChildren(...found.slice(0, limit).map(s => card(s, shade)));
  const more = document.getElementById("more");
  more.hidden = found.length <= limit;
  more.textContent = `Show more (${found.length - limit} left)`;
}
const runs = unique(samples.map(s => s.run));
options("run", [...(runs.length > 1 ? [["", "all"]] : []), ...runs.map(name => [name, name])]);
for (const name of ["run", "sort", "step", "split", "prompt", "shade"])
  pick(name).addEventListener("change", () => { limit = PAGE; read(); });
document.getElementById("more").addEventListener("click", () => { limit += 2 * PAGE; read(); });
read();
"""


def reader_html(data: ReaderData) -> str:
    """Return the section that the script fills; of runs that keep no samples only what was left out, if anything."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in data.notes)
    if not data.samples and not notes:
        return ""
    intro = "<p>What the model was asked and what it said: some responses of each step, kept by the run.</p>"
    return f"<h2>Samples</h2>{intro}{_CONTROLS if data.samples else ''}{notes}"
