"""segadapt from Python: a segmenter of your own, or of the settings, adapted on whatever images you have.

3 RGB   H W image px   C classes   h w logits, of any stride
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segadapt import __version__
from segadapt.checkpoint import read_folder, write_folder
from segadapt.config import AdaptConfig
from segadapt.datasets.build import check_class_names, class_names
from segadapt.datasets.resize import resize_short_side, scale
from segadapt.errors import UserError
from segadapt.metrics import predict_at_label_size
from segadapt.models.build import Models, build_models
from segadapt.models.discriminative import Segmenter
from segadapt.models.discriminative.wrapped import AS_IT_IS, Wrapped
from segadapt.models.generative import Teacher
from segadapt.models.non_finite import react
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.models.set_up import devices_of
from segadapt.models.source import Prediction
from segadapt.parse import from_overrides
from segadapt.protocol import identity
from segadapt.record import plain, refuse_changes

# A run needs these; here the images come from the caller.
NOT_ASKED = {"data.data_root": None, "data.image_path": None, "data.label_path": None}
MEMBERS = [name for name in vars(Segmenter) if not name.startswith("_")]


@dataclass(frozen=True)
class Labelled:
    """What one image came to."""

    ids_HW: np.ndarray  # uint8, index into `Adapter.classes`, at the image's own size
    prediction: Prediction  # logits_Chw, loss, is_updated, ...


class Adapter:
    """A segmenter at work on a stream of images: each one is predicted, and learned from.

    Attributes:
        classes: names, in the order of the ids.
        settings: as `segadapt adapt --cfg job` shows them. Of `data` only `name` and `short_side_px` are followed, of
            `tta` not `continual` (`reset` is yours to call), `save_adapted` and `diagnose_every`; `logging` not at all.
        method: `method.segmenter` is the model as it is now, `method.save(folder)` writes its weights.
        count: images since the last reset.
    """

    def __init__(self, settings: AdaptConfig, classes: Sequence[str], models: Models):
        self.settings, self.classes, self.method, self.count = settings, tuple(classes), models.method, 0
        self._origin: dict[str, Any] = plain(identity(settings) | {"classes": self.classes})
        self._origin |= {"weights_sha256": models.fingerprints}

    def step(self, image: Any, *, key: str | None = None, task: str = "images") -> Labelled:
        """Predict one image, and learn from it; the ids are those before what is learned, unless the method says other.

        Args:
            image: RGB, [H, W, 3] or [3, H, W]; uint8, or floats in 0..1. An array, a tensor, or what
                `numpy.asarray` takes, as a PIL image in mode RGB. It is resized to data.short_side_px.
            key: names the image; all noise is drawn from (experiment.seed, task, key). None: its number since the
                last reset.
            task: names the stretch of the stream.
        Raises:
            UserError: no such image; too little memory for it; numbers that are not finite under tta.non_finite=stop.
                The next image then begins as if this one had not been.
        """
        image_3HW, size_px = _prepared(image, self.settings.data.short_side_px)
        key = str(self.count) if key is None else key
        with explain_out_of_memory(self.method, f"{key} of {task}"):
            if self.settings.tta.episodic:
                self.method.reset()
            try:
                prediction = self.method.step(image_3HW, task=task, key=key)
            except BaseException:
                self.method.forget()
                raise
            react(self.settings.tta.non_finite, self.method, prediction, what=f"{key} of {task}")
        self.count += 1
        return Labelled(predict_at_label_size(prediction.logits_Chw, size_px).cpu().numpy(), prediction)

    def flush(self) -> None:
        """Learn from what still waits for a step, with tta.optimizer.accumulate above 1."""
        self.method.flush()

    def reset(self) -> None:
        """Back to the source model, as before the first image."""
        self.method.reset()
        self.count = 0

    def save(self, folder: str | Path) -> None:
        """Write all that the next image depends on, beside the source weights.

        Raises:
            UserError: the folder is there already, or cannot be written.
        """
        path = Path(folder).expanduser()
        if path.exists():
            raise UserError(f"{path} is there already; expected a new folder. Choose another name, or remove it.")
        state = {"segadapt": __version__, "origin": self._origin, "count": self.count,
                 "method": self.method.state_dict()}  # fmt: skip
        try:
            write_folder(path, state)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}). Make room, or choose a folder of your "
                            "own.") from error  # fmt: skip

    def restore(self, folder: str | Path) -> None:
        """Go on from what `save` wrote; the next images come out as they would have there.

        Raises:
            UserError: it is not whole, or of other settings, classes or source weights.
        """
        path = Path(folder).expanduser()
        try:
            state = read_folder(path)
            origin, count, method = (state[name] for name in ("origin", "count", "method"))
        except (OSError, ValueError, KeyError, TypeError) as error:  # whatever bytes may turn into
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{path}: not a state that an adapter has saved, or damaged ({fault}). Restore another "
                            "one.") from error  # fmt: skip
        refuse_changes(path, origin, self._origin, what="The state",
                       cure="Load the adapter with the same settings, classes and source weights")  # fmt: skip
        self.method.load_state_dict(method)
        self.count = count


def load(
    overrides: Sequence[str] = (),
    *,
    segmenter: nn.Module | Segmenter | None = None,
    teacher: Teacher | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Adapter:
    """Build an adapter; its devices, threads and determinism are set for the whole process, see `runtime`.

    Args:
        overrides: as for `segadapt adapt` on the command line, such as ["tta.method=tent", "runtime=cpu"].
        segmenter: your own. A torch module is called with RGB images [B, 3, H, W] and gives logits [B, C, h, w] (or an
            object with .logits, or a dict with "out"); it is moved to the main device, and its own weights change: pass
            a copy to keep them. Or an object with all members of `Segmenter`. None: model.discriminative.checkpoint.
        teacher: your own; None: that of the settings, where the method has one.
        classes: names in the order of the logits; they are the prompts of a teacher that reads text. None: those of
            data.classes.
        mean, std: a module's own preprocessing, (image - mean) / std of RGB in 0..1; None: none.
    Raises:
        UserError: a mistake in settings, checkpoints or arguments.
    """
    settings = from_overrides("adapt", list(overrides), AdaptConfig, where_missing=NOT_ASKED)
    names = class_names(settings.data.classes) if classes is None else tuple(classes)
    check_class_names(names, "classes")
    if segmenter is not None:
        segmenter = _as_segmenter(segmenter, len(names), devices_of(settings.runtime)[0], mean, std)
    elif mean is not None or std is not None:
        raise UserError("mean and std are those of a module of your own, but no segmenter is given. Leave them out: "
                        "models of the settings know theirs.")  # fmt: skip
    return Adapter(settings, names, build_models(settings, names, segmenter=segmenter, teacher=teacher))


def _as_segmenter(
    given: Any, num_classes: int, device: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Segmenter:
    missing = [name for name in MEMBERS if not hasattr(given, name)]
    if missing and isinstance(given, nn.Module):
        if not any(True for _ in given.parameters()):
            raise UserError(f"segmenter: the {type(given).__name__} has no parameters, so nothing of it could be "
                            "adapted. Pass the module that holds the weights.")  # fmt: skip
        if halves := {p.dtype for p in given.parameters() if p.is_floating_point() and p.dtype != torch.float32}:
            raise UserError(f"segmenter: weights of {', '.join(map(str, halves))}; expected float32, which small steps "
                            "need (runtime.precision=bf16 computes in bf16 all the same). Call .float().")  # fmt: skip
        mean, std = (default if own is None else own for own, default in zip((mean, std), AS_IT_IS, strict=True))
        return Wrapped(given.to(device), num_classes, mean=mean, std=std)
    if missing:
        raise UserError(f"segmenter: a {type(given).__name__} without {', '.join(missing)}; expected a torch module, "
                        "or all members of segadapt.models.discriminative.Segmenter. Add them.")  # fmt: skip
    if mean is not None or std is not None:
        raise UserError(f"mean and std are those of a plain torch module, but the {type(given).__name__} is a "
                        "segmenter that normalises images itself. Leave them out.")  # fmt: skip
    return given


def _prepared(image: Any, short_side_px: int) -> tuple[Tensor, tuple[int, int]]:
    """float32 [3, H, W] in 0..1 at the short side, and the size that it had. UserError: see Adapter.step."""
    if isinstance(image, Tensor):
        given = image.detach()
    else:
        array = np.array(image, order="C")
        if array.dtype.kind not in "uif":
            raise UserError(f"image: a {type(image).__name__}; expected an array, a tensor or a PIL image. Open files "
                            "first.")  # fmt: skip
        given = torch.from_numpy(array)
    axes = [axis for axis in (0, 2) if given.ndim == 3 and given.shape[axis] == 3]
    if len(axes) != 1 or min(given.shape) < 3:
        raise UserError(f"image: shape {tuple(given.shape)}; expected one RGB image, [height, width, 3] or [3, height, "
                        "width]. Convert it, a PIL image by .convert('RGB').")  # fmt: skip
    image_HW3 = given if axes == [2] else given.permute(1, 2, 0)
    size_px = (image_HW3.shape[0], image_HW3.shape[1])
    if image_HW3.dtype == torch.uint8:
        return resize_short_side(image_HW3.cpu().numpy(), short_side_px), size_px
    if not image_HW3.is_floating_point():
        raise UserError(f"image: {image_HW3.dtype}; expected uint8, or floats in 0..1. Convert it.")
    low, high = image_HW3.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"image: floats from {low:g} to {high:g}; expected 0..1, before any normalisation. Divide by "
                        "255, or pass uint8.")  # fmt: skip
    return scale(image_HW3.permute(2, 0, 1).float(), short_side_px).contiguous(), size_px
