"""Formats of users' files.

regions        what a format of features offers; features/ has them
texts          what a format of sentences offers; sentences/ has them
image_ids      one id for an image that several files name differently
pictures       pictures in a folder, and opening them
checks         what formats check alike
tars           samples of tars, read to a proven end, and
members        values in their members
json_stream    JSON of any size, one item at a time
easy_vqa       the easy-VQA package, as files of these formats
scenes         drawn pictures with sentences, likewise
"""
