"""A training run: its settings, its steps, its log.

    config.py      the settings
    trainer.py     the steps, validations and checkpoints of a run
    loader.py      batches with hidden tokens, prepared while the network computes
    optimizers.py  Muon, and what it updates
    processes.py   several processes that train one model
    compiling.py   compiled blocks, and the rows that they take
    speed.py       operations of a step, the machine's peak, memory, energy
    log.py         metrics.jsonl, Weights & Biases, the curves of a run

For train.py, train_long.py and measuring, which times its steps and draws its logs. It imports
kinds and what is below them, and never what measures or exports.
"""
