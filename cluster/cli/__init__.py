"""The command line, `lxscale`: parsers, and what is printed; the work is done elsewhere.

main        all commands from one table, exit statuses
train       `train`: a run on workers
submit      `submit`: a run as a job of a Ray cluster
resubmit    `resubmit`: the same from the run's storage alone
watch       `watch`: jobs until the run is done
logs        `logs`: what a job says
stop        `stop`: have a job save and end
status      `status`: how a run stands
runs        `runs`: how all of a storage stand
shards      `shards build | verify | info | plan | easy-vqa`: data sets
plan        what `shards plan` reports
audit       `shards audit`: the proof of what a run consumed
evaluate    `evaluate`: the metrics of a checkpoint
predict     `predict`: its answers as a file
score       `score`: a file of answers against a task's annotations
show        `show`: what it does, on a page
compare     `compare`: a table of runs
goodput     `goodput`: where a run's time went
checkpoint  `checkpoint ls | verify | rm | export`: the generations of a run
demo        `demo`: all of it on easy-VQA
common      arguments and output that several commands share
progress    bars and lines for long work
signals     what Ctrl-C and SIGTERM do at any moment
streams     stdout and stderr that are closed, full or read by nobody
"""
