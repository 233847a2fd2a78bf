"""Users' files → a data set, by any number of processes, on one machine or a cluster.

inputs    which files, and what a build takes of them
recipe    a YAML that names the inputs of several data sets, and which images each may have
plan      every image that a build takes, with its sentences, dealt to parts; made by
planning  which lists, joins and checks all inputs before any array is read
couples   two images that share their sentences, built as one record
words     vocabulary, answers and sets
part      one part → one shard, with a receipt: the work that is dealt out
pool      parts in processes of this machine (cluster/convert_on_ray.py: on Ray)
append    the data set that records are added to
convert   the whole: plan, words, parts in any order, one manifest; goes on where it was killed
"""
