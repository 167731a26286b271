"""Settings of the verb `pretrain`. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import (
    DiscriminativeSettings,
    ExperimentSettings,
    LoggingSettings,
    RuntimeSettings,
    setting,
)
from segadapt.config_loop import LoopSettings


@dataclass
class ImageFolderSettings:
    data_root: str = setting("folder of the images, which lie in {data_root}/{split}/{class}/")
    split: str = setting("folder of the training images; each folder in it is a class")
    workers: int = setting("processes that read and change images; 0: none", low=0)
    max_pixels: int = setting("larger image files are refused before decoding, px", low=1)


@dataclass
class PretrainedModelSettings:
    discriminative: DiscriminativeSettings = setting("whose encoder is trained, under a classifier")


@dataclass
class RandAugmentSettings:
    operations: int = setting("of an image, one after the other, each any of the 15; 0: none", low=0)
    probability: float = setting("of each of them", low=0, high=1)
    magnitude: float = setting("their mean strength, 0..10", low=0, high=10)
    magnitude_std: float = setting("its standard deviation; drawn anew for each", low=0)


@dataclass
class PretrainTransformsSettings:
    image_px: int = setting("side of the square that the net sees, px", low=32)
    area_low: float = setting("crop: smallest share of the image's area", low=1e-4, high=1)
    area_high: float = setting("crop: largest share of the image's area", low=1e-4, high=1)
    aspect_low: float = setting("crop: smallest width / height; uniform in its logarithm", low=0.1, high=10)
    aspect_high: float = setting("crop: largest width / height", low=0.1, high=10)
    flip: float = setting("share of images that are mirrored left to right", low=0, high=1)
    randaugment: RandAugmentSettings = setting("RandAugment, of strengths that all grow with the magnitude")
    erasing: float = setting("share of images in which a box becomes noise", low=0, high=1)
    mixing: float = setting("share of micro-batches in which each image is mixed with another", low=0, high=1)
    cutmix_share: float = setting("of these, by CutMix, the others by Mixup", low=0, high=1)
    mixup_alpha: float = setting("Mixup: of the Beta(alpha, alpha) of the weight", low=1e-3)
    cutmix_alpha: float = setting("CutMix: of the Beta(alpha, alpha) of the area", low=1e-3)
    label_smoothing: float = setting("share of a target that is spread over all classes", low=0, high=0.999)
    validation_short_side_px: int = setting("validation: image at this short side, of which the centre is cut", low=32)


@dataclass
class PretrainSettings(LoopSettings):
    iters: int = setting("optimizer steps; an epoch has images / batch_size of them", low=1)
    parallel: str = setting("over the processes of torchrun: copies (DDP), or shards (FSDP2); none: one process",
                            choices=("none", "ddp", "fsdp"))  # fmt: skip
    transforms: PretrainTransformsSettings = setting("from an image file to a batch")
    validation_split: str = setting("folder of the validation images, with folders of the same classes")
    keep: str = setting(
        "weights that are saved: after the last step, or of the best top-1 accuracy; both: also model_last/",
        choices=("last", "best", "both"),
    )
    patience: int = setting("training ends after this many validations without a better top-1; 0: never", low=0)


@dataclass
class PretrainConfig:
    experiment: ExperimentSettings = setting("the run")
    data: ImageFolderSettings = setting("the images")
    model: PretrainedModelSettings = setting("the encoder")
    logging: LoggingSettings = setting("records")
    runtime: RuntimeSettings = setting("device and precision")
    train: PretrainSettings = setting("training of encoder and classifier")
