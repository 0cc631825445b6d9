"""Unpack a zip of class folders into a bucket."""

import functools
import re
import zipfile
from collections import Counter
from pathlib import Path

import fsspec

from helpers.storage import PART, SPLITS, StorageError, put_all, translate_errors


def unzip(archive, url, max_bytes=100 * 2**30, max_ratio=100):
    """Put the files of a zip of class folders into a bucket, streamed: nothing is unpacked to disk, memory stays small.

    archive: path or any fsspec URL, s3:// included. Class folders at the zip's root or under one top folder go to
    `url`/raw/{class}/…; with train/, val/ and test/ above them they go to `url`/{train,val,test}/{class}/….
    Returns {"layout": "classes" | "split", "uploaded": n, "skipped": n (there already), "ignored": n}.
    Raises StorageError, before anything is put, for what is not a zip, encrypted members, names that leave the folder,
    and more than `max_bytes` in all or `max_ratio` times its compressed size in one member (a zip bomb).
    """
    with translate_errors(archive):
        filesystem, path = fsspec.url_to_fs(str(archive))
        file = filesystem.open(path, "rb", block_size=PART // 2, cache_type="blockcache",
                               cache_options={"maxblocks": 8})
    with file:
        try:
            zipped = zipfile.ZipFile(file)
        except zipfile.BadZipFile:
            raise StorageError(f"{archive} is not a zip file, or it is cut off: download or make it again.") from None
        names, ignored = {}, Counter()
        for info in zipped.infolist():
            name = info.filename.replace("\\", "/")
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
                raise StorageError(f"{archive}: the member {name!r} would leave the folder: refused.")
            if info.flag_bits & 1:
                raise StorageError(f"{archive}: the member {name!r} is encrypted: zip it again without a password.")
            if info.file_size > max(max_ratio * info.compress_size, 2**20):
                raise StorageError(f"{archive}: the member {name!r} unpacks to over {max_ratio} times its size: "
                                   "refused as a zip bomb (raise max_ratio if you trust it).")
            if name.endswith("/"):
                ignored["folders"] += 1
            elif "__MACOSX" in parts or any(part.startswith(".") or part == "Icon\r" for part in parts):
                ignored["hidden files"] += 1
            elif re.search(r"[\x00-\x1f\x7f]", name):
                raise StorageError(f"{archive}: the member {name!r} has control characters in its name: rename it.")
            elif names.setdefault(tuple(parts), info) is not info:
                raise StorageError(f"{archive}: the member {name!r} is in it twice: refused.")
        if (total := sum(info.file_size for info in names.values())) > max_bytes:
            raise StorageError(f"{archive} unpacks to {total:,} bytes, over {max_bytes:,}: refused as a zip bomb "
                               "(raise max_bytes if you trust it).")
        layout, named = _layout(archive, names)
        ignored["files outside class folders"] = len(names) - len(named)
        print(f"{Path(archive).name}: {layout}; {len(named):,} files, ignored: "
              + (", ".join(f"{count} {what}" for what, count in ignored.items() if count) or "nothing"))
        split_already = layout.startswith("split")
        counts = put_all([("/".join(parts if split_already else ("raw", *parts)), info.file_size,
                            functools.partial(zipped.open, info)) for parts, info in named.items()],
                          url, f"unzipping {Path(archive).name}")
    return {"layout": "split" if split_already else "classes", **counts, "ignored": ignored.total()}


def _layout(archive, names):
    """How the zip is laid out, in words, and its members {(class, …, file) or (split, class, …, file): info}."""
    words, tops = "class folders at the root", {parts[0] for parts in names if len(parts) > 1}
    if len(tops) == 1 and any(len(parts) > 2 for parts in names):
        words = f"class folders under {next(iter(tops))}/"
        names = {parts[1:]: info for parts, info in names.items() if parts[0] in tops}
        tops = {parts[0] for parts in names if len(parts) > 1}
    alias = {**dict(zip(SPLITS, SPLITS)), "valid": "val", "validation": "val"}
    if len(tops & alias.keys()) > 1:
        names = {(alias[parts[0]], *parts[1:]): info for parts, info in names.items() if parts[0] in alias}
        if missing := sorted(set(SPLITS) - {parts[0] for parts in names}):
            raise StorageError(f"{archive} is split already but has no {' and no '.join(missing)} folder: add it, or "
                               "put all class folders at the zip's root to have them split here.")
        return "split already, into train/, val/ and test/", {parts: i for parts, i in names.items() if len(parts) > 2}
    if not tops:
        raise StorageError(f"{archive} holds no class folders: put the images of each class into a folder of its own.")
    return words, {parts: info for parts, info in names.items() if len(parts) > 1}
