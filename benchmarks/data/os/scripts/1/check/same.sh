# Is the answer what the example printed?
[ "$(echo $1)" = "$(echo $2)" ]
