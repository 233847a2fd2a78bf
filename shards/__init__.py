"""Data: from users' files to shards, and from shards to the bytes of a batch.

sources/       readers of users' files: image records
format/        what is built of them: tars, tables, manifest; building and verifying
store/         folders and S3, the verified node cache, fetching ahead
order/         which pairs come when: permutation, streams, sampler, look-ahead
dataset.py     opened data sets: where a pair lies, gathers into batches
webdataset.py  our data sets as a webdataset pipeline, for other people's loops
arguments.py   types of command-line arguments
urls.py        URLs as people may see them
processes.py   processes that work for another one: they end with it
progress.py, errors.py, json_files.py
"""
