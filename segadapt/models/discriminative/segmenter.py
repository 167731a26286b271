"""A segmenter whose net is of transformers' kind: a config class, and weights with a config.json beside them.

# B images  3 RGB  H W image px  C dataset classes  h w logits  D feature channels  y x features
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from segadapt.errors import UserError
from segadapt.models.discriminative import Outputs, norm_parameters
from segadapt.models.discriminative.families import FAMILIES, IMAGENET_MEAN, IMAGENET_STD
from segadapt.models.precision import at_least_float32

MOST = 1e30  # of a mean or deviation of colours, as float32 holds it


class NetSegmenter:
    """A net in eval mode with its own preprocessing; gradients on, BatchNorm keeps its source statistics.

    The net's config may say image_mean, image_std (RGB in 0..1; default: ImageNet's) and channel_order ("bgr").
    """

    def __init__(
        self, net: PreTrainedModel, *, channel_order: str | None = None, gradient_checkpointing: bool = False
    ) -> None:
        """channel_order: rgb or bgr, put into the config, with which it is saved; None: as it is there."""
        if channel_order is not None:
            net.config.channel_order = channel_order
        self.net, self.family = net, FAMILIES[net.config.model_type]
        self._least_px = self.family.least_px(net.config)
        self.short_side_px: int | None = None  # of its own input; None: as loaded
        mean = _of_colours(net, "image_mean", IMAGENET_MEAN)
        std = _of_colours(net, "image_std", IMAGENET_STD)
        self._is_bgr = getattr(net.config, "channel_order", "rgb") == "bgr"
        # on the device from the start: a copy from the host would wait for all that the device was given before
        self._mean_std_2311 = torch.tensor([mean, std], device=net.device)[:, :, None, None]
        if gradient_checkpointing and not net.supports_gradient_checkpointing:
            raise UserError(f"model.discriminative.gradient_checkpointing=true: {net.config.model_type} cannot "
                            "recompute its activations. Set it to false.")  # fmt: skip
        if gradient_checkpointing:
            # renamed within transformers 5: 5.17 knows the second name only, 6 will know the first only
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.eval()

    def eval(self) -> "NetSegmenter":
        """Eval mode for every module; call this and not `net.eval()`, which would silently end recompute."""
        self.net.eval()
        for module in self.net.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                # transformers recomputes only if .training: set it on the layer wrappers alone, so that the dropout
                # and drop path inside stay off
                module.training = True
        return self

    def train(self) -> "NetSegmenter":
        """Train mode, but for the modules that the family keeps frozen: they stay in eval mode, without gradient."""
        self.net.train()
        for name in self.family.frozen(self.net.config):
            self.net.get_submodule(name).eval().requires_grad_(False)
        return self

    def normalised(self, image_B3HW: Tensor) -> Tensor:
        """What the net takes, of an image in 0..1. UserError: its convolutions do not take one as small."""
        height, width = image_B3HW.shape[-2:]
        if min(height, width) < self._least_px:
            raise UserError(f"an image of {height} x {width} px is too small for {self.net.config.model_type}; "
                            f"expected {self._least_px} px or more on each side. Raise data.short_side_px, or what "
                            "else makes images as small.")  # fmt: skip
        mean_311, std_311 = self._mean_std_2311.to(image_B3HW)
        pixels_B3HW = (image_B3HW - mean_311) / std_311
        return pixels_B3HW.flip(1) if self._is_bgr else pixels_B3HW

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """Class scores on the net's own grid; no padding, no resize, whatever the aspect ratio.

        Args:
            image_B3HW: RGB in 0..1 on the device and in the dtype of the net (float32; float64 in tests).
        Returns:
            logits_BChw: float32, cast before anything is computed from them; float64 if the net is.
        """
        return at_least_float32(self.net(pixel_values=self.normalised(image_B3HW)).logits)

    def outputs(self, image_B3HW: Tensor) -> Outputs:
        """For training: logits and features; if the net has such, those of an auxiliary head and earlier stages."""
        found = self.family.outputs(self.net, self.normalised(image_B3HW))
        auxiliary_BChw = found.auxiliary_BChw
        return Outputs(
            at_least_float32(found.logits_BChw),
            None if auxiliary_BChw is None else at_least_float32(auxiliary_BChw),
            found.features_BDyx,
            stages_BChw=tuple(at_least_float32(logits_BChw) for logits_BChw in found.stages_BChw),
            queries=found.queries,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name."""
        return dict(self.net.named_parameters())

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Those that training gives `head_lr_factor`: of everything but the encoder."""
        heads = tuple(f"{name}." for name in self.family.heads)
        return {name: parameter for name, parameter in self.parameters().items() if name.startswith(heads)}

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Affine weights and biases of the normalisation layers."""
        return norm_parameters(self.net)

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the last encoder stage and of the head."""
        is_top = self.family.is_top(self.net)
        return {name: parameter for name, parameter in self.norm_parameters().items() if is_top.match(name)}

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole, the latter last: without it no folder is read.

        Names are not those of `state_dict`, but the ones that were read: of the files that circulate.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # a name that the next start knows as one that a killed process left
        prefix, suffix = f".{folder.name}.", f".{os.getpid()}.tmp"
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, suffix=suffix) as draft:
            self.net.save_pretrained(draft)
            (folder / "config.json").unlink(missing_ok=True)
            for path in sorted(Path(draft).iterdir(), key=lambda path: path.name == "config.json"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                path.replace(folder / path.name)


def _of_colours(net: PreTrainedModel, name: str, default: tuple[float, ...]) -> list[float]:
    """Three numbers of the config, or the default of one that says none. UserError: others."""
    given = getattr(net.config, name, None)
    values, lowest = default if given is None else given, 0 if name == "image_std" else -MOST
    is_list = isinstance(values, list | tuple) and len(values) == 3
    if not is_list or not all(isinstance(one, int | float) and lowest < one < MOST for one in values):
        above = " above 0" if name == "image_std" else ""
        raise UserError(f"model.discriminative: {name}={given!r} in the config of {net.config.model_type}: expected "
                        f"three finite numbers{above}, of RGB in 0..1, or null. Correct it there.")  # fmt: skip
    return [float(one) for one in values]
