"""Training: what a run does between its settings and its checkpoints.

config.py has the settings and trainer.py the run, whose parts stand beside it: building.py (data
and network), steps.py (batches of loader.py, updates of optimizers.py), validation.py, saving.py,
progress.py and log.py. processes.py has what several processes share, compiling.py torch.compile,
speed.py the clocks and counts of operations, memory and energy. slim.py makes a small file of a
checkpoint, and naming.py an encoder of pictures that knows the names of things.

train.py and train_long.py import it, and measuring/ for optimizers, speed, compiling and logs. Of
the top level it imports the libraries model.py and diffusion.py, never a command; and it never
imports measuring or jetson.
"""
