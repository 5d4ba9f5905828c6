"""A look at image files before hours are spent on them: which cannot be decoded, and whether they are grey."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from fastrobust.data import formats
from fastrobust.data.formats import Member
from fastrobust.data.held_out import evenly_spaced
from fastrobust.runtime import limits
from fastrobust.runtime.errors import DataError
from fastrobust.runtime.progress import Progress

WHOLE = 20_000  # so many images are decoded at the start of a run; of more, the beginnings and ends of the files are read
SAMPLE = 1000  # files by which a folder is judged to be grey
GREY = ("1", "L", "LA")  # Pillow's modes
END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what the last bytes of a whole file hold


def left_out(members: list[Member], skip: bool) -> dict[int, str]:
    """The images that a run goes on without, where it may `skip` any, and why. Raises Unusable where it may not, or where
    nothing would be left."""
    found = unusable(members, thorough=skip)
    if found and (not skip or len(found) == len(members)):
        raise formats.Unusable(list(found.values()))
    return {i: str(error) for i, error in found.items()}


def unusable(members: list[Member], thorough: bool) -> dict[int, DataError]:
    """The numbers of the images that cannot be used, and why. Thorough: all are decoded; else a set of more than `WHOLE`
    is judged by the header and the end of each file, and an image is decoded where these do not look right."""
    whole = thorough or len(members) <= WHOLE
    look, size = formats.open_upright if whole else quick, 64

    def bad(start: int) -> dict[int, DataError]:
        found = {}
        for i, member in enumerate(members[start : start + size], start):
            try:
                look(member)
            except DataError as error:
                found[i] = error
        return found

    found = {}
    with ThreadPoolExecutor(limits.cores()) as pool, Progress("check images", len(members)) as bar:
        for start, part in zip(range(0, len(members), size), pool.map(bad, range(0, len(members), size)), strict=True):
            found |= part
            bar.advance(min(size, len(members) - start), f"{len(found)} unusable" if bar.due() else None)
    return found


def quick(member: Member) -> None:
    """Raise DataError for an image that cannot be used, as far as its header and the end of its file show."""
    try:
        start, end = member.ends()
        with Image.open(io.BytesIO(start)) as image:
            if END[image.format] in end and not image.mode.startswith(formats.DEEP):
                return
    except Exception:  # a long header, a format without an end, a damaged file: to be decoded
        pass
    formats.open_upright(member)


def grey_files(members: list[Member]) -> tuple[int, int]:
    """(how many of a sample are grey, how many were looked at), judged by the files' headers: a colour image whose pixels
    happen to be grey counts as colour. Files that cannot be read are passed over."""
    sample = [members[i] for i in evenly_spaced(len(members), SAMPLE)]
    with ThreadPoolExecutor(limits.cores()) as pool:
        modes = [mode for mode in pool.map(mode_of, sample) if mode]
    return sum(mode in GREY for mode in modes), len(modes)


def mode_of(member: Member) -> str | None:
    reads: list[Callable[[], bytes]] = [lambda: member.ends()[0], member.read]
    for read in reads:  # a header may be longer than the beginning
        try:
            with Image.open(io.BytesIO(read())) as image:
                return image.mode
        except Exception:  # whatever is wrong with it, whoever decodes it says so
            continue
    return None
