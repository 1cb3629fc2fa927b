"""The optimizer steps of a run: batches, gradients, learning rate and average. A library:
training/trainer.py takes steps with it, and train_long.py times some.
"""

from cli import Stopped

import math
from pathlib import Path

import torch
from torch import Tensor

from training.building import StageData, StageModel
from training.config import TrainConfig
from training.loader import Batch, BatchLoader, step_seed
from training.optimizers import make_optimizers, move_average, whole
from training.processes import Processes, spread_state, whole_state
from training.progress import Progress
from training.speed import Speedometer, train_flops


class Steps:
    """Takes the steps of a run, from its start or from the content of a last.pt.

    Everything random in a step comes from the seed and its number, `progress.step`: a run that is
    resumed needs no other state than that of `state`, the progress, and the loader's cursor.
    """

    def __init__(self, config: TrainConfig, data: StageData, network: StageModel,
                 progress: Progress, processes: Processes, checkpoint: dict | None = None):
        self.config, self.network = config, network
        self.progress, self.processes = progress, processes
        self.peak_lr = config.peak_lr
        self.warmup = (config.warmup_steps if config.warmup_steps is not None
                       else math.ceil(0.05 * config.max_steps))
        self.optimizers = make_optimizers(network.model, config.optimizer, self.peak_lr,
                                          config.weight_decay, network.precision)
        self.scaler = torch.amp.GradScaler(network.device.type,
                                           enabled=network.precision == "fp16")
        if checkpoint:
            self.restore(checkpoint)
        self.loader = BatchLoader(
            data.rows, config.batch_tokens, config.seed, network.kind.corrupt_batch, progress.step,
            checkpoint["cursor"] if checkpoint else None, network.conditions,
            config.drops_conditions,
            network.model.encoder if network.conditions is not None else None)
        self.speed = Speedometer(math.inf)  # the machine's peak is measured when the run begins

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to min_lr_ratio, for the step with this number."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.config.max_steps - self.warmup)
        low = self.config.min_lr_ratio
        return self.peak_lr * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    def take(self) -> dict:
        """One optimizer step; returns its metrics. A non-finite loss changes no weight: Stopped."""
        # The global batch, its tokens hidden already. Dropout's noise comes from (seed, step) too:
        # nothing random has to be stored for resuming.
        batch = self.loader.next()
        torch.manual_seed(step_seed(self.config.seed, self.progress.step, self.processes.rank))
        # After the one reading of the step every process decides by the same numbers.
        sums = self.processes.sum(self.gradients(batch))
        loss, norm = (value / self.processes.world for value in (sum(sums[:-1]), sums[-1]))
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)  # a step to be skipped
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise Stopped(f"the loss is not finite at step {self.progress.step} (loss {loss}, "
                          f"gradient norm {norm}); {Path(self.config.checkpoint_dir) / 'last.pt'} "
                          "holds the last good state: lower --lr and --resume")
        lr = self.learning_rate(self.progress.step)
        self.update(lr, overflow)
        self.update_average()
        self.progress.step += 1
        self.progress.tokens_seen += batch.tokens
        corrupted = batch.corrupted
        condition, (rows, length) = corrupted.condition, corrupted.tokens.shape
        # a pass without gradient counts a third
        passes = corrupted.passes + self.network.kind.first_passes * corrupted.noisy_share * (
            self.config.self_conditioning / 3)
        self.speed.count(batch.tokens, train_flops(
            self.network.model, rows * passes, length, batch.predicted,
            0 if condition is None else self.network.model.encoder.places(condition),
            0 if condition is not None else corrupted.left_out))
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    def gradients(self, batch: Batch) -> Tensor:
        """Leaves the clipped gradients of a global batch in the parameters, micro-batch by
        micro-batch; the losses' weights already add up to the mean.

        Returns (micro-batches + 1,), on the device, for reading it would wait: this process's
        shares of the loss, and the norm before clipping.
        """
        network, shares = self.network, []
        network.model.train()
        parts = list(self.processes.own_rows(len(batch.corrupted.tokens),
                                             self.config.grad_accum_steps))
        for i, (part, factor) in enumerate(parts):
            network.synchronise_gradients(i == len(parts) - 1)  # with the last one only
            share = network.loss_of(batch.corrupted[part].to(network.device),
                                    self.progress.step) * factor
            self.scaler.scale(share).backward()
            shares.append(share.detach())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(network.model.parameters(),
                                                    self.config.grad_clip or math.inf))
        return torch.stack([*shares, norm])

    def update(self, lr: float, overflow: bool) -> None:
        """Moves the weights by their gradients, which are forgotten; not after an `overflow`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not overflow:  # the scaler asks each optimizer's gradients alone; all must skip
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()

    def update_average(self) -> None:
        average, model, step = self.network.average, self.network.model, self.progress.step
        if average is not model:
            # Early on a long memory would only remember the initialisation.
            move_average(average, model, min(self.config.ema_decay, (1 + step) / (10 + step)))

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> dict:
        """What only a last.pt has: whole tensors (a collective call), so that any number of
        processes can go on from it."""
        return {"optimizer": [whole_state(optimizer.state_dict())
                              for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: dict) -> None:
        """Takes what `state` gave, with the weight decay that this run is given."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(spread_state(state, optimizer))
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        if checkpoint["scaler"]:  # empty if the run was not in FP16 until now
            self.scaler.load_state_dict(checkpoint["scaler"])
