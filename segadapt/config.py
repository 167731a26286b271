"""Settings of `adapt` and `evaluate`: type, meaning with unit, choices. Values live in conf/*.yaml alone.

config_*.py has those of the other verbs. Hydra composes the YAML; `parse.py` checks it against these classes and
returns plain dataclasses. There is no `_target_` and no interpolation that computes: a config can name values, never
code.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

BELOW_ONE = 0.999999  # AdamW divides by 1 - beta^step


def setting(text: str, *, choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf) -> Any:
    """A field without default: what it means, its choices, its closed range."""
    return field(default=MISSING, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass
class ExperimentSettings:
    name: str = setting("names the run folder and the W&B run")
    id: str | None = setting("second part of the run folder; null: a hash of all settings that can change results")
    seed: int = setting("all noise, sigma, class draws and orders are derived from it", low=0)
    restart: bool = setting("start anew; false: go on where an earlier start of the same settings stopped")
    any_version: bool = setting(
        "adapt, evaluate, train, pretrain: also go on from a checkpoint of another version of segadapt"
    )


@dataclass
class DataSettings:
    kind: str = setting("how samples are made: files, toytown, or another of DATASETS")
    name: str = setting("name of the data set, shown in records and in the embedding file's name")
    classes: str = setting(
        "a known class list (ade20k, camvid, cityscapes, coco_stuff, pascal_voc, toytown) or a text file, a name a line"
    )
    data_root: str | None = setting("folder of the data set")
    image_path: str | None = setting("template with {data_root} {split} {corruption} {severity} {key}; .* = any suffix")
    label_path: str | None = setting("the same for label maps; null: unlabelled, predictions only")
    id_map: str = setting(
        "label file ids to class ids: zero_is_ignore (k = class k-1), as_is, cityscapes_label_ids, coco_stuff_ids"
    )
    label_class_ids: list[int] = setting("the file id of each class, in label order, as [0, 50, 100]; []: by id_map")
    unknown_ids: str = setting("ids of label files that are no class and not 255: refused, or ignored",
                               choices=("error", "ignore"))  # fmt: skip
    split: str = setting("part of the data set, fills {split}")
    keys_file: str | None = setting(
        "text file with the keys of the split, one a line, a template with {data_root} {split}; null: all that is there"
    )
    subset: int = setting(
        "every x-th of the sorted keys: 1/x of data.split, of no other split that a verb reads; 1: all", low=1
    )
    corruptions: list[str] = setting("one task each, in this order; empty: the clean set is the only task")
    severity: int = setting("strength of every corruption, 1..5", low=1, high=5)
    corruption_seed: int = setting("seed of corruptions made on the fly", low=0)
    short_side_px: int = setting("images are loaded at this short side, px; models may have smaller ones", low=16)
    order: str = setting("of the tasks: one after the other, severities up and down, or all interleaved",
                         choices=("tasks", "gradual", "mixed"))  # fmt: skip
    rounds: int = setting("times that all tasks come, with tta.continual as one stream", low=1)
    limit: int | None = setting("only the first n keys of the shuffled order; null: all", low=1)
    shuffle: bool = setting("shuffle each task with the seed; false: sorted keys")
    workers: int = setting("processes that read images ahead; 0: none", low=0)
    cache: bool = setting("training: keep all decoded images in memory, 4 bytes a pixel")
    max_pixels: int = setting("larger image files are refused before decoding, px", low=1)
    count: int | None = setting("toytown: images in the split; null for files", low=1)
    world_seed: int = setting("toytown: seed of the world", low=0)
    weather: str = setting("toytown: clear, or all kinds", choices=("clear", "all"))


@dataclass
class DiscriminativeSettings:
    checkpoint: str | None = setting("hub id, local folder, file of NVIDIA or mmseg, or segadapt:NAME (bundled)")
    backbone: str | None = setting(
        "train: pretrained encoder of a model made from scratch, hub id, local folder or file; null: random weights"
    )
    revision: str | None = setting("hub revision of checkpoint or backbone; null: the newest")
    allow_pickle: bool = setting("also read pytorch_model.bin, *.pth and *.pt, by torch's weights-only reader")
    short_side_px: int | None = setting("the loaded image is resized to this for the segmenter, px; null: not", low=16)
    channel_order: str | None = setting(
        "of the net's input, saved with its weights: rgb or bgr; null: as its config.json says, else rgb",
        choices=("rgb", "bgr"),
    )
    gradient_checkpointing: bool = setting("recompute activations in backward: less memory, more time")
    family: str = setting("train: of a model made from scratch, a model_type of FAMILIES; a checkpoint names its own")
    config: dict[str, Any] = setting("train: the family's config of a model made from scratch, where checkpoint=null")


@dataclass
class PromptSettings:
    template: str = setting("prompt of a class; {} is its name")
    overrides: dict[str, str] = setting("class name: its whole prompt")
    file: str | None = setting(
        "text file with each class's whole prompt, a line a class in label order, or .json of name: prompt; null: none"
    )
    max_sequence_length: int = setting("T5 tokens; SD3 attends to padding, another length changes every result", low=1)
    dtype: str = setting("of the text encoders and the saved embeddings", choices=("bfloat16", "float32"))
    cache_dir: str = setting("folder of the embedding files")


@dataclass
class GenerativeSettings:
    checkpoint: str | None = setting("hub id, local folder, or segadapt:NAME for a bundled model")
    revision: str | None = setting("hub revision; null: the newest")
    autoencoder: str | None = setting("folder of another autoencoder (diffusers or TAESD3); null: the checkpoint's own")
    embeddings: str | None = setting("file of class embeddings; null: the checkpoint's own if it has one, else prompts")
    gradient_checkpointing: bool = setting("recompute activations in backward: a third of the memory, 40 % more time")
    max_pairs: int | None = setting(
        "(window, class) pairs at work at a time for each GPU; more: faster; null: as many as fit, up to 40 in all",
        low=1,
    )
    placement: str = setting("over several GPUs: split the transformer, or a whole copy on each",
                             choices=("dispatch", "replicate"))  # fmt: skip
    parts: int | None = setting(
        "forwards of the pairs at work that overlap on several GPUs; null: one a copy; split 8, not compiled 4",
        low=1,
    )
    virtual_stages: int = setting(
        "runs of blocks of each GPU on a split; 2: a part is at the next GPU in half the time, with more traffic", low=1
    )
    short_side_px: int | None = setting("the loaded image is resized to this for the teacher, px; null: not", low=16)
    windows: str = setting("a grid over the image, or boxes where the segmenter is unsure, if there are 2 or more",
                           choices=("grid", "entropy"))  # fmt: skip
    window_px: int = setting("side of a sliding window, px; a multiple of 16", low=16)
    stride_px: int = setting("distance between window starts along the long side, px", low=1)
    sigma: float = setting("noise level in (0, 1], the papers' t; lower end of its range", low=1e-6, high=1)
    sigma_high: float | None = setting("upper end, one uniform draw a window; null: sigma is fixed", low=1e-6, high=1)
    draws: int = setting("noise draws of each window; their losses are averaged", low=1)
    shuffle_classes: bool = setting("control: every class gets another one's embedding; adapting must then not gain")
    prompts: PromptSettings = setting("text embeddings")
    config: dict[str, Any] = setting("train-generative: SD3Transformer2DModel made from scratch")
    autoencoder_config: dict[str, Any] = setting(
        "train-generative: AutoencoderKL made from scratch where `autoencoder` is null"
    )


@dataclass
class UpdateSettings:
    discriminative: bool = setting("the segmenter learns")
    generative: bool = setting("the teacher learns")
    prompt_offset: bool = setting(
        "of the teacher also an offset on the pooled embedding, shared by all classes; 0 at first"
    )
    update_norm_only: bool = setting("of the segmenter only LayerNorm and BatchNorm affine parameters")
    lora_rank: int = setting("of the teacher only low-rank adapters on its attention; 0: all its weights", low=0)
    lora_alpha: float = setting("the adapters' product is scaled by alpha / rank", low=1e-6)


@dataclass
class LossSettings:
    select: str = setting("candidates: each pixel's top classes, or the classes that take more than area_threshold",
                          choices=("topk", "area"))  # fmt: skip
    topk: int = setting("classes taken per pixel as candidates", low=1)
    area_k: int = setting("select=area: classes whose probability counts, at each pixel", low=1)
    area_threshold: float = setting("select=area: sum of a class's probabilities in a window, in latent pixels", low=0)
    classes_threshold: int = setting("most candidate classes of a window", low=1)
    min_classes: int = setting("fill up a window's candidates to this many; 1: no fill", low=1)
    fill: str = setting("with classes drawn uniformly, or by their mean probability in the window",
                        choices=("uniform", "likely"))  # fmt: skip
    ignored_classes: list[str] = setting(
        "names of classes never asked about; pixels whose top class they are don't count"
    )
    temperature: float = setting("of the softmax over a window's candidates", low=1e-6)
    logit_norm: bool = setting("divide each pixel's logits by their L2 norm")
    window_weights: str = setting("in the mean over windows: all alike, or by the segmenter's mean entropy",
                                  choices=("uniform", "entropy"))  # fmt: skip
    entropy_tau: float = setting("window_weights=entropy: of the softmax over entropies in 0..1", low=1e-6)
    mask_reduction: str = setting("mean over pixels that count, or over all (zero-filled)", choices=("valid", "all"))


@dataclass
class TrustSettings:
    mode: str = setting("teacher against itself over the draws: ignore it, leave out pixels below threshold, or weight",
                        choices=("none", "skip", "weight"))  # fmt: skip
    threshold: float = setting("skip: least share of draws that must agree on a pixel's class", low=0, high=1)
    max_agreement: float = setting(
        "no update by an image where teacher and segmenter agree on more than this share of pixels; 1: always update",
        low=0, high=1,
    )  # fmt: skip
    restore: float = setting(
        "share of the way back to the source weights that such an image takes; 0: none", low=0, high=1
    )


@dataclass
class EvaluatedModelSettings:
    discriminative: DiscriminativeSettings = setting("the segmenter")
    sha256: dict[str, str] = setting(
        "of the weights, by model, as results.json lists them under weights_sha256: others are refused; {}: any"
    )


@dataclass
class ModelSettings(EvaluatedModelSettings):
    generative: GenerativeSettings = setting("the teacher")
    update: UpdateSettings = setting("what moves")
    loss: LossSettings = setting("the objective")
    trust: TrustSettings = setting("where the teacher is not believed")


@dataclass
class OptimizerSettings:
    name: str = setting("rule", choices=("adamw", "sgd"))
    lr: float = setting("learning rate of both models", low=0)
    lr_discriminative: float | None = setting("learning rate of the segmenter; null: lr", low=0)
    lr_generative: float | None = setting("learning rate of the teacher; null: lr", low=0)
    lr_prompt_offset: float | None = setting("learning rate of model.update.prompt_offset; null: the teacher's", low=0)
    weight_decay: float = setting("decoupled for adamw", low=0)
    beta1: float = setting("adamw", low=0, high=BELOW_ONE)
    beta2: float = setting("adamw", low=0, high=BELOW_ONE)
    eps: float = setting("adamw", low=0)
    momentum: float = setting("sgd", low=0, high=BELOW_ONE)
    clip_norm: float | None = setting("largest L2 norm of each model's gradient; null: not clipped", low=1e-9)
    warmup: int = setting("the n-th step after a reset takes n / warmup of the rates, up to all; 0: all at once", low=0)
    accumulate: int = setting("images of one step, their gradients averaged; a task's rest is flushed", low=1)


@dataclass
class TtaSettings:
    forward_mode: str = setting(
        "adapt, or only predict with the segmenter (as method=source)", choices=("tta", "discriminative_only")
    )
    method: str = setting("of adaptation; tta.method=NAME takes all of conf/tta/NAME.yaml")
    options: dict[str, Any] = setting("the method's own, see its docstring and conf/tta/NAME.yaml")
    continual: bool = setting("keep what was learned from task to task; false: reset before each")
    episodic: bool = setting("reset before each image")
    non_finite: str = setting(
        "an image whose loss, gradient or prediction is not finite: no step, end the run, or no step and a reset",
        choices=("skip", "stop", "reset"),
    )
    save_adapted: bool = setting("save the adapted segmenter of each task as a folder that can be a checkpoint")
    diagnose_every: int = setting(
        "add diagnostics to every n-th record; reads labels, changes nothing; 0: never", low=0
    )
    optimizer: OptimizerSettings = setting("one step an image")


@dataclass
class WandbSettings:
    mode: str = setting("where the copy of the records goes", choices=("online", "offline", "disabled"))
    entity: str | None = setting("W&B user or team; null: the login's default")
    project: str = setting("W&B project")
    images: int = setting("adapt, evaluate: the first n images of each task are shown with label and prediction",
                          low=0, high=100)  # fmt: skip


@dataclass
class LoggingSettings:
    root: str = setting("folder of all run folders")
    predictions: str = setting("palette PNGs of the predictions", choices=("none", "sample", "all"))
    sample_images: int = setting("predictions=sample: the first n images of each task", low=1)
    samples: int = setting("images of each task that `report` can show, chosen by the seed; 0: none", low=0)
    terminal: str = setting(
        "all but train-generative: text, live on a terminal or in plain lines, only the result lines, or JSON lines",
        choices=("auto", "rich", "plain", "quiet", "json"),
    )
    wandb: WandbSettings = setting("Weights & Biases")


@dataclass
class RuntimeSettings:
    device: str = setting("auto: all visible GPUs, else the CPU", choices=("auto", "cpu", "cuda"))
    precision: str = setting("bf16: autocast over float32 weights; fp32", choices=("bf16", "fp32"))
    deterministic: bool = setting("refuse algorithms whose result varies from run to run")
    compile: bool | None = setting(
        "compiled teacher, both models as CUDA graphs: a minute at first, then faster; null: on GPUs, for a large one; "
        "train: true compiles the segmenter"
    )
    threads: int | None = setting("CPU threads of torch; null: its own choice", low=1)
    checkpoint_seconds: float | None = setting(
        "time between checkpoints, s; more where they would take over 2 % of it; null: no such", low=0
    )
    checkpoint_images: int | None = setting("adapt, evaluate: images between checkpoints; null: no such", low=1)


@dataclass
class EvaluateSettings:
    input_resize: str = setting(
        "the network's input: at data.short_side_px; in the box long_side_px x data.short_side_px; that, both sides up "
        "to multiples of 32; as on disk",
        choices=("short_side", "box", "aligned32", "original"),
    )
    long_side_px: int | None = setting("input_resize=box, aligned32: the box's long side, px; null: no box", low=16)
    size_divisor: int = setting("the input is padded up to a multiple of this, px; 1: not", low=1)
    padding: str = setting("size_divisor: where the padding goes", choices=("right_down", "centre"))
    window_px: int | None = setting("sliding windows of this side, px; null: the whole input at once", low=16)
    stride_px: int | None = setting("between the starts of two windows, px; null: no windows", low=1)
    logit_resize: str = setting(
        "logits straight to the label's size, or to the input's and from there to the label's",
        choices=("direct", "two_step"),
    )
    scales: list[float] = setting("factors on the input's size; several are averaged")
    flip: bool = setting("average with the prediction of the mirrored input, at each scale")
    average: str = setting("of several scales and flips: their probabilities, or their logits",
                           choices=("softmax", "logits"))  # fmt: skip
    per_class: bool = setting("print the scores of each class; tasks/TASK.classes.csv has them in any case")
    confusion_picture: bool = setting("draw the confusion matrix, each row as shares of its label")
    submission: str = setting(
        "grey PNGs for a benchmark's server: none, class ids, ids + 1 (ADE20K), Cityscapes' label ids",
        choices=("none", "ids", "ids_plus_one", "cityscapes"),
    )


@dataclass
class RunConfig:
    """What every run over images with a segmenter has."""

    experiment: ExperimentSettings = setting("the run")
    data: DataSettings = setting("the images")
    model: EvaluatedModelSettings = setting("the segmenter")
    logging: LoggingSettings = setting("records")
    runtime: RuntimeSettings = setting("device and precision")


@dataclass
class EvaluateConfig(RunConfig):
    evaluate: EvaluateSettings = setting("how the segmenter is asked, and what is written beside its scores")


@dataclass
class AdaptConfig(RunConfig):
    model: ModelSettings = setting("the two models")  # type: ignore[assignment]
    tta: TtaSettings = setting("adaptation")


def fields_of(schema: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf setting of a schema by its dotted name."""
    out: dict[str, dataclasses.Field] = {}
    for item in dataclasses.fields(schema):
        name = f"{prefix}{item.name}"
        out |= fields_of(item.type, f"{name}.") if dataclasses.is_dataclass(item.type) else {name: item}  # type: ignore
    return out
