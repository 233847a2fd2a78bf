"""Checkpoints: state out of the engine, onto the store, and back at any world size or ZeRO stage.

In the order data passes:

    format.py       what is written: names, the manifest's fields, its JSON and its own hash
    zero_state.py   where DeepSpeed keeps a parameter's master and moments on this rank
    journal.py      what the run consumed: a line a step, written in segments
    schedule.py     when a save is due, and for how long none has landed
    saver.py        a save: copy to host memory, then upload and commit behind the training
    process.py      who a process is, and whether it has ended
    lease.py        the file that an owner rewrites every two seconds, for rivals to watch
    chain.py        claims and generations, one after the other: who may commit next
    owner.py        claim a run, commit to it, prune it; or learn that another does
    generations.py  committed checkpoints: list, find, read
    line.py         which of them lead to the newest, and which one a run goes on from
    evidence.py     whether a run without a generation ever had one
    restore.py      the newest whole generation back into an engine
    inspect.py      for people: list, verify and remove generations
    errors.py       what may be wrong with all of this

A generation exists when its manifest does and the manifest's own hash is right. All else that is
written is an immutable object that a manifest names with size and sha256. Nothing points to the
newest generation: readers list the manifests.
"""
