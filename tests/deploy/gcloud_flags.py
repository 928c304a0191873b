"""Writes gcloud.json, the flags of the gcloud commands that the deploy script calls, from the tables of an installed SDK.

    python3 tests/deploy/gcloud_flags.py          # says whether gcloud.json is what the SDK has
    python3 tests/deploy/gcloud_flags.py --write
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

FILE = Path(__file__).with_name("gcloud.json")


def sdk_tables() -> Path | None:
    gcloud = shutil.which("gcloud")
    path = gcloud and Path(gcloud).resolve().parent.parent / "data/cli/gcloud_completions.py"
    return path if path and path.exists() else None


def flags(tables: Path, commands: list[str]) -> dict:
    root = runpy.run_path(str(tables))["STATIC_COMPLETION_CLI_TREE"]
    found = {}
    for command in commands:
        node = root
        for word in command.split():
            node = node["commands"][word]
        found[command] = node["flags"]
    return {"sdk": (tables.parent.parent.parent / "VERSION").read_text().strip(), "flags": root["flags"], "commands": found}


def main():
    tables = sdk_tables()
    if not tables:
        sys.exit("no SDK with its tables is installed")
    old = json.loads(FILE.read_text())
    new = flags(tables, list(old["commands"]))
    if "--write" in sys.argv:
        lines = ",\n".join(f"{json.dumps(c)}: {json.dumps(f)}" for c, f in new["commands"].items())
        FILE.write_text(f'{{"sdk": {json.dumps(new["sdk"])},\n"flags": {json.dumps(new["flags"])},\n"commands": {{\n{lines}\n}}}}\n')
    elif new != old:
        sys.exit(f"gcloud.json is of {old['sdk']}; {new['sdk']} is installed and differs: {[c for c in old['commands'] if old['commands'][c] != new['commands'][c]]}")


if __name__ == "__main__":
    main()
