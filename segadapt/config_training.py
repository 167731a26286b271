"""Settings of training: the segmenter's and the small teachers'. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import (
    BELOW_ONE,
    DataSettings,
    ExperimentSettings,
    GenerativeSettings,
    LoggingSettings,
    RunConfig,
    RuntimeSettings,
    setting,
)


@dataclass
class BroadSettings:
    probability: float = setting("of each operation below, in each crop; 0: none of them", low=0, high=1)
    gamma: float = setting("light: exponent between 2^-x and 2^x", low=0)
    shade: float = setting("light: depth of a smooth field of brightness", low=0, high=2)
    mix: float = setting("colour: largest entry added to the 3x3 channel matrix", low=0)
    grey: float = setting("colour: largest share of grey", low=0, high=1)
    blur_px: float = setting("sharpness: largest standard deviation of an oriented Gaussian, px", low=0)
    sharpen: float = setting("sharpness: largest amount of an unsharp mask", low=0)
    haze: float = setting("haze: largest density of a smooth field of one airlight", low=0, high=1)
    grain: float = setting(
        "grain: largest standard deviation of a cell, of 0..1; interpolation leaves about 0.65 of it", low=0
    )
    grain_min_px: int = setting(
        "grain: smallest cell, px; 1 would be white noise, as in four of the corruptions", low=1
    )
    grain_max_px: int = setting("grain: largest cell, px", low=1)


@dataclass
class AlignSettings:
    weight: float = setting("of 1 - cosine between the teacher's tokens and DINOv2's; 0: off", low=0)
    checkpoint: str | None = setting(
        "DINOv2: hub id, folder, or a .safetensors file with its dinov2*config.json beside it"
    )
    block: int = setting("the teacher's block whose output is aligned, from 0", low=0)


@dataclass
class TrainOptimizerSettings:
    name: str = setting("rule", choices=("adamw", "sgd"))
    lr: float = setting("learning rate of the encoder, which the schedule starts from", low=0)
    head_lr_factor: float = setting("times lr for the head, and for the losses' own parameters", low=0)
    weight_decay: float = setting("decoupled for adamw; norms of the encoder have none", low=0)
    beta1: float = setting("adamw", low=0, high=BELOW_ONE)
    beta2: float = setting("adamw", low=0, high=BELOW_ONE)
    eps: float = setting("adamw", low=0)
    momentum: float = setting("sgd", low=0, high=BELOW_ONE)
    clip_norm: float | None = setting("largest L2 norm of the gradient; null: not clipped", low=1e-9)


@dataclass
class ScheduleSettings:
    kind: str = setting("warm-up and decay one after the other (mmengine), or both from step 0 on (mmcv 1.x)",
                        choices=("chained", "multiplied"))  # fmt: skip
    decay: str = setting("of the rate", choices=("poly", "cosine", "step", "constant"))
    power: float = setting("poly: (1 - progress)^power", low=0)
    min_lr: float = setting("poly, cosine: last rate, the same for all groups", low=0)
    milestones: list[int] = setting("step: the rate is multiplied by gamma from each of these steps on")
    gamma: float = setting("step: factor", low=0, high=1)
    warmup_iters: int = setting("steps of linear warm-up; 0: none", low=0)
    warmup_factor: float = setting("of the rate in the first step of the warm-up", low=0, high=1)
    encoder_warmup_iters: int = setting("the encoder's rate is also multiplied by ((step + 1) / this)^4; 0: not", low=0)
    end: int | None = setting("steps until the decay has ended; null: train.iters", low=1)
    tail: str = setting("a decay that ends before training does: an error, or hold the last rate",
                        choices=("refuse", "hold"))  # fmt: skip


@dataclass
class TrainSettings:
    iters: int = setting("optimizer steps", low=1)
    batch_size: int = setting("images a step, of all processes and micro-batches together", low=1)
    accumulate: int = setting("micro-batches of a step, one after the other in each process", low=1)
    optimizer: TrainOptimizerSettings = setting("what moves the weights")
    schedule: ScheduleSettings = setting("learning rate by step")
    ema_decay: float = setting("of the weights' moving average, which is validated and saved; 0: none", low=0, high=1)
    parallel: str = setting("over the processes of torchrun: copies (DDP), or shards (FSDP2); none: one process",
                            choices=("none", "ddp", "fsdp"))  # fmt: skip
    crop_px: int = setting("side of the square training crop, px", low=16)
    scale_low: float = setting("random resize: smallest factor", low=0.01)
    scale_high: float = setting("random resize: largest factor", low=0.01)
    photometric: bool = setting("random brightness, contrast, saturation and hue")
    balanced: bool = setting("every class is shown by as many crops; false: crops of any place")
    broad: BroadSettings = setting("wide generic changes; in the segmenter's training only as a control")
    validate_every: int = setting("steps between validations; the last step always validates", low=1)
    validation_split: str = setting("split of the validation images")
    validation_images: int | None = setting("images of a validation; null: all", low=1)
    keep: str = setting("weights that are saved: after the last step, or of the best validation mIoU",
                        choices=("last", "best"))  # fmt: skip
    patience: int = setting("training ends after this many validations without a better mIoU; 0: never", low=0)
    checkpoint_every: int | None = setting(
        "steps between checkpoints, beside those of runtime.checkpoint_seconds; null: no such", low=1
    )
    save_dtype: str = setting("of the saved weights; they are loaded as float32", choices=("float32", "bfloat16"))


@dataclass
class TrainGenerativeSettings:
    autoencoder_iters: int = setting("steps of the autoencoder; 0: it is given", low=0)
    autoencoder_lr: float = setting("AdamW learning rate of the autoencoder", low=0)
    kl_weight: float = setting("weight of the autoencoder's KL term", low=0)
    iters: int = setting("optimizer steps of the transformer", low=1)
    batch_size: int = setting("windows a step", low=1)
    prompts_per_window: int = setting("classes compared at each window, mostly present ones", low=2)
    lr: float = setting("AdamW learning rate", low=0)
    weight_decay: float = setting("decoupled", low=0)
    warmup_iters: int = setting("linear warm-up steps; cosine decay to 0 after", low=0)
    ema_decay: float = setting("exponential moving average of the saved weights; 0: none", low=0, high=1)
    flow_mask: bool = setting("the flow loss counts only the pixels of the prompted class; false: all pixels")
    comparing_weight: float = setting("weight of the class-comparing term beside the flow loss", low=0)
    comparing_scale: float = setting("initial inverse temperature of the class-comparing term", low=1e-6)
    sigma_low: float = setting("smallest noise level drawn", low=1e-6, high=1)
    sigma_high: float = setting("largest noise level drawn", low=1e-6, high=1)
    sigma_distribution: str = setting("between the two: uniform, or the logistic of a standard normal",
                                      choices=("uniform", "logit_normal"))  # fmt: skip
    null_share: float = setting("share of windows that also train the null prompt", low=0, high=1)
    tokens: int = setting("length of a learned class embedding", low=1)
    balanced: bool = setting("every class is shown by as many crops; false: crops of any place")
    broad: BroadSettings = setting("wide generic changes, so that the teacher has seen more than the segmenter")
    align: AlignSettings = setting("representation alignment")
    lora_rank: int = setting("train low-rank adapters on a frozen checkpoint, saved merged; 0: all weights", low=0)
    lora_alpha: float = setting("the adapters' product is scaled by alpha / rank", low=1e-6)
    scale_low: float = setting("random resize: smallest factor", low=0.01)
    scale_high: float = setting("random resize: largest factor", low=0.01)
    validate_every: int = setting("steps between validations; the last step always validates", low=1)
    validation_split: str = setting("split of the validation images")
    validation_images: int = setting("images of a validation", low=1)
    save_dtype: str = setting("of the saved weights; they are loaded as float32", choices=("float32", "bfloat16"))


@dataclass
class TrainConfig(RunConfig):
    train: TrainSettings = setting("training of the segmenter")


@dataclass
class TrainedGenerativeModelSettings:
    generative: GenerativeSettings = setting("the teacher")


@dataclass
class TrainGenerativeConfig:
    experiment: ExperimentSettings = setting("the run")
    data: DataSettings = setting("the images")
    model: TrainedGenerativeModelSettings = setting("the teacher")
    logging: LoggingSettings = setting("records")
    runtime: RuntimeSettings = setting("device and precision")
    train: TrainGenerativeSettings = setting("training of the teacher")
