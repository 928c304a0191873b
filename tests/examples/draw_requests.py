"""With requests: a sheet, and records with the load's progress."""

import base64
import json
import pathlib
import sys

import requests

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:5000"
folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ".")

answer = requests.post(f"{url}/v1/generate", json={"digits": "2026", "seed": 1, "scale": 2}, timeout=300)
answer.raise_for_status()
(folder / "year.png").write_bytes(answer.content)
print("drawn by", answer.headers["x-model"], "with seed", answer.headers["x-seed"])

with requests.get(
    f"{url}/v1/digits/7",
    params={"seed": 42, "scale": 8},
    headers={"accept": "application/x-ndjson"},
    stream=True,
    timeout=300,
) as answer:
    answer.raise_for_status()
    last = None
    for line in answer.iter_lines():
        last = json.loads(line)
        if last["type"] == "loading":
            print(f"loading: {last['bytes_arrived']} of {last['bytes_total']} bytes")
        elif last["type"] == "digit":
            (folder / "seven.png").write_bytes(base64.b64decode(last["png"]))
        elif last["type"] == "error":
            sys.exit(last["problem"]["detail"])
    if last is None or last["type"] != "done":
        sys.exit("the answer was cut")
