// Everything is in the page: `data` holds the rows of all ledgers as cells (counts by which stops they pass), see
// report_explorer.py. Of several thresholds that a row fails, the first decides.
for (const chip of all("[data-reason]", $("chips") || document.createElement("p"))) {
  chip.addEventListener("click", () => {
    all("[data-reason]", $("chips")).forEach((one) => one.setAttribute("aria-pressed", one === chip));
    all("section.reason").forEach((one) => { one.hidden = chip.dataset.reason !== "" && one.dataset.reason !== chip.dataset.reason; });
  });
}
for (const link of all('.funnel a')) link.addEventListener("click", () => $("chips").firstElementChild.click()); // none is hidden
if ($("order")) {
  const sheet = $("kept-cards"), cards = all("article", sheet);
  $("order").addEventListener("change", () => {
    const name = $("order").value;
    const value = (card) => data.cards[card.dataset.card].values[name] ?? -Infinity;
    sheet.append(...(name ? [...cards].sort((a, b) => value(b) - value(a)) : cards));
  });
}

if (data.explorer) inflated(data.explorer.cells).then((bytes) => explore(data.explorer, bytes));

async function inflated(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function explore(explorer, bytes) {
  const thresholds = explorer.thresholds, names = thresholds.map((one) => one.name);
  const rows = explorer.rows, column = (n) => bytes.subarray(n * rows, (n + 1) * rows);
  const bins = names.map((_, n) => column(n)), outcomes = column(names.length);
  const counts = new DataView(bytes.buffer, (names.length + 1) * rows);
  const code = Object.fromEntries(explorer.outcomes.map((name, n) => [name, n]));
  const verdicts = thresholds.map((one) => code[one.reason]), isOn = (limits, n) => limits[n] !== thresholds[n].off, face = names.indexOf("min_face_px");
  const seen = (limit) => explorer.factor && limit / explorer.factor >= explorer.seen_px;
  const inputs = names.map((name) => $(`s-${name}`));
  const start = thresholds.map((one) => one.stops.indexOf(one.limit));
  const chosen = (stops) => thresholds.map((one, n) => one.stops[stops[n]]);

  function settled(outcome, limits) {
    return outcome === code.unsure && seen(limits[face]) ? code.no_face : outcome;
  }
  function count(stops) {
    const sums = new Array(explorer.outcomes.length).fill(0), limits = chosen(stops), undecided = 255;
    const judged = new Uint8Array(rows).fill(undecided);
    thresholds.forEach(({ least, off, stops: all }, n) => {
      if (!isOn(limits, n)) return;
      const column = bins[n], stop = stops[n], verdict = verdicts[n], unmeasured = off === null ? -1 : least ? 0 : all.length;
      for (let row = 0; row < rows; row++) {
        if (judged[row] === undecided && (least ? stop >= column[row] : stop < column[row])) judged[row] = column[row] === unmeasured ? code.unmeasured : verdict;
      }
    });
    for (let row = 0; row < rows; row++) {
      sums[judged[row] === undecided ? settled(outcomes[row], limits) : judged[row]] += counts.getUint32(4 * row, true);
    }
    return sums;
  }
  const isWorse = (value, limit, n) => (thresholds[n].least ? value < limit : value > limit);
  const fails = (row, limits, n) => isOn(limits, n) && isWorse(row[n], limits[n], n);
  const verdict = (row, n) => (thresholds[n].off !== null && isWorse(row[n], thresholds[n].off, n) ? code.unmeasured : verdicts[n]);
  function judged(row, limits) {
    for (let n = 0; n < names.length; n++) {
      if (fails(row, limits, n)) return verdict(row, n);
    }
    return settled(row[names.length], limits);
  }
  const ofImages = ["min_image_px", "max_pixels"], isKnown = (value) => Math.abs(value) < 1e299;
  const short = (value) => number(value < 10 ? Number(value.toFixed(2)) : Math.round(value));
  // How far a face is from a threshold that is on, as a share of it: see `distances` in report_explorer.py.
  function distance(row, limits, n) {
    const judged = !ofImages.includes(names[n]) && limits[n] !== thresholds[n].off && isKnown(row[n]) && row[n] > 0;
    return judged ? Math.abs(row[n] / (limits[n] || 1) - 1) : Infinity;
  }
  const nearest = (row, limits) => Math.min(...names.map((_, n) => distance(row, limits, n)));
  // The threshold that decides, else the one that is nearest, and what it judges.
  function described(row, limits) {
    const far = names.map((_, n) => distance(row, limits, n)), failed = names.findIndex((_, n) => fails(row, limits, n));
    const n = failed < 0 ? far.indexOf(Math.min(...far)) : failed, { measure, least } = thresholds[n];
    const words = measure.replace("_px", "").replaceAll("_", " ");
    // What rounds to the threshold, and is not it, would look wrongly judged.
    const value = short(row[n]) === short(limits[n]) ? number(Number(row[n].toFixed(2))) : short(row[n]);
    return isKnown(row[n]) ? `${words} ${value}, ${least ? "at least" : "at most"} ${short(limits[n])}: ` : "";
  }

  const before = count(start), total = before.reduce((sum, one) => sum + one, 0);
  const unjudged = ["passes", "unseen", "unmeasured", "unsure"];
  const percent = (value) => (total ? (100 * value / total).toFixed(1) : "0.0") + " %";
  const cell = (row, text, kind) => { const one = row.insertCell(); one.textContent = text; one.className = kind || ""; };

  function update() {
    const stops = inputs.map((input) => Number(input.value)), limits = chosen(stops), after = count(stops);
    thresholds.forEach(({ name, off, marks }, n) => {
      const words = limits[n] === off ? "any" : number(limits[n]);
      inputs[n].setAttribute("aria-valuetext", words);
      $(`o-${name}`).textContent = words;
      inputs[n].closest(".slider").classList.toggle("changed", stops[n] !== start[n]);
      all(`.mark[data-threshold="${name}"]`).forEach((mark) => {
        mark.hidden = limits[n] === off;
        mark.style.left = `${100 * (mark.classList.contains("mirrored") ? 1 - marks[stops[n]] : marks[stops[n]])}%`;
      });
    });
    const kept = after[code.kept], again = unjudged.reduce((sum, name) => sum + after[code[name]], 0);
    $("kept-now").textContent = `${number(kept)} of ${number(total)} kept for certain (${percent(kept)})`;
    $("kept-bar").style.width = `${100 * kept / (total || 1)}%`;
    $("again-bar").style.width = `${100 * again / (total || 1)}%`;
    $("again").hidden = !again;
    $("again-now").textContent = number(again);
    for (const name of unjudged) { $(`u-${name}`).hidden = !after[code[name]]; $(`n-${name}`).textContent = number(after[code[name]]); }
    const body = $("outcomes"); body.replaceChildren();
    explorer.outcomes.forEach((name, n) => {
      if (!before[n] && !after[n] && n !== code.kept) return;
      const row = body.insertRow(), change = after[n] - before[n];
      cell(row, name); cell(row, number(before[n]), "n"); cell(row, number(after[n]), "n");
      cell(row, change ? (change > 0 ? "+" : "−") + number(Math.abs(change)) : "", "n");
    });
    const changed = names.map((name, n) => [name, limits[n], stops[n] !== start[n]]).filter((one) => one[2]);
    $("toml").textContent = "[filter]\n" + thresholds.map(({ name, off }, n) => (limits[n] === off && stops[n] === start[n] ? "" : `${name} = ${limits[n]}\n`)).join("");
    $("command").textContent = ["python -m pipeline replay DIR", ...changed.map((one) => `--set filter.${one[0]}=${one[1]}`)].join(" ");
    sides(limits);
  }

  function sides(limits) {
    const base = chosen(start);
    const cards = data.cards.map((card, n) => ({ n, row: card.row, old: judged(card.row, base), now: judged(card.row, limits) }));
    for (const { n, old, now } of cards) all(`[data-badge="${n}"]`).forEach((badge) => { badge.textContent = old === now ? "" : `would be: ${explorer.outcomes[now]}`; });
    const pictured = cards.filter(({ n }) => document.querySelector(`[data-card="${n}"] .zoom`)).map((card) => ({ ...card, far: nearest(card.row, limits) }));
    const turned = pictured.filter(({ old, now }) => old !== now).sort((a, b) => a.far - b.far);
    const near = turned.length ? turned : pictured.filter(({ far }) => far < 0.3).sort((a, b) => a.far - b.far);
    $("border-title").textContent = turned.length ? `${turned.length} of the photos below change sides` : near.length ? "The photos below that are nearest to a threshold" : "";
    $("border").replaceChildren(...near.slice(0, 12).map(({ n, old, now }) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      figure.append(document.querySelector(`[data-card="${n}"] .zoom`).cloneNode(true), caption);
      caption.textContent = `${described(data.cards[n].row, limits)}${explorer.outcomes[old]}${old === now ? "" : ` → ${explorer.outcomes[now]}`}`;
      return figure;
    }));
  }

  inputs.forEach((input) => input.addEventListener("input", update));
  $("reset").addEventListener("click", () => { inputs.forEach((input, n) => { input.value = start[n]; }); update(); });
  $("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([$("toml").textContent], { type: "application/toml" }));
    link.download = "thresholds.toml";
    link.click();
  });
  inputs.forEach((input, n) => { input.value = start[n]; });
  update();
}
