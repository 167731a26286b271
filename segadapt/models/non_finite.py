"""tta.non_finite: what a run does when loss, gradient or prediction of an image is not finite."""

from segadapt.errors import UserError
from segadapt.models.source import Prediction, Source


def react(policy: str, method: Source, prediction: Prediction, *, what: str) -> bool:
    """Whether `method` went back to its source state. With such an image it has taken no step by then.

    Args:
        policy: skip (nothing more is done), reset, or stop.
        prediction: of the image; without a loss there is nothing to react to.
        what: the image and its task, for the message.
    Raises:
        UserError: policy stop.
    """
    if prediction.loss is None or (prediction.is_finite and prediction.is_step_finite):
        return False
    if policy == "stop":
        logits = "finite" if prediction.is_finite else "not finite"
        raise UserError(
            f"{what}: loss {prediction.loss:g}, gradient norm {prediction.grad_norm:g}, logits {logits}; expected "
            "finite numbers, and tta.non_finite=stop ends the run. Lower tta.optimizer.lr, set runtime.precision=fp32, "
            "or go on with tta.non_finite=skip or reset."
        )
    if policy == "reset":
        method.reset()
    return policy == "reset"
