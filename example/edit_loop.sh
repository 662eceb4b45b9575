#!/usr/bin/env bash
# One rule of a prompt is changed. How long does it take to bring the adapter up to date, and what is lost?
#
#     bash example/edit_loop.sh PROMPT SED_SCRIPT [flags of genpi.py]
#     bash example/edit_loop.sh os.txt 's/`halt`/`nope`/'
#
# Made are runs/first (of PROMPT), runs/edited (of the edited prompt, --from runs/first, one epoch) and
# runs/fresh (of the edited prompt, from nothing). The report of runs/edited says what the edit changed, how
# many of these turns the adapter has right, and rule by rule what was gained and lost. The last lines are the
# seconds of synthesis and training.
set -euo pipefail
prompt=$(realpath "$1")
script=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mkdir -p runs
sed "$script" "$prompt" > runs/edited.txt
if cmp -s "$prompt" runs/edited.txt; then
    echo "error: $script changes nothing in $prompt; give a sed script that does" >&2
    exit 2
fi
python genpi.py "$@" --prompt "$prompt" --task os --out runs/first
python genpi.py "$@" --prompt runs/edited.txt --task os --out runs/edited --from runs/first --epochs 1
python genpi.py "$@" --prompt runs/edited.txt --task os --out runs/fresh
grep -H "^spent" runs/{first,edited,fresh}/report.md
