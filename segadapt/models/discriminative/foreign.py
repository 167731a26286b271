"""What nets of timm and smp share: the package, the arguments that it takes, weights that it starts, names of files.

# B images  3 RGB  H W image px  D channels  h w a map or the logits
"""

import importlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from segadapt.errors import UserError, in_one_line
from segadapt.models.discriminative.convolutional import ConvolutionalNet
from segadapt.models.discriminative.dinov2 import covering
from segadapt.models.discriminative.keymaps import add_counters

SETTING = "model.discriminative.config"
# arguments that reach for the hub or a file, or that the net needs as it gives them
RESERVED = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "encoder_weights",
    "features_only", "feature_cls", "out_indices", "output_fmt", "in_chans", "in_channels", "num_classes", "classes",
    "model_name", "arch", "encoder_name", "activation", "aux_params",
)  # fmt: skip
OF_SIZES = re.compile(r"\b(size|shape)")  # in what torch says of images that a net cannot take, and of no other fault


def package(name: str, extra: str) -> Any:
    """The module of an optional package, imported here and nowhere else.

    UserError: it is missing, or torchvision under it is missing or made for another torch.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise UserError(
            f"model.discriminative.family=segadapt_{extra}: {name} cannot be imported ({str(error).splitlines()[0]}); "
            f"expected the extra {extra}, and a torchvision for torch {torch.__version__}. Run pip install "
            f"'segadapt[{extra}]'."
        ) from error


def check_arguments(encoder_name: str, options: Mapping[str, Any] | None) -> None:
    """UserError: a name that would be fetched or read from a file, or an option that is not the user's to give."""
    if any(character in encoder_name for character in ":/\\"):
        raise UserError(f"{SETTING}.encoder_name={encoder_name}: expected the plain name of an architecture, such as "
                        "resnet50. Give weights as model.discriminative.backbone.")  # fmt: skip
    for key in options or {}:
        if key in RESERVED:
            raise UserError(f"{SETTING}.options.{key} is not an option: expected none of {', '.join(RESERVED)}. Leave "
                            "it out; weights are model.discriminative.backbone.")  # fmt: skip


def pools_images(net: nn.Module) -> bool:
    """Whether a BatchNorm sees one vector an image: behind a pool to one value, in the same sequence."""
    sequences = (list(part) for part in net.modules() if isinstance(part, nn.Sequential) and len(part))
    return any(
        isinstance(pool, nn.AdaptiveAvgPool2d)
        and pool.output_size in (1, (1, 1))
        and any(isinstance(norm, nn.modules.batchnorm._BatchNorm) for part in behind for norm in part.modules())
        for pool, *behind in sequences
    )


@contextmanager
def explain_arguments(said: str) -> Iterator[None]:
    """Turn what a package raises for its own arguments into one UserError line; only its call belongs inside."""
    try:
        yield
    # RuntimeError: a tag that timm doesn't know
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"{SETTING}: {said} cannot be built: {in_one_line(error)}. Correct encoder_name or options."
        ) from error


@contextmanager
def explain_images(encoder_name: str, pixels_B3HW: Tensor) -> Iterator[None]:
    """Turn what a package, or BatchNorm of one value, says against images into one UserError line.

    Only the package's call belongs inside.

    Args:
        pixels_B3HW: before they are padded.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OF_SIZES.search(str(error)):
            raise
        images, _, height, width = pixels_B3HW.shape
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"{SETTING}.encoder_name={encoder_name} refuses {images} images of {height} x {width} px: {why}; expected "
            "another size or more images. Give the option for any size, see docs/networks.md, or raise the batch size."
        ) from error


class ForeignNet(ConvolutionalNet):
    """A net around a module of another package, whose weights start as that package has it."""

    def adopt(self, build: Callable[[], nn.Module], norm_act: type) -> nn.Module:
        """The module, its norms apart from their activations, and kept from transformers' initialisation.

        Args:
            norm_act: timm's BatchNormAct2d, whose `forward` does both.
        """
        with torch.device("cpu"):  # values that no file holds, such as Swin's indices, are needed when a folder is read
            module = build()
            _separate(module, norm_act)
        for part in module.modules():
            part._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        stored = module.state_dict().keys()
        buffers = module.named_buffers()
        self._constants = [(module, name, value.clone()) for name, value in buffers if name not in stored]
        return module

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module, name, value in self._constants:  # transformers empties what no file holds
            module.get_buffer(name).copy_(value)

    def padded(self, pixels_B3HW: Tensor, multiple_px: int) -> Tensor:
        """Right and down, with the mean colour, to whole multiples; itself if it has them."""
        height, width = pixels_B3HW.shape[2:]
        return pad(pixels_B3HW, (0, -width % multiple_px, 0, -height % multiple_px))

    def without_padding(self, values_BDhw: Tensor, padded_B3HW: Tensor, pixels_B3HW: Tensor) -> Tensor:
        """Values that cover a padded image to as many that cover the image alone; cut, if there is one a pixel."""
        size, whole = pixels_B3HW.shape[2:], padded_B3HW.shape[2:]
        if size == whole:
            return values_BDhw
        if values_BDhw.shape[2:] == whole:
            return values_BDhw[:, :, : size[0], : size[1]]
        down_hh, across_ww = (
            covering(count, side, before=0, patch=long / count, like=values_BDhw)
            for count, side, long in zip(values_BDhw.shape[2:], size, whole, strict=True)
        )
        return down_hh @ values_BDhw @ across_ww.T


def _separate(module: nn.Module, norm_act: type) -> None:
    """BatchNorm and activation as two modules: methods change the forward of a norm, and SyncBN replaces it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, norm_act):
                old: Any = child
                norm = nn.BatchNorm2d(
                    old.num_features, old.eps, old.momentum, affine=old.affine,
                    track_running_stats=old.track_running_stats,
                )  # fmt: skip
                norm.load_state_dict({k: v for k, v in old.state_dict().items() if k in norm.state_dict()})
                parts = nn.Sequential(OrderedDict(norm=norm, drop=old.drop, act=old.act))
                parts._forward_hooks.update(old._forward_hooks)  # by which timm takes some maps
                parent.add_module(name, parts)


def own_names(encoder: nn.Module) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """What brings weights of a whole net of timm or smp under the names of an encoder cut out of it.

    timm joins the first two parts of a name by an underscore (stages_0) or puts `model.` in front; `_separate` puts
    `norm` behind. Modules that the encoder does not have, such as the classifier, are left out; of those that it has,
    a key that is not known keeps its name.
    """
    expected, before = encoder.state_dict().keys(), ""
    while all(name.startswith(f"{before}model.") for name in expected):
        before += "model."
    roots = {name.removeprefix(before).split(".")[0] for name in expected}

    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, value in state.items():
            first, *rest = key.split(".")
            starts = [(first, rest), (f"{first}_{rest[0]}", rest[1:])] if rest else [(first, rest)]
            names = [before + ".".join([start, *parts]) for start, parts in starts]
            names += [".norm.".join(name.rsplit(".", 1)) for name in names]
            found = next((name for name in names if name in expected), None)
            if found or any(start in roots for start, _ in starts):
                out[found or key] = value
        add_counters(out)
        return out

    return renamed
