useradd vera
useradd paula
mkdir -p /srv/team
touch /srv/team/budget.csv /srv/team/plan.txt
chown vera /srv/team/budget.csv
chown paula /srv/team/plan.txt
