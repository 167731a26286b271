"""Mask2Former of transformers (Cheng et al. 2022).

# B images  3 RGB  H W image px  C dataset classes  n C classes and no object  Q queries  h w logits, about px / 4
# D channels  L layers of the decoder
"""

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, initialization
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from segadapt.models.discriminative import Outputs, Queries
from segadapt.models.discriminative.mmseg import Scored

FLOOR = 1e-6  # of a class in the semantic map, which lies in 0..Q


def semantic_map(class_BQn: Tensor, mask_BQhw: Tensor) -> Tensor:
    """How much the queries say for each class, [B, C, h, w], float32: sum of p(class) times p(pixel is in the mask).

    Cheng et al. 2022, appendix "semantic segmentation inference". A pixel's sum over classes is not 1.

    Args:
        class_BQn: logits of C classes and, last, of no object.
        mask_BQhw: logits.
    """
    with torch.autocast(class_BQn.device.type, enabled=False):
        at_least = torch.float64 if class_BQn.dtype == torch.float64 else torch.float32
        probability_BQC = class_BQn.to(at_least).softmax(dim=2)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", probability_BQC, mask_BQhw.to(at_least).sigmoid())


def _logits(class_BQn: Tensor, mask_BQhw: Tensor) -> Tensor:
    """Whose softmax is the semantic map divided by its sum over classes."""
    return (semantic_map(class_BQn, mask_BQhw) + FLOOR).log()


def _as_torch_begins(linear: nn.Linear) -> None:
    initialization.kaiming_uniform_(linear.weight, a=5**0.5)
    bound = linear.in_features**-0.5
    initialization.uniform_(linear.bias, -bound, bound)


def _begin(model: Mask2FormerModel) -> None:
    """Weights as its authors begin (their msdeformattn.py and mask2former_transformer_decoder.py).

    transformers' own start depends on its version: in 5.17 the queries begin almost alike. What its versions agree on
    stays: Swin, the layers of the decoder, the deformable attention.
    """
    decoder, module = model.pixel_level_module.decoder, model.transformer_module
    initialization.normal_(decoder.level_embed)
    for conv in decoder.modules():
        if isinstance(conv, nn.Conv2d):
            initialization.kaiming_uniform_(conv.weight, a=1)
    for conv in decoder.input_projections.modules():
        if isinstance(conv, nn.Conv2d):
            initialization.xavier_uniform_(conv.weight)
    for name, linear in decoder.encoder.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith((".fc1", ".fc2")):
            initialization.xavier_uniform_(linear.weight)
    for embedding in (module.queries_embedder, module.queries_features, module.level_embed):
        initialization.normal_(embedding.weight)
    for linear in module.decoder.mask_predictor.modules():
        if isinstance(linear, nn.Linear):
            _as_torch_begins(linear)


class SemanticMask2Former(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which is in losses/masks.py: the same files.

    Logits are log(semantic map + FLOOR), so that their softmax is the map divided by its sum over classes.
    """

    # the loss's weight of no object; it scores nothing
    _keys_to_ignore_on_load_unexpected = [r"criterion\.empty_weight"]  # noqa: RUF012

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        _begin(self.model)
        self.class_predictor = nn.Linear(config.hidden_dim, (config.num_labels or 0) + 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self._modules.get("class_predictor"):
            _as_torch_begins(self.class_predictor)

    def forward(self, pixel_values: Tensor) -> Scored:
        """Normalised images [B, 3, H, W]."""
        found = self.model(pixel_values=pixel_values, output_hidden_states=True)
        queries_QBD = found.transformer_decoder_intermediate_states[-1]  # behind the last layer and its norm
        class_BQn = self.class_predictor(queries_QBD.transpose(0, 1))
        return Scored(_logits(class_BQn, found.masks_queries_logits[-1]))

    def outputs(self, pixel_values: Tensor) -> Outputs:
        """For training: logits as above, the features that each query's mask is a product with, all layers' queries."""
        found = self.model(pixel_values=pixel_values, output_hidden_states=True)
        queries_LQBD = found.transformer_decoder_intermediate_states  # the first: before any layer
        class_LBQn = tuple(self.class_predictor(queries_QBD.transpose(0, 1)) for queries_QBD in queries_LQBD)
        mask_LBQhw = tuple(found.masks_queries_logits)
        logits_BChw, features_BDyx = _logits(class_LBQn[-1], mask_LBQhw[-1]), found.pixel_decoder_last_hidden_state
        return Outputs(logits_BChw, None, features_BDyx, queries=Queries(class_LBQn, mask_LBQhw))
