"""Diffusion with a condition: what an encoder adds to a denoiser, plain (diffusion.py) or joint
(block_diffusion.py).

    python train.py --stage 2 --decoder_checkpoint checkpoints/best.pt --data_dir data_pairs
    python train.py --stage 2 --objective joint --decoder_checkpoint joint/best.pt ...

Stage 2 starts from a model without a condition (or from one that has an encoder already), and
trains the encoder, the cross-attention and, with --lora_rank, adapters alone; stage 3 then trains
everything.
"""

from cli import require

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from block_diffusion import JointDiffusion
from diffusion import DiscreteDiffusion
from kinds.files import load_encoder
from kinds.kind import Kind, averaged
from model import ConditionalTransformer, is_of_condition, size_of
from network.encoders import ENCODERS, ConditionEncoder, FrozenEncoder
from network.layers import ModelConfig
from network.lora import PART as ADAPTER
from network.transformer import check_size


class Conditional(Kind):
    """Mixed in before a kind without a condition, `denoiser`: its network and the stages of its
    training become those with one; loss, likelihood and writing stay."""

    denoiser: ClassVar[type[Kind]]
    stages = (2, 3)
    network = ConditionalTransformer
    conditional = True

    def starts_from(self, stage: int) -> tuple[str, ...]:
        return (self.denoiser.name, self.name) if stage == 2 else (self.name,)

    def create(self, config: Any, meta: dict, source: dict | None = None, resumed: bool = False,
               ) -> ConditionalTransformer:
        require(meta.get("condition"), f"{config.data_dir} has no conditions: prepare them with "
                                     "prep_conditional_data.py and name that folder")
        path = config.decoder_checkpoint
        decoder = ModelConfig(**source["model_config"])
        require(resumed or not decoder.lora_rank or config.lora_rank in (0, decoder.lora_rank),
                f"--lora_rank {config.lora_rank}: {path} has adapters already, of rank "
                f"{decoder.lora_rank}, which are trained on; leave it out")
        decoder = dataclasses.replace(decoder, dropout=config.dropout, **(
            {} if decoder.lora_rank else adapter_settings(config)))
        require(meta["seq_len"] <= decoder.max_len, f"{config.data_dir} has rows of up to "
                f"{meta['seq_len']} tokens, {path} was trained on at most {decoder.max_len}")
        weights = averaged(source)
        has_one = source["kind"] == self.name
        if has_one:
            for name in ("encoder_config", "image_encoder"):
                require(getattr(config, name) is None or resumed, f"--{name}: {path} has an "
                                                                  "encoder already; leave it out")
            encoder = restored_encoder(source, weights)
        else:
            encoder = new_encoder(config, decoder, meta["condition"])
        model = self.network(decoder, encoder)
        if resumed:
            return model
        if has_one:
            missing, strange = model.load_state_dict(weights, strict=False)
            if strange or not all(ADAPTER in name for name in missing):
                raise RuntimeError(f"{path}: these are not the weights of this model")
        else:
            model.load_decoder(weights)
            if not config.encoder_config:
                model.start_encoder()
        return model

    @classmethod
    def restore(cls, checkpoint: dict, weights: dict[str, Tensor]) -> ConditionalTransformer:
        config = ModelConfig(**checkpoint["model_config"])
        check_size(config, weights)
        return cls.network(config, restored_encoder(checkpoint, weights))

    def trained(self, stage: int) -> Callable[[str], bool]:
        return is_of_condition if stage == 2 else super().trained(stage)


def adapter_settings(config: Any) -> dict[str, Any]:
    """Fields of the ModelConfig for the adapters of a run with these settings (a TrainConfig)."""
    rank = config.lora_rank
    return {} if not rank else {
        "lora_rank": rank, "lora_alpha": 2.0 * rank if config.lora_alpha is None else
        config.lora_alpha, "lora_targets": ",".join(config.lora_targets)}


class ConditionalDiffusion(Conditional, DiscreteDiffusion):
    """Masked diffusion that attends to a condition."""

    name, denoiser = "conditional", DiscreteDiffusion


class ConditionalJoint(Conditional, JointDiffusion):
    """The joint model that attends to a condition: in both passes, and in every mode."""

    name, denoiser = "conditional_joint", JointDiffusion


def new_encoder(config: Any, decoder: ModelConfig, condition: dict) -> ConditionEncoder:
    """For this denoiser and data, as a run with these settings (a TrainConfig) has it."""
    sort = encoder_class(condition.get("encoder", "text"))
    if config.image_encoder:
        require(sort.of_pictures, f"--image_encoder: {config.data_dir} has no pictures; leave it "
                                  "out")
        if Path(config.image_encoder).suffix != ".pt":
            return FrozenEncoder.from_file(config.image_encoder, decoder, condition)
        encoder = load_encoder(config.image_encoder)
        require(encoder.size == condition["size"], f"--image_encoder {config.image_encoder} reads "
                f"pictures of {encoder.size} x {encoder.size}, {config.data_dir} has them of "
                f"{condition['size']} x {condition['size']}")
        return encoder
    return sort.create(decoder, condition,
                       size_of(config.encoder_config) if config.encoder_config else None)


def restored_encoder(checkpoint: dict, weights: dict[str, Tensor]) -> ConditionEncoder:
    prefix = "encoder."
    own = {name.removeprefix(prefix): weight for name, weight in weights.items()
           if name.startswith(prefix)}
    return encoder_class(checkpoint.get("encoder") or "text").restore(
        checkpoint["encoder_config"], own)


def encoder_class(sort: str) -> type[ConditionEncoder]:
    require(isinstance(sort, str) and sort in ENCODERS, f"conditions of the sort {sort!r} are "
            f"unknown here; this program reads: {', '.join(ENCODERS)}")
    return ENCODERS[sort]
