"""Class labels as users give them: by index or by name, one for all images or one for each."""

from collections.abc import Sequence

import torch

Label = int | str
Labels = Label | Sequence[Label] | torch.Tensor | None


def resolve_labels(
    class_labels: Labels, num_images: int | None, classes: int, null: int | None, names: Sequence[str] = ()
) -> tuple[list[int] | None, int]:
    """Indices of the classes, one per image (None without labels), and the number of images.

    Args:
        class_labels, num_images: as given to a pipeline's call.
        classes: classes of the model, 0 for none.
        null: label of its null class, None where it has none.
        names: name of each class.
    Raises:
        ValueError: an unknown class, labels for a model without classes, or contradictory numbers.
    """
    if class_labels is None:
        if classes and null is None:
            raise ValueError(f"this model knows {classes} classes and no null class; pass class_labels")
        return None, 1 if num_images is None else num_images
    if not classes:
        raise ValueError("this model is unconditional; leave class_labels out and pass num_images")
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.flatten().tolist()
    if isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    labels = [label_index(label, classes, null, names) for label in class_labels]
    if num_images is not None and len(labels) == 1:
        labels = labels * num_images
    if not labels or (num_images is not None and num_images != len(labels)):
        raise ValueError(f"{len(labels)} class_labels for num_images={num_images}; pass one label, or one per image")
    return labels, len(labels)


def label_index(label: Label, classes: int, null: int | None, names: Sequence[str]) -> int:
    """Index of a class given by index or by name; names come first, so that "7" may be one."""
    if isinstance(label, str):
        if label in names:
            return list(names).index(label)
        if not label.isdecimal():
            known = f"the names are {', '.join(names)}" if names else "the pipeline has no class_names"
            raise ValueError(f"there is no class named {label!r}; {known}")
        label = int(label)
    if not (0 <= label < classes or label == null):
        raise ValueError(f"class label {label} is not in 0..{classes - 1}, the classes of this model")
    return label
