"""Folders and object storage, and what a node keeps of it.

In the order a file passes, from the store to the memory of a process:

    s3.py        a process's connections to S3
    retry.py     which faults are tried again, and for how long
    objects.py   files in a folder or under an s3:// prefix: read, write, list, delete
    stored.py    where a file is and what it must be
    atomic.py    files that are whole as soon as they can be seen
    locks.py     locks between the processes of a node
    folders.py   folders that belong to a process while it lives
    cache.py     verified files under the name of their content; a byte limit
    prefetch.py  shards, mapped, and fetched ahead of use
"""
