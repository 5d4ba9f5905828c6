"""A loader of your own: it decodes one image after the other with Pillow, in the training process."""

import numpy as np
import torch
from PIL import Image

from fastrobust.data.batch import Batch
from fastrobust.data.loaders.base import Loader


class OneByOne(Loader):
    def decoded(self, jobs):
        for job in jobs:
            images = torch.stack([self.crop(job, place) for place in range(len(job.index))])
            yield Batch(*(t.to(self.device) for t in self.finish(images, job)))

    def crop(self, job, place):
        """The image at a place of the batch, cropped, resized and mirrored: uint8, resolution x resolution x 3."""
        image = self.data.image(int(job.index[place]))
        boxes, mirrored = job.boxes(np.array([image.height]), np.array([image.width]), place)
        top, left, height, width = boxes[0].tolist()
        box = (left, top, left + width, top + height)
        pixels = np.asarray(image.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR, box=box))
        return torch.from_numpy((pixels[:, ::-1] if mirrored[0] else pixels).copy())
