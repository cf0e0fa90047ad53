"""What a file is that is no ONNX model, said from its first bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

_MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"\x1f\x8b": "a gzip archive",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x93NUMPY": "a NumPy array",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}


def foreign(path: Path, head: bytes, size: int) -> str:
    """What a file is that is no ONNX model, or an empty string."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        return "empty"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith(b"<?xml"):
        return "XML (OpenVINO?)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "a safetensors file"
    if head[4:8] in (b"TFL3", b"ORTM"):
        return "a TensorFlow Lite model" if head[4:8] == b"TFL3" else "an ONNX Runtime (.ort) model"
    if text.startswith((b"{", b"ir_version", b"<ir_version", b"<")) and b"\0" not in head:
        return "text, not the binary form"
    return ""


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rsplit("/", 1)[-1] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        return "a damaged zip archive"
    if any(name.startswith("serialized_exported_program") or name == "archive_format" for name in names):
        return "a torch.export program (.pt2); export it to ONNX"
    if "data.pkl" in names:
        return "a PyTorch checkpoint; export the model to ONNX"
    return "NumPy arrays (.npz)" if all(name.endswith(".npy") for name in names) else "a zip archive"
