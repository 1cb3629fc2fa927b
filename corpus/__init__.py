"""From texts to rows of token ids, on the disk and in memory.

    tokens.py          the special tokens, the tokenizer, rows of ids cut, told apart and padded
    files.py           the texts of .txt, .jsonl and .parquet files
    sources.py         where stories come from: the hub, files, the story maker
    sample_stories.py  the story maker
    sentences.py       where the sentences of a text begin and end
    conditions.py      conditions in words as rows of ids
    image_files.py     pictures of files
    pictures.py        the pictures of the rows, written and read
    scenes.py          emoji: stories about them, and scenes composed of them
    vocabulary.py      a vocabulary learned, and texts cut into it
    shards.py          the writer of a data folder
    rows.py            its reader, and batches of rows of like length

For every other folder but cli; sampling takes tokens.py alone, and network too, but for
network/encoders.py, which reads conditions. Nothing here imports more of ours than cli, or torch:
data are prepared, and a Jetson reads tokens, without it.
"""
