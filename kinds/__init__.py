"""The kinds of model there are, an object for each: network, loss, likelihood, how it writes.

    kind.py            what every kind answers
    registry.py        the kinds there are, and which one a run or a checkpoint is of
    autoregressive.py  the causal twin
    conditional.py     diffusion and the joint model with a condition
    drafts.py          a joint model whose draft head is in training
    likelihood.py      batches with hidden tokens, their loss and the nats measured on them
    checkpoints.py     the .pt files of every kind
    files.py           .pt files, read without running code from them; encoders in them
    adapters.py        those with what a condition adds to a model, without the model
    opening.py         a checkpoint as what writes stories

diffusion.py, the kind that this is all about, and block_diffusion.py belong to this layer. For
training, measuring, jetson and the scripts. It imports cli, corpus, network, model.py and sampling,
and never what trains or measures.
"""
