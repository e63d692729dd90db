"""Data: readers, the generated pair, training and evaluation batches, label pictures."""

from .build import build_dataset, dataset_of
from .check import DataReport, check_data
from .classes import CITYSCAPES_16, CITYSCAPES_19, IGNORE, THIRTEEN_OF_SIXTEEN, ClassSet
from .dataset import Dataset, Problem
from .loading import Batch, eval_batches, image_tensor, train_batches
from .mixing import class_mixed, with_class_mix
from .palette import colourise, overlay, read_label_png, write_label_png
from .pseudo import with_pseudo_labels
from .statistics import class_counts, class_frequency

__all__ = [
    "CITYSCAPES_16",
    "CITYSCAPES_19",
    "IGNORE",
    "THIRTEEN_OF_SIXTEEN",
    "Batch",
    "ClassSet",
    "DataReport",
    "Dataset",
    "Problem",
    "build_dataset",
    "check_data",
    "class_counts",
    "class_frequency",
    "class_mixed",
    "colourise",
    "dataset_of",
    "eval_batches",
    "image_tensor",
    "overlay",
    "read_label_png",
    "train_batches",
    "with_class_mix",
    "with_pseudo_labels",
    "write_label_png",
]
