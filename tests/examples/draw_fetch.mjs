// With fetch, in Node.js 20 or newer, Deno, Bun or a browser: a sheet, and records as they happen.
import { writeFile } from "node:fs/promises";

const [url = "http://localhost:5000", folder = "."] = process.argv.slice(2);

const answer = await fetch(`${url}/v1/generate`, {
  method: "POST",
  headers: { "content-type": "application/json", accept: "image/png" },
  body: JSON.stringify({ digits: "2026", seed: 1, scale: 2 }),
});
if (!answer.ok) throw new Error((await answer.json()).detail);
await writeFile(`${folder}/year.png`, new Uint8Array(await answer.arrayBuffer()));

// To give up, abort: the server then stops drawing.
const stop = new AbortController();
const stream = await fetch(`${url}/v1/digits/7?seed=42&scale=8`, {
  headers: { accept: "application/x-ndjson" },
  signal: stop.signal,
});
if (!stream.ok) throw new Error((await stream.json()).detail);
let text = "";
let last;
for await (const part of stream.body.pipeThrough(new TextDecoderStream())) {
  const lines = (text + part).split("\n");
  text = lines.pop();
  for (const line of lines) {
    last = JSON.parse(line);
    if (last.type === "loading") console.log(`loading: ${last.bytes_arrived} of ${last.bytes_total} bytes`);
    if (last.type === "digit") await writeFile(`${folder}/seven.png`, Buffer.from(last.png, "base64"));
    if (last.type === "error") throw new Error(last.problem.detail);
  }
}
if (last?.type !== "done") throw new Error("the answer was cut");
