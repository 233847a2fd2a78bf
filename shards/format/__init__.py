"""A data set: what it is made of, and how it is built, checked and opened.

In the order data passes, from the record that a source yields to the index that training maps:

    record.py      an image and its sentences; what a source leaves out, reported
    manifest.py    the list of everything in a data set; its fingerprint; written last
    members.py     one table of a record's members, from which all of the following work
    check.py       whether a record keeps to its data set's schema
    tar.py         tars whose bytes depend on their content alone
    tokenizer.py   WordPiece vocabularies: trained, read, applied
    pretrained.py  the vocabulary of a Hugging Face tokenizer
    answers.py     the normal form of answers, and the joint answer table
    sentences.py   sentences as numbers, as a table holds them
    arrays.py      named arrays in a file, mapped without a copy
    table.py       a shard's table: offsets of its members, and its sentences
    staging.py     a folder for a build, and how it is published
    build.py       records -> tars, tables, vocabulary, answers, manifest
    verify.py      every byte against its hash, every member against its table
    index.py       the tables of all shards, merged for training

A new member of a record is a row of `members.MEMBERS` and a field of `record.ImageRecord`.
"""
