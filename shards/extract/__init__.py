"""Pictures → files of features, which `shards.convert` takes as any others.

boxes       where the regions are: a grid, given boxes, or (none) a detector's
network     a detector or a backbone of Hugging Face's: its boxes and its map
pooling     features of boxes out of a map
extract     the whole: partitions, tars, what failed
"""
