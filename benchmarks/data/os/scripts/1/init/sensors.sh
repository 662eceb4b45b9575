mkdir -p /var/sensors
for hour in $(seq 48); do
    if ((hour % 3)); then place=lake; else place=river; fi
    echo "$hour $place $((hour * 7 % 10))"
done > /var/sensors/water.log
