"""Checkpoints: state out of the engine, onto the store, and back at any world size or ZeRO stage.

In the order data passes:

    format.py       what is written: names, the manifest's fields, its JSON and its own hash
    zero_state.py   where DeepSpeed keeps a parameter's master and moments on this rank
    journal.py      what the run consumed: a line a step, written in segments
    schedule.py     when a save is due, and for how long none has landed
    saver.py        a save: copy to host memory, then upload and commit behind the training
    attempts.py     which attempt a job is, and whether a later one has started since
    generations.py  committed checkpoints: commit, prune, list, find, read
    restore.py      the newest whole generation back into an engine
    errors.py       what may be wrong with all of this

A generation exists when its manifest does and the manifest's own hash is right. All else that is
written is an immutable object that a manifest names with size and sha256. Nothing points to the
newest generation: readers list the manifests.
"""
