"""What a trained model does with pairs of a data set, on one page to look at.

choose.py    which pairs: drawn, or named
look.py      what the model makes of a record's sentences: attention, answers, what was masked
example.py   a pair's row in the list: kind of question, type of answer, right or wrong
page.py      what a page holds of an image record and its pairs, as page.js reads it
make.py      an image record with its pairs: read, looked at, told to the page
show.py      from a checkpoint and a data set to the page: page.html, page.css, attention.js and
             page.js around it
"""
