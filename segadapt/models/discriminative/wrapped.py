"""A segmenter around any torch module that maps images to logits.

B images   C classes   3 RGB   H W image px   h w logits, of any stride
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from segadapt.errors import UserError
from segadapt.models.discriminative import norm_parameters

AS_IT_IS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and standard deviation of RGB in 0..1


class Wrapped:
    """A module that is given normalised images [B, 3, H, W] and returns their logits [B, C, h, w].

    It may return a tensor, an object with `.logits` (transformers), or a dict with "out" (torchvision).

    Args:
        net: is put into eval mode; its own weights are what moves.
        num_classes: C.
        mean, std: of each channel of RGB in 0..1, as `net` was trained with; it sees (image - mean) / std.
    Raises:
        UserError: other than three means and three positive deviations; in `logits`, an output of another kind or C.
    """

    short_side_px: int | None = None

    def __init__(self, net: nn.Module, num_classes: int, *, mean: Sequence[float], std: Sequence[float]):
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"mean={mean}, std={std}: expected three numbers each, of R, G and B in 0..1, the "
                            "deviations above 0. Correct them.")  # fmt: skip
        self.net, self.num_classes = net.eval(), num_classes
        device = next(net.parameters()).device
        self._mean_311, self._std_311 = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """See Segmenter."""
        output: Any = self.net((image_B3HW - self._mean_311) / self._std_311)
        output = getattr(output, "logits", output["out"] if isinstance(output, dict) and "out" in output else output)
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != self.num_classes:
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise UserError(
                f"The segmenter's module returned {got}; expected logits [images, {self.num_classes} classes, height, "
                "width], alone, as .logits or as ['out']. Wrap the module, or correct `classes`."
            )
        return output.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        """See Segmenter."""
        return dict(self.net.named_parameters())

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """See Segmenter."""
        return norm_parameters(self.net)

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        """None: which stage is the last is not known."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write the weights, as `safetensors.torch.load_model` reads them, to folder/model.safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.net, str(Path(folder, "model.safetensors")))
