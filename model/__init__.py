"""The network and what it is trained to predict. Imports nothing else of this project.

In the order that a batch passes:

config.py       the sizes of a model
batch.py        what one forward takes
packing.py      sequences one after the other in packed rows
attention.py    attention among packed rows, over true lengths
joined.py       one product of matrices for query, key and value
dropout.py      dropout, cheap on the CPU
layers.py       residuals, FFN, embeddings, and the layers made of them
top_down.py     what the paper compares the cross-modality encoder with
trunk.py        the three encoders: from tokens and regions to hidden vectors
heads.py        from hidden vectors to words, labels, features, answers
objectives/     the losses: one file an objective, and the table of them all
lxmert.py       trunk, heads and objectives together, and random weights

and beside it:

flops.py        operations that a batch takes
interchange.py  weights and sizes from and to Hugging Face's Lxmert and the released files
bert.py         embeddings and language encoder from a BERT
errors.py       the error of this package
"""
