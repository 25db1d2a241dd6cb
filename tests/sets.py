"""The package's image sets with their loaders: `fake(16, 0, train_size=60)` has batches of 16 and no workers."""

import functools
from dataclasses import replace

from distill.data import base, cifar10, digits, fake, fashion_mnist, imagefolder, webdataset


def loaded(make, before: int):
    """`make`, which takes batch_size and num_workers too: by name, or behind so many arguments."""

    @functools.wraps(make)
    def made(*given, batch_size=None, num_workers=None, **options):
        if batch_size is None:
            batch_size, num_workers, *rest = given[before:]
            given = [*given[:before], *rest]
        return replace(make(*given, **options), batch_size=batch_size, num_workers=num_workers)

    return made


fake, digits = loaded(fake.fake, 0), loaded(digits.digits, 0)
cifar10, fashion_mnist = loaded(cifar10.cifar10, 1), loaded(fashion_mnist.fashion_mnist, 1)
imagefolder, webdataset = loaded(imagefolder.imagefolder, 1), loaded(webdataset.webdataset, 1)
from_arrays = loaded(base.from_arrays, 5)
