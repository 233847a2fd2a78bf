"""What a data set consists of, and what makes, checks and reads it.

record.py         the image record: what sources yield
check.py          whether a record keeps to the schema
members.py        the table of a record's members in its tar
tar.py            plain tars, byte for byte the same
tokenizer.py, answers.py   words and answers as numbers; pretrained.py: vocabularies of others
sentences.py      a shard's sentences as arrays
table.py          a shard's table: where members are, sentences as numbers; arrays.py: its file
manifest.py       all shards with hashes, and the fingerprint: the commit point
build.py          records to all of these; staging.py: nothing appears before it is whole
foreign.py        the same of tars that others wrote, used where they are
verify.py         every byte and member against table and manifest
index.py          the tables of all shards, merged: what the hot path looks things up in
"""
