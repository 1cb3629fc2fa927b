"""How good a model is, and how fast: what evaluate.py and benchmark.py run.

    held_out.py        a checkpoint opened beside held-out rows, and the flags for that
    likelihood.py      the likelihood bound and the diversity of samples
    samplers.py        samplers compared, at each number of network evaluations
    infilling.py       the middle sentence of real stories filled in
    blocks.py          left to right, in blocks, verified, by rows: what each costs and gives
    condition.py       what a condition is worth, by condition_pairs.py (texts and conditions),
                       condition_likelihood.py (by reader) and condition_texts.py (at each guidance)
    pictures.py        what a picture is worth
    curves.py          the curves of training runs, and several in one figure
    quality.py         perplexity under the twin as a judge, diversity
    coherence.py       repetition, names from nowhere, sentences that are improbable
    overlap.py         how much of a text stands in the training text
    paired.py          arms that are timed in turn, in one process
    training_speed.py  a training step against textbook ones
    sampling_speed.py  whole stories filled, against ancestral samplers
    writing_speed.py   stories from the left, against a plain cached loop
    device.py          an exported step, where it runs; without torch
    roofline.py        what a device could do at best, worked out

For evaluate.py, benchmark.py and train_long.py. It imports training, kinds
and what is below them, and jetson.engine_runtime, whose sessions device.py times.
"""
