"""What the teacher sees of an image: its windows and their noise; and the segmenter's logits on the same windows.

C classes   K windows   D noise draws   R = K * D rows (window, draw), draws innermost   3 RGB
H W px of the image as loaded   h w logits, ceil(px / 4)   z y x latent channels and grid, px / 8   s window px
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segadapt.config import GenerativeSettings
from segadapt.datasets.resize import scale, size_at
from segadapt.models.generative import Teacher, windows
from segadapt.models.generative.guided import LEAST_BOXES, unsure_boxes
from segadapt.models.generative.loss import pixel_entropy
from segadapt.models.generative.sd3 import NoisyLatent, add_noise
from segadapt.seeds import torch_generator


class Sight:
    """Geometry and noise of a run: the SAME boxes cut the image and the logits.

    Args:
        teacher: encodes the windows.
        settings: of windows, noise levels and draws.
        devices: the main one first; the last one encodes.
        seed: noise and sigma come from (seed, task, image key).
    """

    def __init__(self, teacher: Teacher, settings: GenerativeSettings, *, devices: Sequence[torch.device], seed: int):
        self.teacher, self.settings, self.seed = teacher, settings, seed
        self._main, self._encoding_device = devices[0], devices[-1]

    def size(self, image_3HW: Tensor) -> tuple[int, int]:
        """H and W at the teacher's own short side; boxes are in px of that size."""
        return size_at(image_3HW.shape[1], image_3HW.shape[2], self.settings.short_side_px)

    def crops(self, image_3HW: Tensor, boxes_K3: Tensor) -> Tensor:
        """The loaded image at the teacher's own short side, cut: [K, 3, s, s] in -1..1."""
        image_3HW = scale(image_3HW, self.settings.short_side_px)
        return 2 * windows.cut(image_3HW, boxes_K3, window_px=self.settings.window_px) - 1

    @property
    def is_guided(self) -> bool:
        """Whether the boxes depend on the segmenter's logits."""
        return self.settings.windows == "entropy"

    def boxes(self, image_3HW: Tensor, logits_BChw: Tensor | None = None) -> Tensor:
        """Of the image's windows: int64 [K, 3] on the host, see `windows.plan` and `guided.unsure_boxes`.

        Args:
            logits_BChw: raw; needed where windows are guided, and the host waits for them.
        """
        w, (height, width) = self.settings, self.size(image_3HW)
        if self.is_guided:
            assert logits_BChw is not None, "guided windows follow the segmenter"
            entropy_hw = pixel_entropy(logits_BChw.detach())[0].cpu().numpy()
            boxes_K3 = unsure_boxes(entropy_hw, image_px=(height, width), window_px=w.window_px)
            if len(boxes_K3) >= LEAST_BOXES:
                return boxes_K3
        return self.grid(image_3HW)

    def grid(self, image_3HW: Tensor) -> Tensor:
        """Boxes that cover the image: int64 [K, 3], see `windows.plan`."""
        w, (height, width) = self.settings, self.size(image_3HW)
        return windows.plan(height, width, window_px=w.window_px, stride_px=w.stride_px)

    def noise(self, image_3HW: Tensor, boxes_K3: Tensor | None = None, *, task: str, key: str) -> NoisyLatent:
        """The image's windows, encoded and noised: one row for each draw. All classes share a row's noise.

        Args:
            boxes_K3: None: the grid's.
        """
        w, boxes_K3 = self.settings, self.boxes(image_3HW) if boxes_K3 is None else boxes_K3
        image_3HW = image_3HW.to(self._encoding_device, non_blocking=True)
        latent_Rzyx = self.teacher.encode(self.crops(image_3HW, boxes_K3)).repeat_interleave(w.draws, dim=0)
        noise_Rzyx = torch.randn(
            latent_Rzyx.shape,
            generator=torch_generator(self.seed, task, key, "noise"),
            dtype=latent_Rzyx.dtype,
            pin_memory=self._main.type == "cuda",
        )
        high = w.sigma if w.sigma_high is None else w.sigma_high
        uniform_R = torch.rand(len(latent_Rzyx), generator=torch_generator(self.seed, task, key, "sigma"))
        sigma_R = (w.sigma + (high - w.sigma) * uniform_R).to(latent_Rzyx.dtype)
        return add_noise(latent_Rzyx, self._send(noise_Rzyx), self._send(sigma_R))

    def _send(self, tensor: Tensor) -> Tensor:
        """From the host to the main device; from pinned memory, as the host must not wait for the device's work."""
        if self._main.type != "cuda":
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._main, non_blocking=True)

    def on_grid(self, logits_Chw: Tensor, image_3HW: Tensor, boxes_K3: Tensor | None = None, *, grid: int) -> Tensor:
        """Logits of the image on the latent grid of each of its windows: [K, C, y, x], differentiable.

        Args:
            boxes_K3: None: the grid's.
        """
        boxes_K3 = self.boxes(image_3HW) if boxes_K3 is None else boxes_K3
        return windows.logits_on_grid(logits_Chw, boxes_K3, image_px=self.size(image_3HW), grid=grid)
