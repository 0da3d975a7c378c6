"""The files of a stock classifier to import, rewritten if only transformers can read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from de3.export.classifier import Describe, OldFormError, describe
from de3.export.hub import OLD_FILES, fetch
from de3.model_store.store import MANIFEST


@contextmanager
def original_of(name: str, describe: Describe = describe) -> Iterator[Path]:
    """Yield the local folder of a stock classifier, given as a folder or hub id, in file formats that de3 reads.

    Other formats are rewritten into a temporary folder, which needs the train extra. Raises ValueError for a
    classifier that cannot be imported.
    """
    folder = Path(name).expanduser()
    if (folder / MANIFEST).exists():
        raise ValueError(f"{name} is an exported model already: de3 serve --store {folder.parent.parent}")
    try:
        source, is_old = fetch(name, describe), False
    except OldFormError as error:
        try:
            from de3.training import pretrained
        except ImportError:
            raise error from None
        source, is_old = fetch(name, describe, OLD_FILES), True
    if not is_old:
        yield source
        return
    with TemporaryDirectory(prefix="de3-") as made:
        pretrained.rewrite(name, source, Path(made))
        yield Path(made)
