"""What the networks of model.py are built from.

    layers.py       their settings, the linear map, the norm, the precisions
    attention.py    attention to a row and to a condition, with rotary positions
    dropout.py      dropout that keeps nothing for the backward pass
    transformer.py  the block; embedding and blocks
    conditioning.py  what an encoder of conditions is: the seam for their sorts
    encoders.py     those that there are, and the one of text
    image_encoders.py  those of pictures
    edges.py        what these are given of a patch
    lora.py         low-rank adapters beside the matrices
    head_loss.py    vocabulary head and cross-entropy in one, in chunks
    draft_head.py   drafts of what a model would write
    hardware.py     the device to compute on and in which precision

For model.py and whatever runs a network. Nothing here knows of diffusion: it imports cli and
corpus.tokens (what reads conditions more of corpus), and never model.py, which
puts the parts together.
"""
