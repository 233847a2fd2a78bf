"""Data sets to data sets: what can be done with one that is there.

merge.py      several as one, tars copied byte for byte
subset.py     a part of one, or all of it dealt to several; filters.py: which images and sentences
transfer.py   a whole one to another place, resumable: push and pull
overlap.py    images that several have
index.py      a manifest for tars of others, which stay as they are
migrate.py    one of an older version or layout as one of the present
copying.py    files copied and hashed on the way; reading.py: records of a data set that is there
rewriting.py  records to shards as a build writes them

Each reads by hash, writes to a folder of its own, and commits with the manifest alone.
"""
