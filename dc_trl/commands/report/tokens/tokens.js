"use strict";
// The token view. Text from a run reaches the page through textContent only.
(() => {
  const steps = report.steps;
  if (!steps.length) return;
  const find = (id) => document.getElementById(id);
  const tip = find("tip");
  let step = steps[0];
  let shade = "discrepancy";
  let shown = null; // the token that the tooltip is on
  let current = null; // the one that was selected by a click, a key or a link: it stays so until another is, or Escape
  const pointer = { x: NaN, y: NaN };

  function make(name, className, text) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function format(value) {
    if (value === null || !Number.isFinite(value)) return "not finite";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 0.001 && size < 10000 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  }

  const probability = (logp) => (logp === null ? null : Math.exp(logp));
  const difference = (a, b) => (a === null || b === null ? null : a - b);

  function size(completion, i) {
    const value = shade === "discrepancy"
      ? completion.discrepancy[i]
      : difference(completion.train_logp[i], completion.sampling_logp[i]);
    return value === null ? null : Math.abs(value);
  }

  function strength(completion, i) {
    const value = size(completion, i);
    if (value === null) return 1;
    return step.scale[shade] > 0 ? Math.min(value / step.scale[shade], 1) : 0;
  }

  // Completions

  function tokenSpans(completion) {
    const [invalid, rejected] = [new Set(completion.invalid), new Set(completion.rejected)];
    const spans = document.createDocumentFragment();
    completion.text.forEach((text, i) => {
      const gap = completion.position[i] - (i ? completion.position[i - 1] + 1 : 0);
      if (gap > 0) spans.append(make("span", "gap", `⋯ ${gap} without log-prob ⋯`));
      const span = make("span", "token", text);
      span.dataset.i = i;
      if (rejected.has(i)) span.classList.add("rejected");
      if (invalid.has(i)) span.classList.add("invalid");
      else span.style.setProperty("--heat", `${(100 * strength(completion, i)).toFixed(1)}%`);
      spans.append(span);
      if (text.includes("↵")) spans.append(make("br"));
    });
    return spans;
  }

  // What is known of a completion's answer; older token logs do not have it.
  function judged(completion) {
    const facts = [];
    if (completion.reward !== null) facts.push(`reward ${format(completion.reward)}`);
    if (completion.answer !== null) facts.push(`answer ${completion.answer}`);
    else if (completion.gold !== null && completion.reward !== null) facts.push("no answer found");
    if (completion.gold !== null) facts.push(`gold ${completion.gold}`);
    return facts;
  }

  function card(completion, number) {
    const element = make("article", "completion panel");
    const head = make("h3", "", `Completion ${completion.completion}`);
    const facts = [
      ...judged(completion),
      `${completion.tokens} tokens`, `mean ${format(completion.mean)}`, `max ${format(completion.max)}`,
      `advantage ${format(completion.advantage)}`,
    ];
    if (completion.times > 1) facts.push(`${completion.times} times in the batch`);
    const list = make("ul", "facts");
    list.append(...facts.map((fact) => {
      const item = make("li");
      item.append(make("bdi", "", fact));
      return item;
    }));
    const prompt = make("details");
    prompt.append(make("summary", "", "Prompt"), make("pre", "prompt", completion.prompt));
    const body = make("div", "tokens");
    body.tabIndex = 0;
    body.dataset.completion = number;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", `Tokens of completion ${completion.completion}; arrow keys move between them`);
    body.append(tokenSpans(completion));
    element.append(head, list, prompt, body);
    if (completion.text.length < completion.tokens) {
      element.append(make("p", "note", `The first ${completion.text.length} tokens; the table above covers all.`));
    }
    return element;
  }

  // The table

  function topRow(token) {
    const row = make("tr");
    const place = make("td", "context");
    place.append(make("bdi", "", token.before), make("mark", "", token.text), make("bdi", "", token.after));
    const cells = [
      probability(token.train_logp), probability(token.sampling_logp), token.discrepancy,
      difference(token.train_logp, token.sampling_logp),
    ];
    row.append(place, ...cells.map((value) => make("td", "number", format(value))));
    const where = make("td");
    const number = step.completions.findIndex((completion) => completion.completion === token.completion);
    const at = number < 0 ? -1 : step.completions[number].position.indexOf(token.position);
    const name = `${token.completion}:${token.position}`;
    if (at < 0) {
      where.textContent = name;
    } else {
      const button = make("button", "", name);
      button.type = "button";
      button.addEventListener("click", () => goTo(number, at));
      where.append(button);
    }
    if (token.times > 1) where.append(` ×${token.times}`);
    where.title = `completion ${token.completion}, position ${token.position}, token id ${token.id}`;
    row.append(where);
    return row;
  }

  function goTo(number, i) {
    const body = document.querySelector(`.tokens[data-completion="${number}"]`);
    body.focus({ preventScroll: true });
    select(body.querySelector(`[data-i="${i}"]`));
  }

  // The tooltip

  function show(span) {
    const completion = step.completions[span.parentElement.dataset.completion];
    const i = Number(span.dataset.i);
    const [logPi, logMu] = [completion.train_logp[i], completion.sampling_logp[i]];
    const [pi, mu] = [probability(logPi), probability(logMu)];
    const facts = [
      ["π", format(pi)], ["μ", format(mu)],
      ["|π − μ|", format(pi === null || mu === null ? null : Math.abs(pi - mu))],
      ["log π/μ", format(difference(logPi, logMu))],
    ];
    if (step.metric !== "prob_diff") facts.push([`d (${step.metric})`, format(completion.discrepancy[i])]);
    facts.push(["penalty", format(completion.penalty[i])]);
    const list = make("dl");
    for (const [name, value] of facts) list.append(make("dt", "", name), make("dd", "", value));
    const title = make("p");
    title.append(make("b", "", completion.text[i]), ` id ${completion.id[i]}, position ${completion.position[i]}`);
    tip.replaceChildren(title, list);
    if (span.classList.contains("invalid")) {
      tip.append(make("p", "", "Not valid: counts neither in the loss nor in the discrepancy."));
    }
    if (span.classList.contains("rejected")) tip.append(make("p", "", "Rejected by a rule: not in the loss."));
    shown = span;
    tip.hidden = false;
    place();
  }

  // Above the token, or below it where there is no room; not there while the token is scrolled out of sight.
  function place() {
    if (!shown) return;
    const box = shown.getClientRects()[0];
    tip.hidden = !box || box.bottom < 0 || box.top > innerHeight;
    if (tip.hidden) return;
    const own = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8));
    const above = box.top - own.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
  }

  function hide() {
    tip.hidden = true;
    shown = null;
  }

  function deselect() {
    hide();
    current?.classList.remove("current");
    current = null;
  }

  function select(span) {
    deselect();
    current = span;
    span.classList.add("current");
    span.scrollIntoView({ block: "nearest" });
    show(span);
  }

  // A page that scrolls under a resting pointer is no pointing at what comes to lie there.
  function rests(event) {
    const still = event.screenX === pointer.x && event.screenY === pointer.y;
    [pointer.x, pointer.y] = [event.screenX, event.screenY];
    return still;
  }
  for (const name of ["pointermove", "pointerdown"]) addEventListener(name, rests, { passive: true });

  // Back to the selected token, if there is one.
  function leave() {
    if (current) show(current);
    else hide();
  }

  const completions = find("completions");
  completions.addEventListener("pointerover", (event) => {
    if (rests(event)) return;
    if (event.target.classList.contains("token")) show(event.target);
    else leave();
  });
  completions.addEventListener("pointerleave", (event) => {
    if (!rests(event)) leave();
  });
  completions.addEventListener("click", (event) => {
    if (event.target.classList.contains("token")) select(event.target);
  });
  completions.addEventListener("focusout", deselect);
  completions.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    const body = event.target.closest(".tokens");
    if (event.key === "Escape") deselect();
    if (!body || !(event.key in moves)) return;
    event.preventDefault();
    const spans = [...body.querySelectorAll(".token")];
    const next = current ? spans.indexOf(current) + moves[event.key] : 0;
    if (spans[next]) select(spans[next]);
  });
  addEventListener("scroll", place, { passive: true, capture: true });

  // What is shown

  function render() {
    deselect();
    find("token-asked").hidden = true;
    const { completions: chosen, total, scale } = step;
    find("token-scale-top").textContent = `${format(scale[shade])} and more`;
    find("token-scale").setAttribute("aria-label", `Shading from 0 to the 99th percentile, ${format(scale[shade])}`);
    find("token-summary").textContent =
      `Step ${step.step} of ${report.runs[step.run]}: ${total.completions} completions, ${total.different} of them ` +
      `different, ${chosen.length} shown; ${total.tokens.toLocaleString("en")} tokens; d is ${step.metric}. The shading is full at the 99th ` +
      "percentile of the step. Dotted and grey: not valid. Struck through: rejected by a rule. ↵ stands for a newline, ⟨U+…⟩ for what cannot be seen.";
    find("top-tokens").replaceChildren(...step.top[shade].map(topRow));
    find("top-none").hidden = step.top[shade].length > 0;
    completions.replaceChildren(...chosen.map(card));
    for (const element of document.querySelectorAll("[data-token-figure]")) {
      const figure = step.figures[element.dataset.tokenFigure];
      element.closest("figure").hidden = !figure;
      if (figure) Charts.draw(element, figure);
    }
  }

  const choice = find("token-step");
  steps.forEach((item, index) => {
    const name = report.runs.length > 1 ? `${report.runs[item.run]}, step ${item.step}` : String(item.step);
    choice.append(new Option(item.why.length ? `${name} (${item.why.join(", ")})` : name, index));
  });
  choice.addEventListener("change", () => { step = steps[Number(choice.value)]; render(); });
  find("token-controls").addEventListener("change", (event) => {
    if (event.target.name === "shade") { shade = event.target.value; render(); }
  });
  // The step nearest to the one that was clicked on in a chart, of the same run where it has any.
  document.addEventListener("step-asked", ({ detail }) => {
    const own = steps.filter((item) => item.run === detail.run);
    const distance = (item) => Math.abs(item.step - detail.step);
    step = (own.length ? own : steps).reduce((best, item) => (distance(item) < distance(best) ? item : best));
    choice.value = steps.indexOf(step);
    render();
    const asked = find("token-asked");
    asked.hidden = false;
    asked.textContent = step.step === detail.step
      ? `Step ${step.step}, which you clicked on.`
      : `You clicked on step ${detail.step}: step ${step.step} is the nearest of those shown here.`;
    find("tokens").scrollIntoView();
    choice.focus({ preventScroll: true });
  });
  find("token-controls").addEventListener("submit", (event) => event.preventDefault());
  render();
})();
