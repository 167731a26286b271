"""FLOPs of trained networks, and the images per second that they predict one after the other, alone on their device.

python benchmarks/cost.py NAME=MODEL_FOLDER [NAME=MODEL_FOLDER ...] --size 360 480 --json FILE

FLOPs: those of matrix products, attention among them, and convolutions, as torch.utils.flop_counter has them.
A multiply and an add are two operations, where most papers count one: SegFormer-B0 at 512 px and 150 classes has 16.8
here, there 8.4. Speed: the median over --images images, each waited for; bf16 autocast on a GPU, float32 on the CPU;
logits at the network's own size, nothing compiled or recorded.
FILE is added to where device, torch, size and --images are those of now, else begun anew; a network that it has is not
measured again while its config.json, which decides its cost, is the same.

B images, 1   3 RGB   H W image px
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segadapt.config import RuntimeSettings
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast
from segadapt.models.set_up import count, set_up
from segadapt.record import write_json

WARM_UP = 10  # images


def gflops(segmenter: NetSegmenter, image_B3HW: Tensor) -> float:
    """10^9 operations of one forward, its attention as plain matrix products: not every fused kernel is counted."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        segmenter.logits(image_B3HW)
    return counter.get_total_flops() / 1e9


def seconds_an_image(segmenter: NetSegmenter, image_B3HW: Tensor, *, images: int) -> list[float]:
    """Of each image from the call to the end of the device's work, after WARM_UP others."""
    device = image_B3HW.device
    seconds = []
    for _ in range(WARM_UP + images):
        began = time.perf_counter()
        with torch.inference_mode(), autocast(device, "bf16" if device.type == "cuda" else "fp32"):
            segmenter.logits(image_B3HW)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def measured(folder: str, *, size_px: tuple[int, int], images: int, device: torch.device) -> dict[str, Any]:
    """What `--json` has of a network. UserError: see load_segmenter."""
    segmenter = load_segmenter(folder, num_classes=None, device=device)
    image_B3HW = torch.rand((1, 3, *size_px), generator=torch.Generator().manual_seed(0)).to(device)
    operations = gflops(segmenter, image_B3HW)
    seconds = statistics.median(seconds_an_image(segmenter, image_B3HW, images=images))
    return {"parameters": count(segmenter.net), "gflops": operations, "images_per_second": 1 / seconds}


def begun(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What `file` has, if it was measured as `machine` says; else that, with no networks yet."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if found == found | machine else machine | {"networks": {}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME=MODEL_FOLDER")
    parser.add_argument("--size", nargs=2, type=int, required=True, metavar=("HEIGHT", "WIDTH"), help="px")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    main = set_up(RuntimeSettings("auto", "bf16", False, None, None, None, None))
    name_of_device = torch.cuda.get_device_name(main) if main.type == "cuda" else "CPU"
    machine = {"device": name_of_device, "torch": str(torch.__version__), "size_px": given.size, "images": given.images}
    found = begun(given.json, machine)
    failed = []
    for name, folder in (text.split("=", 1) for text in given.networks):
        own = found["networks"].pop(name, {})  # nothing earlier is left of what fails now
        try:
            config = hashlib.sha256(Path(folder, "config.json").read_bytes()).hexdigest()
            if own.get("config_sha256") != config:
                own = measured(folder, size_px=tuple(given.size), images=given.images, device=main)
            found["networks"][name] = own | {"config_sha256": config}
            print(f"{name}: {own['gflops']:.1f} GFLOPs, {own['images_per_second']:.1f} images/s", flush=True)
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failed.append(name)
        write_json(given.json, found)
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)
