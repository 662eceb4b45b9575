mkdir -p /data/stories
seq 31 | sed 's/$/ nights in the forest/' > /data/stories/forest.txt
seq 40 > /data/stories/queue.txt
seq 5 | sed 's/$/ birds/' > /data/stories/birds.txt
