"""The loss of nets that answer with masks: Mask2Former (Cheng et al. 2022, section 3.2), of transformers.

B images   C classes   H W label px   L layers   Q queries   n C classes and no object   N masks of an image   h w
"""

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from segadapt.config_training import MasksSettings
from segadapt.datasets.labels import IGNORE
from segadapt.models.discriminative import Queries

TERMS = ("masks_class", "masks_bce", "masks_dice")


class MaskLoss(nn.Module):
    """Queries are matched with masks, one for each class in an image's label; each layer is matched and judged alone.

    IGNORE is in no mask, as in the published training: such pixels are negatives of all masks. Points and their
    matching are drawn from torch's global generator. It needs scipy, see check_losses.
    """

    def __init__(self, settings: MasksSettings, *, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.no_object_weight = settings.no_object_weight
        parts = (settings.class_weight, settings.mask_weight, settings.dice_weight)
        self.weights = {name: settings.weight * part for name, part in zip(TERMS, parts, strict=True)}
        config = Mask2FormerConfig(
            id2label=dict(enumerate(map(str, range(num_classes)))),
            class_weight=settings.class_weight,
            mask_weight=settings.mask_weight,
            dice_weight=settings.dice_weight,
            no_object_weight=settings.no_object_weight,
            train_num_points=settings.points,
            oversample_ratio=settings.oversample,
            importance_sample_ratio=settings.importance,
        )
        self.of_layer = _LossOfLayer(config, {})

    def forward(self, queries: Queries, label_BHW: Tensor) -> dict[str, Tensor]:
        """Values of TERMS, each the sum over layers: float32 scalars.

        masks_class: cross-entropy of all queries, the unmatched ones with the class no object and its weight, by the
        sum of weights. masks_bce, masks_dice: on sampled points, mean over masks; 0 with a graph where there are none.
        """
        class_B = [label_HW[label_HW != IGNORE].unique() for label_HW in label_BHW]  # int64 [N]; N may be 0
        pairs = zip(label_BHW, class_B, strict=True)
        mask_B = [(label_HW == class_N[:, None, None]).float() for label_HW, class_N in pairs]  # [N, H, W]
        layers = zip(queries.mask_LBQhw, queries.class_LBQn, strict=True)
        found = [self.of_layer(mask.float(), of_class.float(), mask_B, class_B) for mask, of_class in layers]
        names = ("loss_cross_entropy", "loss_mask", "loss_dice")
        return {
            ours: torch.stack([of_layer[theirs] for of_layer in found]).sum()
            for ours, theirs in zip(TERMS, names, strict=True)
        }

    def amounts(self, label_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the values of TERMS divide by: weights of the queries' classes, and masks; float64 scalars."""
        classes_C = torch.arange(self.num_classes, device=label_BHW.device)
        is_there_BC = torch.stack([(label_HW.flatten() == classes_C[:, None]).any(dim=1) for label_HW in label_BHW])
        masks_B = is_there_BC.sum(dim=1).double()
        matched = masks_B.clamp(max=self.num_queries).sum()
        weight = matched + self.no_object_weight * (len(masks_B) * self.num_queries - matched)
        return weight, masks_B.sum(), masks_B.sum()


class _LossOfLayer(Mask2FormerLoss):
    def get_num_masks(self, class_labels: list[Tensor], device: torch.device) -> Tensor:
        """Masks of this call. transformers' own asks accelerate's processes, which the training does not start."""
        return torch.tensor(max(sum(len(classes) for classes in class_labels), 1), device=device)
