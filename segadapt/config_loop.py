"""Settings of the loop that `train` and `pretrain` share. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import BELOW_ONE, setting


@dataclass
class TrainOptimizerSettings:
    name: str = setting("rule", choices=("adamw", "sgd"))
    lr: float = setting("learning rate of the encoder, which the schedule starts from", low=0)
    head_lr_factor: float = setting("times lr for the head, and for the losses' own parameters", low=0)
    weight_decay: float = setting("decoupled for adamw; none for what `undecayed` names", low=0)
    undecayed: str = setting(
        "norms of the encoder; all norms, embeddings and tables of positions; or all norms and biases",
        choices=("encoder_norms", "norms_and_embeddings", "norms_and_biases"),
    )
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
class LoopSettings:
    """What each training in the loop of training/loop.py has."""

    iters: int = setting("optimizer steps", low=1)
    batch_size: int = setting("images a step, of all processes and micro-batches together", low=1)
    accumulate: int = setting("micro-batches of a step, one after the other in each process", low=1)
    optimizer: TrainOptimizerSettings = setting("what moves the weights")
    schedule: ScheduleSettings = setting("learning rate by step")
    ema_decay: float = setting("of the weights' moving average, which is validated and saved; 0: none", low=0, high=1)
    validate_every: int = setting("steps between validations; the last step always validates", low=1)
    checkpoint_every: int | None = setting(
        "steps between checkpoints, beside those of runtime.checkpoint_seconds; null: no such", low=1
    )
    save_dtype: str = setting("of the saved weights; they are loaded as float32", choices=("float32", "bfloat16"))
