"""Which pairs come when: pure functions of (seed, epoch, position), in the order of their use.

draws.py            counter-based random bits
permutation.py      one epoch's order: position -> (shard, index)
settings.py         the section `sampler` of a configuration
modes/              families of steps, and what each draws from
streams.py          endless orders over parts of the data, with exact shares
apportionment.py    how many pairs come from each, who takes a step
sampler.py          steps ahead of a state, and which pairs a step takes
lookahead.py        which shards are needed next, how many bytes at once
shuffle_quality.py  how good a shuffle is, predicted and measured
"""
