"""How stories are drawn: the loop that uncovers [MASK], and the rows that it begins with.

    sampler.py   the settings of a sampler, and the presets
    noise.py     random numbers that depend on seed, row and step alone
    paces.py     how many tokens in a step, and which to hide again
    loop.py      the loop, over any step
    drawing.py   distributions over tokens, exact draws, and drafts that are verified
    draft_head.py  drafts of a model's draft head
    left_to_right.py  writing from the left: token by token, in blocks, in verified drafts
    source.py    what writes stories, however it was opened
    stories.py   stories from the left: what is asked, prompts, batches, text while it grows
    rows.py      the rows to fill: blank stories, prompts, gaps, words that they cut
    viewer.py    how a story was uncovered, as a page or a GIF
    viewer.html  that page
    cached.py    a torch model behind a cache, for writing from the left
    step.py      the step of a torch model: which positions, which tokens

For kinds and all above them. All but cached.py and step.py need no torch, for a Jetson runs them
too, and import cli and corpus.tokens alone; these two import network as well, and never model.py:
any network will do that has its methods.
"""
