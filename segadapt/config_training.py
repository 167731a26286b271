"""Settings of training: the segmenter's and the small teachers'. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import (
    DataSettings,
    EvaluateConfig,
    ExperimentSettings,
    GenerativeSettings,
    LoggingSettings,
    RuntimeSettings,
    setting,
)
from segadapt.config_loop import LoopSettings


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
class TransformSettings:
    resize: str = setting(
        "random factor of a box to fit into, of data.short_side_px, or of the image's own size",
        choices=("box", "short_side", "own"),
    )
    box_long_px: int = setting("resize=box: its long side at factor 1, px", low=16)
    box_short_px: int = setting("resize=box: its short side at factor 1, px", low=16)
    scale_low: float = setting("random resize: smallest factor", low=0.01)
    scale_high: float = setting("random resize: largest factor", low=0.01)
    scale_step: float = setting("random resize: factors are scale_low plus a multiple of this; 0: any", low=0)
    longest_px: int | None = setting("resize=short_side: largest long side, px; null: any", low=16)
    aspect_low: float = setting("random resize: smallest factor on width / height", low=0.1, high=10)
    aspect_high: float = setting("random resize: largest factor on width / height", low=0.1, high=10)
    crop_px: int = setting("height of the training crop, px; less where the resized image is smaller", low=16)
    crop_width_px: int | None = setting("width of the training crop, px; null: as crop_px", low=16)
    cat_max_ratio: float = setting(
        "a crop is drawn again, 10 times at most, where one class has this share of it; 1: never", low=0, high=1
    )
    flip: float = setting("share of crops that are mirrored left to right", low=0, high=1)
    photometric: bool = setting("random changes of light with the ranges below, a fair coin each")
    brightness: float = setting("photometric: largest value added or taken, of 0..255; 0: never", low=0, high=255)
    contrast: float = setting("photometric: factor within 1 -/+ this; 0: never", low=0, high=1)
    saturation: float = setting("photometric: factor within 1 -/+ this; 0: never", low=0, high=1)
    hue: int = setting("photometric: from -this to this - 1, in steps of 2 degrees; 0: never", low=0, high=90)
    balanced: bool = setting("every class is shown by as many crops; false: crops of any place")
    broad: BroadSettings = setting("wide generic changes; in the segmenter's training only as a control")
    size_mode: str = setting(
        "of a batch: one size, one of several by chance, the largest crop's, or each its own (batches of 1)",
        choices=("fixed", "multi", "max", "diverse"),
    )
    sizes_px: list[list[int]] = setting("[height, width] of size_mode fixed or multi; []: the crop's")
    align: str = setting(
        "crops to that size: padded; scaled, aspect and all; or scaled to fit and padded",
        choices=("only_pad", "only_scale", "scale_and_pad"),
    )
    pad: str = setting(
        "where the padding goes; border: left_up or right_down by chance",
        choices=("right_down", "left_up", "centre", "border", "random"),
    )
    stride_px: int = setting("that size is rounded up to multiples of this, px; 1: as it is", low=1)


@dataclass
class AlignSettings:
    weight: float = setting("of 1 - cosine between the teacher's tokens and DINOv2's; 0: off", low=0)
    checkpoint: str | None = setting(
        "DINOv2: hub id, folder, or a .safetensors file with its dinov2*config.json beside it"
    )
    block: int = setting("the teacher's block whose output is aligned, from 0", low=0)


@dataclass
class ClassWeightsSettings:
    recipe: str = setting(
        "of class weights in cross_entropy, auxiliary, stages, ohem, focal, from the training labels; list: `values`",
        choices=("none", "list", "inverse_sqrt", "enet_log", "median_frequency", "effective_number", "max_over_count"),
    )
    values: list[float] = setting("recipe=list: a weight for each class, in label order")
    cap: float | None = setting("recipe=max_over_count: largest weight; null: 10", low=1)
    absent: list[str] = setting("names of classes that no training label shows; any other such class is an error")


@dataclass
class PlainLossSettings:
    weight: float = setting("of this loss in the sum; 0: off", low=0)


@dataclass
class OhemSettings(PlainLossSettings):
    threshold: float = setting("pixels whose true class has a smaller probability are kept", low=0, high=1)
    min_kept: int = setting("pixels that each micro-batch of each process keeps at least, the hardest", low=1)


@dataclass
class FocalSettings(PlainLossSettings):
    gamma: float = setting("exponent of 1 - probability of the true class; 0: cross-entropy", low=0)


@dataclass
class DiceSettings(PlainLossSettings):
    smooth: float = setting("added to numerator and denominator, pixels", low=1e-6)


@dataclass
class RmiSettings(PlainLossSettings):
    share: float = setting("of the mutual information; the rest is binary cross-entropy", low=0, high=1)


@dataclass
class MasksSettings(PlainLossSettings):
    class_weight: float = setting("of the queries' cross-entropy, in the sum and in the matching", low=0)
    mask_weight: float = setting("of the masks' binary cross-entropy, in both", low=0)
    dice_weight: float = setting("of the masks' Dice, in both", low=0)
    no_object_weight: float = setting("class weight of unmatched queries", low=1e-6)
    points: int = setting("points of a mask that its losses and the matching read", low=1)
    oversample: float = setting("times as many are drawn, of which the least sure are kept", low=1)
    importance: float = setting("share of the points that are kept so; the rest is drawn anywhere", low=0, high=1)


@dataclass
class MemorySettings:
    enabled: bool = setting("anchors also meet embeddings of earlier batches")
    region_rows: int = setting("rows of a class: mean embeddings of an image", low=1)
    pixel_rows: int = setting("rows of a class: single pixels", low=1)
    pixels_per_image: int = setting("pixel rows that an image adds for each class it shows", low=1)
    min_filled: int = setting("rows that a class needs before they are read", low=1)
    read_rows: int = setting("rows of each class that a step reads of each kind, at random", low=1)
    negatives: int = setting("rows of other classes that an anchor meets, drawn from those that were read", low=1)
    hardest_share: float = setting("they are drawn from this share, the most similar; 1: from all", low=1e-6, high=1)


@dataclass
class ContrastSettings(PlainLossSettings):
    warmup_iters: int = setting("optimizer steps before which the weight is 0; published: an eighth of all", low=0)
    temperature: float = setting("of the similarities", low=1e-6)
    base_temperature: float = setting("the loss is scaled by temperature / base_temperature", low=1e-6)
    projection: str = setting("features to embeddings: two 1x1 convolutions with BatchNorm and ReLU, or one",
                              choices=("mlp", "linear"))  # fmt: skip
    width: int = setting("channels of an embedding", low=1)
    max_samples: int = setting("anchors of a batch", low=2)
    max_views: int = setting("anchors of one class in one image", low=1)
    min_views: int | None = setting(
        "pixels, on the grid of the features, that a class of an image needs to take part; null: more than max_views",
        low=1,
    )
    fill: str = setting("a class with less pixels than its share of anchors: repeat them, or shrink to them",
                        choices=("repeat", "shrink"))  # fmt: skip
    memory: MemorySettings = setting("embeddings of earlier batches")


@dataclass
class LossesSettings:
    reduction: str = setting(
        "of cross_entropy, auxiliary, stages, focal: mean over labelled pixels, or sum over all pixels (mmseg's way)",
        choices=("valid", "all"),
    )
    class_weights: ClassWeightsSettings = setting("of the classes")
    cross_entropy: PlainLossSettings = setting("of the logits")
    auxiliary: PlainLossSettings = setting("cross-entropy of the auxiliary head's logits; 0.4 is usual")
    stages: PlainLossSettings = setting("cross-entropy of the logits of each earlier stage, summed; K-Net has 1")
    ohem: OhemSettings = setting("cross-entropy of the hardest pixels")
    focal: FocalSettings = setting("cross-entropy that weighs sure pixels less")
    lovasz: PlainLossSettings = setting("Lovasz-Softmax")
    dice: DiceSettings = setting("overlap")
    rmi: RmiSettings = setting("region mutual information")
    masks: MasksSettings = setting("Mask2Former's, of its queries")
    contrast: ContrastSettings = setting("pixel contrast")


@dataclass
class TrainSettings(LoopSettings):
    parallel: str = setting(
        "over the processes of torchrun: copies, shards, slices (tensor parallel), shards of slices, or stages one "
        "after the other (experimental); none: one process",
        choices=("none", "ddp", "fsdp", "tp", "2d", "pipeline"),
    )
    tensor_parallel: int | None = setting("parallel=2d: processes that share the slices of one shard; null: 2", low=1)
    recorded: bool | None = setting(
        "forward and backward as CUDA graphs: faster where a step waits for the CPU that launches it; null: on GPUs, "
        "where it can be; for none and ddp"
    )
    transforms: TransformSettings = setting("from an image of the data set to a batch")
    preview: int = setting("training crops drawn into the run folder before the first step; 0: none", low=0)
    losses: LossesSettings = setting("what is minimised: a weighted sum")
    validation_split: str = setting("split of the validation images")
    validation_images: int | None = setting("images of a validation; null: all", low=1)
    keep: str = setting(
        "weights that are saved: after the last step, or of the best validation mIoU; both: also model_last/",
        choices=("last", "best", "both"),
    )
    patience: int = setting("training ends after this many validations without a better mIoU; 0: never", low=0)


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
class TrainConfig(EvaluateConfig):
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
