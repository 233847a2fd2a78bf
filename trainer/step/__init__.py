"""What one optimizer step is made of, in the order in which it happens.

sync.py        what all ranks agree on before it
mixture.py     which sets and objectives its pairs serve, planned and counted
copying.py     what goes to the device, behind the step before
train_step.py  forward, backward, update
laps.py        how long each of these takes
guard.py       what is said where a loss or a gradient is not finite
engine.py      the DeepSpeed engine that does it
optimizer.py   Adam in two kinds, weight-decay groups, the learning rate
"""
