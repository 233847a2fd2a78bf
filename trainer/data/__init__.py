"""From a sampler's plans to batches, ahead of the step.

batch.py           a plan's pairs: gather, then draw masks, sentences and answers
loader.py          this rank's micro-batches of the steps to come, in processes if wanted
shared_batches.py  the memory in which they cross from process to process
preload.py         what loader processes share from their start
"""
