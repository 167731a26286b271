"""What a teacher is: windows to latents, and a velocity for each class. SD3 is in sd3.py; yours needs the same members.

K windows   P (window, class) pairs   3 RGB   s window px   z y x latent channels and grid, of any stride
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:  # both import diffusers, which much in this folder does without
    from segadapt.models.generative.parallel import Parallel
    from segadapt.models.generative.sd3 import NoisyLatent


class Teacher(Protocol):
    """The generative model, in eval mode.

    Inputs and outputs live on the segmenter's device, `parallel.devices[0]`; `encode` also takes windows on the last.
    """

    @property
    def parallel(self) -> "Parallel":
        """Its net, or copies of it, and their devices: `Parallel([net], [device], parts=1)` for one net on one device.

        Under model.update.generative all of the net's parameters move; what shall not move belongs outside of it.
        """
        ...

    def encode(self, windows_K3ss: Tensor) -> Tensor:
        """Square windows, RGB in -1..1, to latents [K, z, y, y] without noise, float32, without graph.

        The loss is on this grid, whose cells cover the window evenly. Scale them so that unit noise is the right
        measure: the step mixes latents and noise as sd3.add_noise does.
        """
        ...

    def velocity(self, noisy: "NoisyLatent", pair_window_P: Tensor, pair_class_P: Tensor) -> Tensor:
        """noise - latent as predicted of each pair, given its class: [P, z, y, y], float32, no class dropped.

        With a graph unless gradients are off; called twice for the same pairs where not all fit at once, so no dropout.

        Args:
            pair_window_P: int64, index into noisy.x_t_Kzyx and noisy.sigma_K.
            pair_class_P: int64, classes of the data set, in its order.
        """
        ...

    @property
    def null_class(self) -> int:
        """What `velocity` takes in place of a class for no class; tta.method=dusa-u alone asks for it."""
        ...
