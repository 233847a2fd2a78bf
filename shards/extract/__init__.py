"""Pictures → files of features, which `shards.convert` takes as any others.

boxes       where the regions are: a grid, given boxes, or (none) a detector's
coco        boxes in files of annotations as COCO's
network     a detector or a backbone of Hugging Face's: its boxes and its map
maps        the map in what such a model puts out
found       which of a detector's boxes are kept
pooling     features of boxes out of a map
folder      which pictures are done, which failed, what is next
extract     the whole: partitions, tars, what failed
"""
