mkdir -p /data/stories
seq 31 | sed 's/$/ nights in the desert/' > /data/stories/desert.txt
seq 40 > /data/stories/numbers.txt
seq 5 | sed 's/$/ birds/' > /data/stories/birds.txt
