mkdir -p /home/ana/garden
for bed in $(seq 23); do
    echo "bed $bed: beans"
done > /home/ana/garden/plan.txt
