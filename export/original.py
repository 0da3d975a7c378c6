"""The files of a stock classifier to import, rewritten if only transformers can read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from de3.export.classifier import OldFormError, describe
from de3.export.hub import fetch
from de3.model_store.sizes import read_config
from de3.model_store.store import MANIFEST


@contextmanager
def original_of(name: str, label_names: list[str] | None = None, multi_label: bool = False) -> Iterator[Path]:
    """Yield the local folder of a stock classifier, given as a folder or hub id, in file formats that de3 reads.

    Other formats are rewritten into a temporary folder, which needs the train extra. label_names, multi_label: as in
    `describe`. Raises ValueError for a classifier that cannot be imported.
    """
    folder = Path(name).expanduser()
    if (folder / MANIFEST).exists():
        raise ValueError(f"{name} is an exported model already: de3 serve --store {folder.parent.parent}")
    try:
        found: Path | None = fetch(name, label_names, multi_label)
    except OldFormError as error:
        found = None
        try:
            from de3.training import pretrained
        except ImportError:
            raise error from None
    if found is not None:
        yield found
        return
    with TemporaryDirectory(prefix="de3-") as made:

        def check(config: Path) -> None:
            describe(name, read_config(config), label_names, multi_label)

        pretrained.rewrite(name, Path(made), check)
        yield Path(made)
