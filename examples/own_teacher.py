"""A teacher of your own, here a small convolutional net that predicts a velocity for each class, and one step with it.

python examples/own_teacher.py    # seconds on a CPU
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from segadapt.config import AdaptConfig
from segadapt.datasets.toytown import CLASSES, render
from segadapt.models.build import build_models
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.sd3 import NoisyLatent
from segadapt.models.source import Prediction
from segadapt.parse import from_overrides


class ConvTeacher:
    """All that segadapt asks of a teacher: segadapt.models.generative.Teacher. Its latents are means of 8 x 8 px."""

    def __init__(self, num_classes: int):
        self.net = nn.ModuleDict(
            {
                "look": nn.Embedding(num_classes + 1, 8),
                "predict": nn.Sequential(nn.Conv2d(3 + 1 + 8, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, 1, 1)),
            }
        )
        self.parallel = Parallel([self.net], [torch.device("cpu")], parts=1)
        self.null_class = num_classes

    @torch.no_grad()
    def encode(self, windows_K3ss: Tensor) -> Tensor:
        return 2 * avg_pool2d(windows_K3ss, 8)

    def velocity(self, noisy: NoisyLatent, pair_window_P: Tensor, pair_class_P: Tensor) -> Tensor:
        x_t_P3yx = noisy.x_t_Kzyx[pair_window_P]
        look_P8 = self.net["look"](pair_class_P)
        told_P9 = torch.cat([noisy.sigma_K[pair_window_P, None], look_P8], dim=1)
        told_P9yx = told_P9[:, :, None, None].expand(-1, -1, *x_t_P3yx.shape[2:])
        return self.net["predict"](torch.cat([x_t_P3yx, told_P9yx], dim=1))


def main(*, steps: int = 8) -> list[Prediction]:
    """Both models learn from one hazy image, step by step; the loss falls."""
    torch.manual_seed(0)
    settings = from_overrides(
        "adapt",
        ["experiment=toytown_c", "runtime=cpu", "model.generative.checkpoint=own-teacher",
         "model.trust.max_agreement=1", "model.trust.restore=0", "tta.optimizer.lr_generative=5e-3"],
        AdaptConfig,
    )  # fmt: skip
    method = build_models(settings, CLASSES, teacher=ConvTeacher(len(CLASSES))).method
    image_3HW = torch.from_numpy(render("test", 0, weather="haze").image_HW3).permute(2, 0, 1) / 255
    return [method.step(image_3HW, task="haze", key="000") for _ in range(steps)]


if __name__ == "__main__":
    for index, prediction in enumerate(main()):
        print(f"step {index}: loss {prediction.loss:.4f}, gradient norm {prediction.grad_norm:.4f}, "
              f"teacher and segmenter agree on {100 * prediction.teacher_agrees:.0f} % of the pixels")  # fmt: skip
