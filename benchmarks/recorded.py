"""Images per second of training's forward and backward, each network as it is and recorded as CUDA graphs.

python benchmarks/recorded.py train.batch_size=8 experiment=camvid_segmenter data.data_root=$CAMVID ...     on a GPU

Random weights, one batch that stays on the device, both ways of a network one after the other in one process; see
`bare_speed` of train_speed.py. Peak memory is that of the GPU, GiB.
"""

import argparse
import gc
import tempfile

import torch
from train_speed import bare_speed

from segadapt.config_training import TrainConfig
from segadapt.parse import from_overrides
from segadapt.tables import markdown

NETWORKS = {  # config of model/discriminative: overrides
    "segformer_b0_scratch": [],
    "segformer_b5_scratch": [],
    "deeplabv3_r50_scratch": ["train/losses=auxiliary"],
    "hrnet_w48_scratch": [],
    "upernet_swin_t": ["train/losses=auxiliary", "model.discriminative.backbone=null"],
    "knet_swin_t": ["train/losses=knet", "model.discriminative.backbone=null"],
    "t2t_vit_14_scratch": [],
}


def speed(overrides: list[str]) -> tuple[float, float]:
    """Images per second, and peak memory of the GPU in GiB."""
    torch.cuda.reset_peak_memory_stats()
    found = bare_speed(from_overrides("train", overrides, TrainConfig))
    peak = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    return found, peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--iters", type=int, default=50, help="steps of each measurement")
    arguments, given = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible: CUDA graphs need one")
    rows = []
    for network in arguments.networks:
        with tempfile.TemporaryDirectory() as root:
            own = [*given, f"model/discriminative={network}", *NETWORKS[network], f"logging.root={root}",
                   f"train.iters={arguments.iters}", f"train.validate_every={arguments.iters}"]  # fmt: skip
            (plain, peak), (replayed, its) = (speed([*own, f"train.recorded={how}"]) for how in ("false", "true"))
        rows.append([network, *(f"{number:.1f}" for number in (plain, replayed)), f"{replayed / plain:.2f}",
                     *(f"{number:.1f}" for number in (peak, its))])  # fmt: skip
    print(markdown(["network", "images/s", "recorded", "ratio", "peak memory GiB", "recorded"], rows))
