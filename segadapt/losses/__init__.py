"""What training minimises: `Objective` is the weighted sum that train.losses asks for; one loss is one function."""

from segadapt.losses.objective import LOSSES, Objective, Terms
from segadapt.losses.settings import ClassWeights, check_losses, class_weights_of, losses_on, reduction_of

__all__ = ["LOSSES", "ClassWeights", "Objective", "Terms", "check_losses", "class_weights_of", "losses_on",
           "reduction_of"]  # fmt: skip
