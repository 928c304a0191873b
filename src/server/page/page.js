// The page's whole program. It reads the records of POST v1/generate as they arrive and paints what they tell.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form");
let running = null; // the AbortController of the drawing under way
let last = null; // the request that drew what is shown, its seed included
let tab = "curl";

// What the form asks for, as the body of POST v1/generate. Without a seed the server chooses one.
function asked() {
  const body = {
    digits: $("digits").value.trim(),
    count: Number($("count").value) || 1,
    steps: Number($("steps").value),
    guidance: Number($("guidance").value),
    scale: Number($("scale").value),
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

function headers(accept) {
  const headers = { accept, "content-type": "application/json" };
  const key = $("key").value;
  if (key) headers["x-api-key"] = key;
  return headers;
}

// One answer's records, as they arrive.
async function* records(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
  }
}

async function draw(body) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  $("draw").hidden = true;
  $("stop").hidden = false;
  $("after").hidden = true;
  $("problem").hidden = true;
  say("Asking …");
  let closed = false;
  try {
    const response = await fetch("v1/generate", {
      method: "POST",
      headers: headers("application/x-ndjson"),
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    if (!response.ok) {
      fail(await problem(response));
      return;
    }
    let drawn = 0;
    for await (const record of records(response)) {
      if (running !== mine) return;
      switch (record.type) {
        case "queued":
          if (drawn === 0 && !$("sheet").dataset.for?.startsWith(record.request_id)) lay(record);
          if ($("loading").hidden) say(record.waiting > record.digits ? `${record.waiting} digits are waiting …` : "Waiting …");
          break;
        case "loading":
          loading(record);
          break;
        case "started":
          $("loading").hidden = true;
          state("ready", `${record.model} ${record.model_version} is ready`);
          say("Drawing …");
          break;
        case "preview":
          paint(record.index, record.png);
          say(`Step ${record.step} of ${record.steps} …`);
          break;
        case "digit":
          drawn += 1;
          paint(record.index, record.png, record.label);
          say(`${drawn} drawn`);
          break;
        case "done":
          closed = true;
          last = { ...body, seed: record.seed };
          finished(record);
          break;
        case "error":
          closed = true;
          fail(record.problem, record.retry_after);
          break;
      }
    }
    // A stream that was cut has no closing record.
    if (!closed) fail({ title: "The answer broke off", detail: "The connection ended before the last digit. Try again." });
  } catch (error) {
    if (mine.signal.aborted) {
      if (running === mine) say("Stopped.");
    } else {
      fail({ title: "The server cannot be reached", detail: String(error.message || error) });
    }
  } finally {
    if (running === mine) {
      running = null;
      $("draw").hidden = false;
      $("stop").hidden = true;
      $("loading").hidden = true;
      $("sheet").removeAttribute("aria-busy");
      for (const cell of $("sheet").querySelectorAll(".waiting")) cell.classList.remove("waiting");
    }
  }
}

async function problem(response) {
  const after = response.headers.get("retry-after");
  if (response.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
  try {
    const problem = await response.json();
    if (after) problem.detail += ` Try again in ${after} s.`;
    return problem;
  } catch {
    return { title: `The server answered ${response.status}`, detail: response.statusText };
  }
}

// An empty cell for each digit.
function lay({ request_id, digits, columns }) {
  const sheet = $("sheet");
  sheet.dataset.for = request_id;
  sheet.classList.remove("stale");
  sheet.style.setProperty("--columns", columns);
  sheet.style.setProperty("--width", `${Math.min(columns * 10, 56)}rem`);
  sheet.setAttribute("aria-busy", "true");
  sheet.setAttribute("aria-label", "Being drawn");
  sheet.replaceChildren(
    ...Array.from({ length: digits }, () => {
      const cell = document.createElement("canvas");
      cell.width = cell.height = 28;
      cell.className = "waiting";
      return cell;
    }),
  );
}

function paint(index, png, label) {
  const cell = $("sheet").children[index];
  if (!cell || (cell.dataset.label !== undefined && label === undefined)) return;
  if (label !== undefined) cell.dataset.label = label;
  cell.classList.remove("waiting");
  const image = new Image();
  image.onload = () => {
    // A preview that was decoded after its digit comes too late.
    if (label === undefined && cell.dataset.label !== undefined) return;
    cell.width = image.naturalWidth;
    cell.height = image.naturalHeight;
    cell.getContext("2d").drawImage(image, 0, 0);
  };
  image.src = `data:image/png;base64,${png}`;
}

function loading({ model, bytes_arrived, bytes_total, seconds_left }) {
  $("loading").hidden = false;
  const bar = $("progress");
  if (bytes_total > 0) {
    bar.max = bytes_total;
    bar.value = bytes_arrived;
  } else {
    bar.removeAttribute("value");
  }
  const percent = bytes_total > 0 ? Math.floor((100 * bytes_arrived) / bytes_total) : 0;
  const size = bytes_total > 0 ? `${megabytes(bytes_arrived)} of ${megabytes(bytes_total)} MB` : "looking for the weights";
  const left = seconds_left === undefined ? "" : `, ${seconds_left} s left`;
  $("loading-text").textContent = `The container was asleep and is fetching its model: ${size}${left}`;
  state("loading", `${model} is being loaded`);
  say(percent ? `Waking up: ${percent} %` : "Waking up …");
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

function finished(record) {
  const labels = [...$("sheet").children].map((c) => c.dataset.label ?? "").join(" ");
  $("sheet").setAttribute("aria-label", `Handwritten digits: ${labels}`);
  $("after").hidden = false;
  const total = record.timing.total ?? 0;
  say(`${record.digits === 1 ? "One digit" : `${record.digits} digits`} in ${time(total)}, seed ${record.seed}`);
  const parts = [
    ["load", record.timing.load ?? 0],
    ["queue", record.timing.queue ?? 0],
    ["steps", record.timing.steps ?? 0],
  ];
  parts.push(["rest", Math.max(0, total - parts.reduce((sum, [, ms]) => sum + ms, 0))]);
  $("timing").replaceChildren(
    ...parts
      .filter(([, ms]) => ms >= total / 200)
      .map(([name, ms]) => {
        const part = document.createElement("span");
        part.style.flexGrow = ms;
        part.style.flexBasis = "0";
        part.textContent = `${name} ${time(ms)}`;
        part.title = part.textContent;
        return part;
      }),
  );
  code();
}

const time = (ms) => (ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function fail(problem, retryAfter) {
  $("loading").hidden = true;
  const box = $("problem");
  const title = document.createElement("strong");
  title.textContent = problem.title ?? "Something went wrong";
  const detail = document.createElement("span");
  detail.textContent = (problem.detail ?? "") + (retryAfter ? ` Try again in ${retryAfter} s.` : "");
  const id = document.createElement("small");
  if (problem.request_id) id.textContent = ` (request ${problem.request_id})`;
  box.replaceChildren(title, detail, id);
  box.hidden = false;
  $("sheet").classList.add("stale");
  if (!$("sheet").querySelector("[data-label]")) $("sheet").replaceChildren();
  say("");
}

const say = (text) => {
  $("said").textContent = text;
};

function state(kind, text) {
  document.querySelector("#model .dot").className = `dot ${kind}`;
  $("model-text").textContent = text;
}

async function save(accept, extension) {
  if (!last) return;
  say("Preparing the download …");
  try {
    const response = await fetch("v1/generate", { method: "POST", headers: headers(accept), body: JSON.stringify(last) });
    if (!response.ok) {
      fail(await problem(response));
      return;
    }
    const url = URL.createObjectURL(await response.blob());
    const link = document.createElement("a");
    link.href = url;
    link.download = `${last.digits.replace(/[^\w-]+/g, "_") || "digits"}-${last.seed}.${extension}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say(`Saved ${link.download}`);
  } catch (error) {
    fail({ title: "The download failed", detail: String(error.message || error) });
  }
}

// The same request in other languages, with the seed that drew what is shown.
function code() {
  const body = asked();
  if (last && JSON.stringify({ ...last, seed: 0 }) === JSON.stringify({ ...body, seed: 0 })) body.seed = last.seed;
  const url = new URL("v1/generate", location.href).href;
  const json = JSON.stringify(body);
  const inShell = json.replaceAll("'", "'\\''");
  const pretty = JSON.stringify(body, null, 4);
  const texts = {
    curl: `curl -o digits.png '${url}' \\\n  -H 'accept: image/png' \\\n  --json '${inShell}'`,
    python: `import requests\n\nanswer = requests.post("${url}", json=${pretty}, timeout=300)\nanswer.raise_for_status()\nopen("digits.png", "wb").write(answer.content)`,
    javascript: `const answer = await fetch("${url}", {\n  method: "POST",\n  headers: { "content-type": "application/json", accept: "image/png" },\n  body: JSON.stringify(${pretty.replaceAll("\n", "\n  ").replaceAll("    ", "  ")}),\n});\nif (!answer.ok) throw new Error((await answer.json()).detail);\nconst png = await answer.blob();`,
  };
  $("code").textContent = texts[tab];
}

function choose(name) {
  tab = name;
  for (const button of document.querySelectorAll("[role=tab]")) {
    const chosen = button.id === `tab-${name}`;
    button.setAttribute("aria-selected", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
  $("code").setAttribute("aria-labelledby", `tab-${name}`);
  code();
}

async function copy() {
  const text = $("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS there is no clipboard: the text is selected instead.
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// What the model is, and its own defaults. Asking does not wake it.
async function models() {
  try {
    const response = await fetch("v1/models", { headers: headers("application/json") });
    if (!response.ok) {
      state("failed", (await problem(response)).title);
      return;
    }
    const { models } = await response.json();
    const model = models.find((m) => m.state === "ready") ?? models[0];
    if (!model || running) return;
    if (model.ready) {
      $("steps").value = model.ready.default_steps;
      $("guidance").value = model.ready.default_guidance;
      outputs();
      state("ready", `${model.name} is ready: ${(model.ready.parameters / 1e6).toFixed(1)} million parameters on ${model.ready.device}`);
    } else if (model.error) {
      state("failed", `${model.name} could not be loaded`);
    } else {
      state(model.state, model.state === "cold" ? `${model.name} is asleep; the first drawing wakes it` : `${model.name} is being loaded`);
    }
  } catch {
    state("failed", "The server cannot be reached");
  }
}

function outputs() {
  for (const name of ["steps", "guidance", "scale"]) {
    const value = $(name).value;
    $(`${name}-value`).textContent = name === "guidance" ? Number(value).toFixed(1) : value;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const body = asked();
  if (!body.digits) {
    $("digits").focus();
    return;
  }
  draw(body);
});
form.addEventListener("input", () => {
  outputs();
  code();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("dice").addEventListener("click", () => {
  $("seed").value = "";
  code();
});
$("again").addEventListener("click", () => {
  if (!last) return;
  $("seed").value = last.seed;
  code();
});
$("save-png").addEventListener("click", () => save("image/png", "png"));
$("save-apng").addEventListener("click", () => save("image/apng", "apng.png"));
$("copy").addEventListener("click", copy);
$("key").addEventListener("change", models);
const tabs = [...document.querySelectorAll("[role=tab]")];
tabs.forEach((button, i) => {
  button.addEventListener("click", () => choose(button.id.slice(4)));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next.id.slice(4));
    next.focus();
  });
});

outputs();
code();
models();
