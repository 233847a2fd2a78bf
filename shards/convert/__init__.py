"""Users' files → a data set, by any number of processes, on one machine or a cluster.

inputs    which files, and what a recipe says of them
plan      every image and sentence listed, joined and checked, and the parts that follow
part      one part → one shard: the work that is dealt out
convert   the whole: plan, parts in any order, one manifest; goes on where it was killed
pool      parts in processes of this machine
report    what went in and what was left out
"""
