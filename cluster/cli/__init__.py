"""The command line, `lxscale`: parsers, and what is printed; the work is done elsewhere.

main        all commands from one table, exit statuses
train       `train`: a run on workers
shards      `shards build | verify | info | plan | easy-vqa`: data sets
plan        what `shards plan` reports
audit       `shards audit`: the proof of what a run consumed
evaluate    `evaluate`: the metrics of a checkpoint
goodput     `goodput`: where a run's time went
checkpoint  `checkpoint ls | verify | rm | export`: the generations of a run
demo        `demo`: all of it on easy-VQA
common      arguments and output that several commands share
progress    bars and lines for long work
signals     what Ctrl-C and SIGTERM do at any moment
streams     stdout and stderr that are closed, full or read by nobody
"""
