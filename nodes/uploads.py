"""Putting a region file that somebody sends into the regions' folder. Without ComfyUI."""
from __future__ import annotations

from pathlib import Path

from ..region import RegionError
from ..region.files import region_from_bytes, write_region
from .cards import Find, look, sha256
from .names import SUFFIX, inside, safe_name, shown


class Refused(Exception):
    """An upload that is not taken: HTTP status, and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def store(name: str, content: bytes, overwrite: bool, find: Find, folder: Path) -> dict[str, str]:
    """Check a file and write it into the regions' folder. Returns its name and hash; raises Refused."""
    clean = safe_name(name)
    if not clean or not name.lower().endswith(SUFFIX):
        raise Refused(400, f'"{shown(name, 80)}" is no name for a region: it ends with {SUFFIX}.')
    try:
        region_from_bytes(content, shown(name, 80))
    except RegionError as error:
        raise Refused(400, str(error)) from None
    listed = str(Path(clean + SUFFIX))
    answer = {"name": listed, "sha256": sha256(content)}
    path, existing = folder / listed, find(listed)
    if inside(folder, str(Path(listed).parent)) is None:
        raise Refused(400, f'"{clean}" leads out of the regions\' folder, by a link: choose another name.')

    def there(found: Path) -> bool:
        """Whether this very file is there already. Another one is in the way."""
        same = look(found).sha256 == answer["sha256"]
        if not (same or overwrite):
            raise Refused(409, f'There is another region "{clean}" already.')
        return same

    if existing and there(existing):
        return answer
    try:
        write_region(path, content, overwrite)
    except FileExistsError:  # another upload was faster
        there(path)
    except RegionError as error:
        raise Refused(400, str(error)) from None
    except OSError as error:
        raise Refused(500, f"{path} cannot be written: {error.strerror or error}.") from None
    return answer
