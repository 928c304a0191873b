#!/usr/bin/env bash
# With curl: one digit, a sheet, and the records of a drawing as they happen.
set -euo pipefail
url=${1:-http://localhost:5000} folder=${2:-.}

curl --fail-with-body --silent --show-error --retry 5 -o "$folder/seven.png" "$url/v1/digits/7?seed=42&scale=8"
curl --fail-with-body --silent --show-error --retry 5 -o "$folder/year.png" "$url/v1/generate" \
    -H 'content-type: application/json' -d '{"digits": "2026", "seed": 1, "scale": 2}'

# -N: nothing is held back. The last record is `done`, or the answer was cut.
curl -N --fail-with-body --silent --show-error "$url/v1/digits/7?seed=42" -H 'accept: application/x-ndjson' |
    sed -E 's/"png":"[^"]*"/"png":"..."/' | tee "$folder/records.ndjson" | tail -n 1 | grep -q '"type":"done"'
