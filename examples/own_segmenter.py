"""A segmenter of your own, here a plain convolutional net with logits at 1/8: ToyTown-C as it is and by three methods.

python examples/own_segmenter.py    # half a minute on a CPU
"""

import copy
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from segadapt.adapt import run
from segadapt.config import AdaptConfig
from segadapt.datasets.toytown import CLASSES, render
from segadapt.models.discriminative import norm_parameters
from segadapt.parse import from_overrides


class OwnSegmenter:
    """All that segadapt asks of a segmenter: segadapt.models.discriminative.Segmenter."""

    short_side_px: int | None = None  # a run sets it

    def __init__(self, net: nn.Module):
        self.net = net.eval()

    def logits(self, image_B3HW: Tensor) -> Tensor:
        return self.net(2 * image_B3HW - 1).float()  # the preprocessing this net was trained with

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        return norm_parameters(self.net)

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        return {}  # of the last stage and the head, for SAR

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.net.state_dict(), Path(folder, "model.safetensors"))


def layer(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def trained(*, images: int = 16, steps: int = 60) -> nn.Module:
    """Any nn.Module would do; this one learns clean ToyTown for some seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(layer(3, 16, 2), layer(16, 32, 2), layer(32, 64, 2), layer(64, 64, 1), layer(64, 64, 1),
                        nn.Conv2d(64, len(CLASSES), 1))  # fmt: skip
    scenes = [scene for index in range(images) if (scene := render("training", index)).label_HW.shape == (240, 320)]
    image_N3HW = torch.stack([torch.from_numpy(scene.image_HW3).permute(2, 0, 1) / 255 for scene in scenes])
    label_Nhw = torch.stack([torch.from_numpy(scene.label_HW[4::8, 4::8]).long() for scene in scenes])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(steps):
        some = random.Random(step).sample(range(len(scenes)), 4)
        loss = cross_entropy(net(2 * image_N3HW[some] - 1), label_Nhw[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def main(root: str = "outputs", *, corruptions: str = "fog,contrast", images: int = 4) -> dict[str, dict[str, Any]]:
    """The source model and three methods, the last one with the bundled teacher; the same images in the same order."""
    net, results = trained(), {}
    for method in ("source", "bn", "tent", "generative"):
        settings = from_overrides(
            "adapt",
            ["experiment=toytown_c", f"tta.method={method}", "model.discriminative.checkpoint=own-net", "runtime=cpu",
             "experiment.name=own-segmenter", f"logging.root={root}", f"data.corruptions=[{corruptions}]",
             "data.severity=2", f"data.limit={images}", "data.workers=0", "tta.optimizer.lr_discriminative=1e-3"],
            AdaptConfig,
        )  # fmt: skip
        results[method] = run(settings, segmenter=OwnSegmenter(copy.deepcopy(net)))
    return results


if __name__ == "__main__":
    for name, result in main().items():
        print(f"{name:10} mIoU {100 * result['mean']['miou']:.1f} %")
