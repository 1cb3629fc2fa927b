"""What a network is trained for: its loss, its likelihood, how it is sampled; and its file.

    likelihood.py      batches with hidden tokens, their loss and the nats measured on them
    autoregressive.py  the causal twin
    checkpoints.py     the .pt files of every kind

diffusion.py, the kind that this is all about, belongs to this layer. For training, measuring,
jetson and the scripts. It imports cli, corpus, network, model.py and sampling, and never what
trains or measures.
"""
