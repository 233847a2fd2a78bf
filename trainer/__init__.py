"""Training: what a run is made of, and its loop.

config.py      the configuration tree
sections.py    its sections, and what every key means
setup.py       what follows from configuration and data: objectives, lengths, the data state
tasks/         what a run is trained for
model.py       the model: random, or from a checkpoint
initial.py     weights of another model to begin from
run_files.py   vocabulary and answer table in a run's folder
loop.py        training, told once
start.py       how an attempt begins: the run is built, claimed, restored
run.py         its verbs: load, step, save, validate, skip, finish
data/          plans to batches, ahead of the step
step/          what one optimizer step is made of
checkpoint/    state onto the store, and back
evaluate.py    metrics over a data set
predict.py     a checkpoint's metrics and files of predictions
partial.py     predictions under way
behaviour.py   scores by kind of question, type of answer, number of objects
kinds.py       the kind of a question, and the type of an answer
scores/        the tasks' official metrics
show/          a page of what a model does
progress.py    what a person sees of a run
device.py      what a worker's device could do, and its memory
profiling.py   traces of some steps
curves.py      TensorBoard's files and the record of steps, in the run's storage
phases.py      how long a rank is at what
timeline.py    the groups of workers that a run has had, in its storage
goodput.py     what part of a run's time is in steps that are kept
live_goodput.py  the same, while it trains
run_status.py  how a run stands, from its storage alone
logs.py        the log's lines
audit.py       proof of what a run consumed
export.py      Hugging Face folders out of checkpoints
universal.py   folders that DeepSpeed's own engines load
ranks.py       what ranks tell each other
"""
