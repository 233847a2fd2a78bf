"""Bytes: folders and S3, and the node's cache of what is there.

places.py      what a URL names, checked before a store is asked
s3.py          a process's connections to S3
retry.py       which faults are tried again, for how long
objects.py     whole files by URL, in a folder or on S3
create.py      objects that only one of several writers can create
stored.py      where a file is, and what it must be
atomic.py      files that are whole as soon as they are seen
folders.py     folders that go with the process that owns them
locks.py       locks between the processes of a node
cache.py       verified files under the name of their content, within a byte limit
prefetch.py    the shards of a process: mapped, and fetched ahead of use
"""
