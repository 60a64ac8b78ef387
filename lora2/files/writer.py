"""Atomic writing of safetensors files that never overwrites another file.

The bytes are written here and not by safetensors, so that the size of the header and the hash of the data are known before
anything is written, and a full disk raises an ordinary exception.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..util.errors import LoraError
from ..util.text import escaped

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 1 << 24
STALE_SECONDS = 24 * 3600
TEMPORARY = re.compile(r"\.lora2-[0-9a-f]{16}\.partial")


def in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors in the order of safetensors' own writer: widest dtype first, which aligns all of them, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's first bytes: the length (u64, little endian) and the JSON, padded with spaces to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in in_file_order(tensors):
        if tensor.dtype not in DTYPE_NAMES:
            raise LoraError(f"{escaped(name)} cannot be saved: LoRA files do not support {tensor.dtype}.")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The file's bytes after the header in chunks, without a copy of tensors on the CPU."""
    for _, tensor in in_file_order(tensors):
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield from (memoryview(piece.numpy()) for piece in flat.split(CHUNK_BYTES))


def write_new(folder: Path, stem: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write `stem`_00001.safetensors, or the next number above those in the folder; return the path.

    A temporary file in the same folder is written, flushed to the disk, and then renamed by a step that fails if the name is
    taken: a crash leaves no partial file under a name that ComfyUI lists, and concurrent writers get different numbers.
    Raises LoraError if the disk is full, the folder is not writable, or the stem is not a plain file name; no file remains
    in that case.
    """
    if stem in ("", ".", "..") or any(character in stem for character in "/\\:\0"):
        raise LoraError(f"'{escaped(stem)}' is not a file name. Give a name without folders, such as my_lora.")
    return write_whole(folder, tensors, metadata, lambda temporary: _publish(temporary, folder, stem))


def write_whole(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    publish: Callable[[Path], Path],
    what: str = "LoRA",
    mark: str = "",
) -> Path:
    """Write a temporary file, flush it to the disk, and call `publish` to rename it; return the new path.

    what: name of the kind of file in messages. mark: up to 15 hexadecimal digits at the start of the temporary name. Raises
    LoraError as `write_new` does; no file remains in that case.
    """
    first = header(tensors, metadata)
    temporary = folder / f".lora2-{mark}{secrets.token_hex(8)[len(mark) :]}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        try:
            with open(temporary, "xb") as file:
                file.write(first)
                for piece in data(tensors):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            path = publish(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
    except OSError as error:
        size = len(first) + sum(t.numel() * t.element_size() for t in tensors.values())
        raise LoraError(_explain(error, folder, size, what)) from error
    return path


def _publish(temporary: Path, folder: Path, stem: str) -> Path:
    """Rename the file to the first free number above all existing ones: ComfyUI caches a LoRA by its path."""
    pattern = re.compile(re.escape(stem) + r"_(\d{1,9})\.safetensors", re.IGNORECASE)
    taken = [int(match[1]) for entry in os.scandir(folder) if (match := pattern.fullmatch(entry.name))]
    number = max(taken, default=0)
    while True:
        number += 1
        path = folder / f"{stem}_{number:05d}.safetensors"
        try:
            claim(temporary, path)
        except FileExistsError:
            continue
        return path


def claim(temporary: Path, path: Path) -> None:
    """Rename the file atomically; raise FileExistsError if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError, AttributeError):
        # No hard links (FAT, some network drives): reserve the name with an empty file, then replace it.
        with open(path, "xb"):
            pass
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of crashed runs; one modified within a day may still be written by another process."""
    for entry in os.scandir(folder):
        if TEMPORARY.fullmatch(entry.name):
            try:
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.unlink(entry.path)
            except OSError:
                continue


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power failure, on systems that can flush folders (not Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _explain(error: OSError, folder: Path, size: int, what: str) -> str:
    """The message for an error of the disk: the problem, the folder, the remedy."""
    where = f"the folder {escaped(folder.name)} ({size / 1e6:.1f} MB to write)"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return f"The disk is full: the {what} was not saved in {where}. Free some space or change the folder."
    if error.errno == errno.EFBIG:
        return f"The file is larger than the disk or the system allows: the {what} was not saved in {where}."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"No permission to write: the {what} was not saved in {where}. Choose a folder that can be written."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"Not a folder: the {what} was not saved in {where}. Choose another name or folder."
    if error.errno == errno.ENAMETOOLONG:
        return f"The name is too long for the disk: the {what} was not saved in {where}. Choose a shorter name."
    return f"The {what} was not saved in {where}: {error.strerror or error}."
