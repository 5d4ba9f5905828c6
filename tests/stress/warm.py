"""Imported before any test process is forked, so that none of them waits for it: most of the second and a half that a tiny
run would else take before it has a directory."""

import tensorboard.summary.writer.event_file_writer  # noqa: F401
import torch._dynamo  # torch's optimisers import it
import torch.utils.tensorboard  # noqa: F401

from fastrobust import __main__  # noqa: F401
from fastrobust.data.loaders import resident  # noqa: F401
from fastrobust.data.prepared import writing  # noqa: F401
from fastrobust.evaluation import command  # noqa: F401
from fastrobust.models import mnist_net, preact_resnet  # noqa: F401
from fastrobust.runtime import torchvision_compat  # noqa: F401
from fastrobust.train import optimizers, plan, schedules, start  # noqa: F401
from fastrobust.train.methods import fgsm, free, n_fgsm, pgd, standard  # noqa: F401
from fastrobust.verification import decide  # noqa: F401
