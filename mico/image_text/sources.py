"""Image-text data from LLaVA-Instruct JSON and webdataset archives.

A sample is a conversation, about one picture or about none. What is wrong with the rows of a file is told before any
model is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mico.errors import UserError

ANNOTATIONS, ARCHIVE = (".json", ".jsonl"), ".tar"
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
PLACEHOLDER = "<image>"  # in the rows of LLaVA-Instruct; a processor's own may differ
CAPTION_PROMPT = "Provide a brief description of the given image."  # asked of a picture that has but a caption
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_SHOWN = 3  # bad rows that an error names
_PADDING = 2**20  # bytes behind the end of an archive, at most
_WHOLE = "fetch it again, or pack it anew with tar"


@dataclass(frozen=True)
class Picture:
    """Where a picture lies: a file, or `size` bytes of an archive from `start` on."""

    path: Path
    name: str
    start: int = 0
    size: int | None = None

    def open(self) -> Image.Image:
        """The picture in RGB. Raises UserError naming it when it cannot be read."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.start)
                data = stream.read(-1 if self.size is None else self.size)
            with Image.open(io.BytesIO(data)) as picture:
                return picture.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # the formats of Pillow fail in many ways
            raise UserError(f"{self.name}: the picture cannot be read ({_reason(error)}): replace it") from None


@dataclass(frozen=True)
class Sample:
    """A conversation of questions and answers; the picture, where there is one, stands before the first question."""

    turns: tuple[tuple[str, str], ...]
    picture: Picture | Image.Image | None
    place: str  # file and row, for messages

    def opened(self) -> Image.Image | None:
        """The picture itself."""
        return self.picture.open() if isinstance(self.picture, Picture) else self.picture


@dataclass(frozen=True)
class ImageTextSource:
    """Samples, where they came from, and the sha256 of what was read (of an archive: of its texts and their names).

    left_out: turns without their other half, at the ends of conversations.
    """

    name: str
    samples: tuple[Sample, ...]
    origin: str
    sha256: str
    left_out: int = 0


def is_image_text(name: str | None) -> bool:
    """Whether `--calib NAME` is a file or folder of image-text data."""
    return name is not None and (Path(name).suffix in (*ANNOTATIONS, ARCHIVE) or Path(name).is_dir())


def load_image_text(path: str | Path, image_folder: str | Path | None = None) -> ImageTextSource:
    """Read a LLaVA-Instruct file (`.json`, `.jsonl`), a webdataset archive (`.tar`) or a folder of such archives.

    image_folder: what the paths of the pictures in a LLaVA-Instruct file start from; None: the folder of the file.
    Raises UserError in one line naming the file and the rows that are wrong, or whose picture is missing.
    """
    path = Path(path)
    if path.suffix in ANNOTATIONS:
        if image_folder is not None and not Path(image_folder).is_dir():
            raise UserError(f"--image-folder {image_folder} is not a folder: give the one that holds the pictures")
        return _from_annotations(path, Path(image_folder) if image_folder else path.parent)
    if image_folder is not None:
        raise UserError(f"--image-folder {image_folder}: {path} holds its pictures itself, leave the option out")
    archives = sorted(path.glob(f"*{ARCHIVE}")) if path.is_dir() else [path]
    if not archives:
        raise UserError(f"{path}: no {ARCHIVE} file in this folder: give a LLaVA-Instruct JSON or webdataset archives")
    return _from_archives(path, archives)


def chosen(source: ImageTextSource, nsamples: int, seed: int) -> list[Sample]:
    """`nsamples` of the samples, drawn by `seed`, in the order of the file. Raises UserError when there are fewer."""
    if nsamples > len(source.samples):
        raise UserError(
            f"calibration asks for {nsamples} samples and {source.origin} has {len(source.samples)}: "
            f"lower --nsamples (at most {len(source.samples)})"
        )
    order = torch.randperm(len(source.samples), generator=torch.Generator().manual_seed(seed))
    return [source.samples[place] for place in sorted(order[:nsamples].tolist())]


# --- LLaVA-Instruct -------------------------------------------------------------------------------------------------


def _from_annotations(path: Path, folder: Path) -> ImageTextSource:
    raw = _bytes(path)
    samples, problems, left_out = list[Sample](), list[str](), 0
    for place, row in _rows(path, raw):
        try:
            turns, dropped = _turns(row)
            picture = _picture(row, folder)
        except UserError as error:
            problems.append(f"{place}: {error}")
        else:
            samples.append(Sample(turns, picture, f"{path}, {place}"))
            left_out += dropped
    _refuse(path, problems, len(samples))
    return ImageTextSource(path.name, tuple(samples), str(path), hashlib.sha256(raw).hexdigest(), left_out)


def _rows(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.splitlines(), 1):
            if line.strip():
                yield f"line {number}", _parsed(f"{path}:{number}", line)
        return
    content = _parsed(str(path), raw)
    if not isinstance(content, list):
        raise UserError(f"{path}: a list of rows is expected, found {type(content).__name__}: give LLaVA-Instruct JSON")
    yield from ((f"row {number}", row) for number, row in enumerate(content, 1))


def _turns(row: Any) -> tuple[tuple[tuple[str, str], ...], int]:
    """Questions with their answers, without the mark of the picture; and how many turns have no other half."""
    conversation = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(conversation, list) or not conversation:
        raise UserError("no list 'conversations'")
    said: list[tuple[int, str]] = []
    for number, turn in enumerate(conversation, 1):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"turn {number} is from {role!r:.40}: 'human' or 'gpt' is expected")
        if not isinstance(text, str):
            raise UserError(f"turn {number} has no text 'value'")
        said.append((ROLES[role], text))
    first, last = said[0][0], len(said) - (said[-1][0] == 0)
    kept = said[first:last]
    if not kept:
        raise UserError("no question with an answer")
    for number, (role, _) in enumerate(kept):
        if role != number % 2:
            raise UserError(f"turn {number + 1 + first}: questions and answers do not take turns")
    return _without_mark(kept, "image" in row), len(said) - len(kept)


def _without_mark(said: list[tuple[int, str]], seen: bool) -> tuple[tuple[str, str], ...]:
    marks = [text.count(PLACEHOLDER) for _, text in said]
    if sum(marks) > marks[0] or marks[0] > 1:
        raise UserError(f"{PLACEHOLDER} stands once, in the first question, or nowhere")
    if marks[0] and not seen:
        raise UserError(f"{PLACEHOLDER} is in the text and no 'image' in the row")
    texts = [text.replace(PLACEHOLDER, "").strip() for _, text in said]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _picture(row: dict[str, Any], folder: Path) -> Picture | None:
    if "image" not in row:
        return None
    name = row["image"]
    if not isinstance(name, str) or not name:
        raise UserError(f"'image' is {name!r:.40}: the path of one picture is expected")
    if not (folder / name).is_file():
        raise UserError(f"no picture {folder / name}")
    return Picture(folder / name, str(folder / name))


# --- webdataset -----------------------------------------------------------------------------------------------------


def _from_archives(path: Path, archives: Sequence[Path]) -> ImageTextSource:
    samples, left_out, digest = list[Sample](), 0, hashlib.sha256()
    for archive in archives:
        problems: list[str] = []
        for key, parts in _members(archive).items():
            digest.update(f"\0{key}\0".encode(errors="surrogatepass"))
            for name in ("json", "txt"):
                digest.update(parts.get(name) or b"")
            try:
                turns, dropped = _captioned(parts)
            except UserError as error:
                problems.append(f"sample {key}: {error}")
            else:
                samples.append(Sample(turns, parts["picture"], f"{archive}, sample {key}"))
                left_out += dropped
        _refuse(archive, problems, len(samples))
    return ImageTextSource(path.name, tuple(samples), str(path), digest.hexdigest(), left_out)


def _members(archive: Path) -> dict[str, dict[str, Any]]:
    """The parts of every sample: the bytes of its texts by their suffix, and where its `picture` lies.

    Files of one sample have one name up to its first dot, as webdataset has it.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(archive, "r:") as file:
            for member in file:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                parts = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix.lower() in PICTURES:
                    place = f"{archive}, {member.name}"
                    parts["picture"] = Picture(archive, place, member.offset_data, member.size)
                elif suffix in ("json", "txt"):
                    content: Any = file.extractfile(member)
                    parts[suffix] = content.read()
            end = file.offset
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror or _reason(error)}): fetch it again") from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is no uncompressed tar file ({_reason(error)}): {_WHOLE}") from None
    _check_end(archive, end)
    return found


def _check_end(archive: Path, end: int) -> None:
    """Raise UserError unless the block at `end`, where tarfile stopped, is the mark of the archive's end.

    tarfile itself takes whatever it cannot read for the end, and would lose the samples behind it.
    """
    with archive.open("rb") as file:
        file.seek(end)
        mark, behind = file.read(tarfile.BLOCKSIZE), file.read(_PADDING)
    if mark != tarfile.NUL * tarfile.BLOCKSIZE or behind.strip(tarfile.NUL):
        raise UserError(f"{archive} is cut off or broken at byte {end:,}: {_WHOLE}")


def _captioned(parts: dict[str, Any]) -> tuple[tuple[tuple[str, str], ...], int]:
    if "picture" not in parts:
        raise UserError(f"no picture ({', '.join(PICTURES)})")
    row = _parsed("its .json", parts["json"], "") if "json" in parts else {}
    if isinstance(row, dict) and "conversations" in row:
        return _turns(row | {"image": ""})
    try:
        caption = parts["txt"].decode("utf-8") if "txt" in parts else row.get("caption")
    except (UnicodeDecodeError, AttributeError):
        raise UserError("its caption is not UTF-8 text") from None
    if not isinstance(caption, str) or not caption.strip():
        raise UserError("no caption: a .txt, or 'caption' or 'conversations' in a .json, is expected")
    return ((CAPTION_PROMPT, caption.strip()),), 0


# --- shared ---------------------------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}: check the path") from None


def _parsed(where: str, raw: bytes, remedy: str = ": mend it, or fetch it again") -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nesting without end
        raise UserError(f"{where}: not JSON ({_reason(error)}){remedy}") from None


def _refuse(path: Path, problems: list[str], good: int) -> None:
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"{path}: {len(problems)} bad rows: {'; '.join(problems[:_SHOWN])}{more}: mend or remove them")
    if not good:
        raise UserError(f"{path} is empty: no sample in it: fetch it again")


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
