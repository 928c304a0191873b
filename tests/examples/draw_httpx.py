"""With httpx over HTTP/2 without TLS, where the server is next door: all digits at once on one connection."""

import asyncio
import pathlib
import sys

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:5000"
folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ".")


async def main():
    async with httpx.AsyncClient(base_url=url, http1=False, http2=True, timeout=300) as client:
        sheet = client.post("/v1/generate", json={"digits": "2026", "seed": 1, "scale": 2})
        seven = client.get("/v1/digits/7", params={"seed": 42, "scale": 8})
        sheet, seven = await asyncio.gather(sheet, seven)
    for name, answer in {"year.png": sheet, "seven.png": seven}.items():
        answer.raise_for_status()
        assert answer.http_version == "HTTP/2"
        (folder / name).write_bytes(answer.content)


asyncio.run(main())
