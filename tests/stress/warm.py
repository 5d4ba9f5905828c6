"""Imported before any test process is forked, so that none of them waits for it: most of the second and a half that a tiny
run would else take before it has a directory."""

import tensorboard.summary.writer.event_file_writer  # noqa: F401
import torch._dynamo  # torch's optimisers import it
import torch.utils.tensorboard  # noqa: F401
