"""Settings of check, diagnose, grid, align, results and report. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import AdaptConfig, EvaluatedModelSettings, setting


@dataclass
class CheckSettings:
    splits: list[str] = setting("splits to read beside data.split and to compare with it, as [val] with the training's")
    images: int | None = setting("images of each task to read; null: all", low=1)
    samples: int = setting("pictures of each task: image, label over it, windows; 0: none", low=0)
    class_weights: str = setting(
        "recipe of the weights that are printed; check.json has all",
        choices=("inverse_sqrt", "enet_log", "median_frequency", "effective_number", "max_over_count"),
    )
    load_models: bool = setting("also load both models, take steps on one image, and estimate the time of the run")


@dataclass
class CheckConfig(AdaptConfig):
    check: CheckSettings = setting("how much to check")


@dataclass
class DiagnoseSettings:
    sigmas: list[float] = setting("noise levels at which the teacher is asked, each in (0, 1]")
    draws: int = setting("noise draws at each level", low=1)
    clean: bool = setting("also the images as they are, as a first task")


@dataclass
class DiagnoseConfig(AdaptConfig):
    diagnose: DiagnoseSettings = setting("what is asked")


@dataclass
class GridSettings:
    methods: list[str] = setting(
        "tta.method of the cells, each with overrides of its own, as 'rotta tta.options.every=8'"
    )
    streams: list[str] = setting(
        "overrides of each stream, one text each, as 'data.severity=3 data.order=mixed'; empty: the one of the settings"
    )
    seeds: list[int] = setting("experiment.seed of the cells")
    overrides: list[str] = setting("of every cell, as experiment=toytown_c")
    given: list[str] = setting("more of them; those of the command line are put here, and win")
    engine: str = setting("processes of this machine, a Ray cluster, or only print the commands that are left",
                          choices=("local", "ray", "print"))  # fmt: skip
    gpus_per_cell: int = setting("GPUs that a cell sees; 0: none", low=0)
    cells_per_gpu: int = setting("cells at a time on each GPU, or set of them; local without GPUs: in all", low=1)
    threads: int = setting("CPU threads of each cell, the same with every engine", low=1)
    ray_address: str | None = setting(
        "of the cluster, 'auto' for the one of this machine; null: one is begun and ended"
    )
    retries: int = setting("ray: times that a cell begins again because its node died", low=0)
    log_lines: int = setting("last lines of its log shown when a cell fails", low=1)


@dataclass
class GridConfig:
    grid: GridSettings = setting("which cells, and where they run")


@dataclass
class AlignmentSettings:
    reference: str | None = setting("safetensors file to compare with: `image` and `logits`; null: write one instead")
    tolerance: float = setting("largest difference of a logit, as a share of the largest reference logit", low=0)
    write: str | None = setting("file to write such a reference of the checkpoint to; null: none")
    image: str | None = setting("image file that a written reference is of; null: none is written")
    output: str | None = setting("folder that the checkpoint is saved to, as transformers reads it; null: none")


@dataclass
class AlignConfig:
    model: EvaluatedModelSettings = setting("the segmenter")
    align: AlignmentSettings = setting("what it is compared with, and where it is saved")


@dataclass
class ResultsConfig:
    runs: list[str] = setting("run folders, and folders of run folders")
    table: str = setting(
        "a row a method, a column a task, with gains; or a row a run, the best first, a table each data set and rule; "
        "or of trainings a row a data.subset",
        choices=("gains", "ranked", "subsets"),
    )
    against: str = setting("table=gains: method whose row the gains are against")
    format: str = setting("of the text", choices=("markdown", "csv", "latex", "json"))
    resamples: int = setting("table=gains: of the bootstrap; 0: no intervals", low=0)
    plot: str | None = setting("table=subsets: file of a plot of mIoU against data.subset, *.svg or *.png; null: none")
    output: str | None = setting("file; null: the terminal")


@dataclass
class ReportConfig:
    runs: list[str] = setting("run folders, and folders of run folders")
    resamples: int = setting("of the bootstrap of the gains; 0: no intervals", low=0)
