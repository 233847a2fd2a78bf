"""Looking at a data set: what is in it as numbers, one record, a page with all that to browse.

Whatever can be counted from the tables is counted over all shards, one table in memory at a time.
What only the tars tell (boxes, labels, features, words) comes from records that are drawn, each out
of a shard whose hash was checked.

records.py     a data set that is open to be looked at: tables, and records out of the tars
histogram.py   histograms of what streams by
counts.py      what all tables say
sample.py      records that are drawn, and what they say
summary.py     both, and the page if one is asked for
find.py        one record, by id, key or place
names.py       names of object and attribute labels
text.py        summaries and records for a terminal
page.py        the page: page.html, page.css, page.js and summary.js around the data; pictures.py:
               small JPEGs
html.py        what this page and others have in common, with common.css and common.js
"""
