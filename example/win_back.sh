#!/usr/bin/env bash
# Few samples lose rules of a prompt, the exam names them, --cover wins them back: three seeds.
#
#     bash example/win_back.sh [--prompt FILE] [other flags of genpi.py]
#
# Of each seed three adapters are trained, two of them for 60 steps, and examined on the same held-out inputs:
#
#     many      40 samples as they come
#     few       the first 8 of them
#     covered   these 8, and what --cover adds until 4 samples need each rule; 15 epochs, so 27 to 62 steps
#
# The last two tables put covered beside few, and many beside few: does it take the right samples, or just more?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for seed in 0 1 2; do
    few=(--samples 8 --records "runs/many-$seed")
    python genpi.py "$@" --task os --seed "$seed" --out "runs/many-$seed" --samples 40 --epochs 12
    python genpi.py "$@" --task os --seed "$seed" --out "runs/few-$seed" "${few[@]}" --epochs 60
    python genpi.py "$@" --task os --seed "$seed" --out "runs/covered-$seed" "${few[@]}" --epochs 15 --cover 4
    python evaluate.py --run "runs/covered-$seed" --before "runs/few-$seed"
    python evaluate.py --run "runs/many-$seed" --before "runs/few-$seed"
done
printf '\n8 samples and --cover 4, beside the 8 alone\n\n'
python evaluate.py rules runs/covered-{0,1,2}
printf '\n40 samples as they come, beside the 8 alone\n\n'
python evaluate.py rules runs/many-{0,1,2}
