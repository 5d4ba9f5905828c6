"""Import torchvision beside a torch that it was not compiled for."""

import importlib

from torch import library


def import_torchvision():
    """The torchvision module. On a CPU-only torch the published torchvision wheel fails to load its compiled operators,
    and its import then stops where it registers a shape function for an operator that is not there. Defining those two
    operators' names is enough for its models, transforms and downloads; its codecs and nms stay unusable."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise

    global _definitions  # the definitions last as long as this object
    _definitions = library.Library("torchvision", "DEF")
    _definitions.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _definitions.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
