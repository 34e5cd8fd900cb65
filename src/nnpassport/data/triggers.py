"""Trigger images that were published; those that a seed gives are in `keys/pictures.py`."""

from pathlib import Path

from nnpassport.data.images import ImageSet, read_images


def read_triggers(path: str | Path, *, size: int = 32) -> ImageSet:
    """A published trigger set: a Parquet file with pictures, and labels that belong to no picture.

    At 32 pixels the column `crop32` is read if there is one (the original code crops and does not
    scale); otherwise `image` is, its middle scaled to `size`. Never cached: triggers are secrets.

    Raises:
        UnreadableDataError: it is not such a file, or a picture cannot be used.
    """
    from nnpassport.data.tables import column_names  # noqa: PLC0415 - pyarrow is slow to import

    column = "crop32" if size == 32 and "crop32" in column_names(Path(path)) else "image"
    return read_images(path, size=size, image_column=column, cache=False)
