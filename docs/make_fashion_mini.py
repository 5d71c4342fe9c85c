"""Makes the embedded Fashion-MNIST subset: ``python docs/make_fashion_mini.py fashion_mnist.npz``.

Takes an .npz file with the published splits (x_train [60000, 28, 28] uint8, y_train, x_test,
y_test), draws without replacement, from NumPy's ``default_rng(2017)``, first 240 training and
then 60 test images of each class in class order, and writes one .json file a split into
``fl_privacy/datasets/``: a PNG sheet a class, base64, because a Flower app bundle carries
text only. The indices into the published splits travel along.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 2017
PER_CLASS = {"train": 240, "test": 60}
COLUMNS = 20
TARGET = Path(__file__).resolve().parent.parent / "fl_privacy" / "datasets"


def sheet(images: np.ndarray) -> str:
    """Images [n, 28, 28] as one PNG of 20 columns, row by row, in base64."""
    n, height, width = images.shape
    grid = images.reshape(n // COLUMNS, COLUMNS, height, width).swapaxes(1, 2)
    file = io.BytesIO()
    picture = Image.fromarray(grid.reshape(n // COLUMNS * height, COLUMNS * width))
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Draw and write both splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    source = np.load(parser.parse_args().source, allow_pickle=False)
    rng = np.random.default_rng(SEED)
    for split, count in PER_CLASS.items():
        images, labels = source[f"x_{split}"], source[f"y_{split}"]
        sheets, indices = [], []
        for label in range(10):
            members = np.flatnonzero(labels == label)
            chosen = np.sort(rng.choice(members, size=count, replace=False))
            sheets.append(sheet(images[chosen]))
            indices.append(chosen.tolist())
        record = {"columns": COLUMNS, "side": 28, "indices": indices, "sheets": sheets}
        (TARGET / f"fashion_mini_{split}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
