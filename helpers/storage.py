"""Where things live: the S3 connection, buckets, and files that go in, are split, and come out.

boto3 manages buckets and objects, obstore lists and reads small objects an order of magnitude faster, fsspec reaches
any other place. All of them follow the standard AWS environment, and so do pandas and papermill.
"""

import functools
import io
import itertools
import json
import os
import random
import re
import secrets
import subprocess
import sys
import threading
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from shutil import which
from urllib.parse import quote, unquote, urlsplit

import boto3
import botocore.session
import fsspec
import obstore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError, GenericError
from tqdm import tqdm

CONFIGURED_BY = re.compile("AWS_(ENDPOINT_URL|ACCESS_KEY_ID|PROFILE|WEB_IDENTITY|CONTAINER_CREDENTIALS)")
# What other libraries need to know: Rust's ask whether http is allowed, and other servers lack AWS's newer checksums.
SETTINGS = {
    "AWS_RETRY_MODE": "standard",
    "AWS_MAX_ATTEMPTS": "10",
    "AWS_ALLOW_HTTP": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
SPLITS = ("train", "val", "test")
THREADS = 32  # transfers in flight: enough to hide 40 ms a request, few enough for a small server
PAGE = 1000  # objects that an answer lists
SILENCE = 60  # seconds without a byte until a connection counts as broken, however long the transfer takes
# ImportError: "Please install gcsfs to access Google Storage"
ERRORS = BotoCoreError, ClientError, BaseError, OSError, ValueError, ImportError, zipfile.BadZipFile, zlib.error
# In the name of a variable that holds a secret, or the path of a file that does.
SECRET = "SECRET|TOKEN|PASSW|PASSPHRASE|API_KEY|KEY$|SMTP_URL|WEBHOOK|DATABASE_URL|CONNECTION_STRING"
PATH = "_(FILE|PATH|DIR)$"
REPOSITORY = Path(__file__).resolve().parent.parent
_servers = []  # their guards, kept: a server ends when its guard's standard input closes, however this process ends
_obstore_user = {}  # its process, which a forked one inherits
ended = threading.Event()  # set when the program has come to its end and waits for its threads
threading._register_atexit(ended.set)  # atexit itself comes only after all that waits in a ThreadPoolExecutor is done


class StorageError(OSError):
    """One sentence that names the endpoint, bucket or object, and the way out."""


class NotFound(StorageError):
    """The bucket, object or file does not exist."""


# ---------------------------------------------------------------------------------------------------- connection
def connect():
    """Use the S3 of the standard AWS environment or profile or, where there is none, an embedded one over `.s3/`.

    Raises StorageError when nothing answers or the key is refused.
    """
    variables = [name for name, value in os.environ.items() if value and CONFIGURED_BY.match(name)]
    configured = variables or boto3.Session().available_profiles
    if not configured:
        os.environ.update(serve(REPOSITORY / ".s3"))
    try:
        forget_connection()
        region = os.environ.get("AWS_REGION") or boto3.Session().region_name or "us-east-1"
        os.environ |= SETTINGS | os.environ | {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}  # boto3: the latter
        limits = Config(connect_timeout=5, read_timeout=20, retries={"total_max_attempts": 5})
        quick = boto3.client("s3", config=limits)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"{error}: check AWS_ENDPOINT_URL (http://host:port) and AWS_PROFILE.") from None
    with translate_errors("connecting"):
        try:
            quick.list_buckets()
        except ClientError as error:  # a key that may not list buckets can still read and write in its own, and a
            busy = error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500  # busy server may have time later
            if not busy and error.response["Error"]["Code"] not in ("AccessDenied", "403"):
                raise
    own = "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION"
    embedded = "" if configured else f" (embedded server over .s3/; to use your own set {own})"
    print(f"S3 at {quick.meta.endpoint_url}{embedded}")


def forget_connection():
    """Make each library read the environment again, of which it keeps what it has read."""
    client.cache_clear()
    _make_store.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    boto3.setup_default_session()
    if papermill := sys.modules.get("papermill.s3"):
        papermill.S3.s3_session = (None, None, None)


def serve(directory):
    """Serve a folder as S3 (rclone) on loopback until this process ends: the environment that leads libraries there."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    rclone = which("rclone", path=Path(sys.executable).parent) or "rclone"
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    # Folders are read again after a second, so that two notebooks, each with its server, see each other's objects.
    # A session of its own keeps the interrupt of a notebook from the server. The shell closes its own errors, which
    # would hide from us that the server has ended.
    guard = ["sh", "-c", '"$@" & exec 2>&-; cat >/dev/null; kill -9 $!', "guard"]
    command = [rclone, *"serve s3 --config= --addr=127.0.0.1:0 --dir-cache-time=1s".split(), str(directory)]
    environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(guard + command, env=environment, start_new_session=True, **pipes)
    output = ""
    while not (address := re.search(r"http://[0-9.]+:[0-9]+", output)):
        if not (line := server.stderr.readline()):
            raise StorageError(f"The embedded server did not start over {directory}: {output.strip() or 'no output'}")
        output += line
    threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # a full pipe would stop the server
    _servers.append(server)
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    environment = {"AWS_ENDPOINT_URL": address[0], "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    environment |= dict.fromkeys(["AWS_REGION", "AWS_DEFAULT_REGION"], "us-east-1") | SETTINGS
    return environment | dict.fromkeys(["NO_PROXY", "no_proxy"], direct)  # a company's proxy does not lead here


def use_bucket(bucket, profile=None, endpoint_url=None, region=None, unsigned=False, requester_pays=False):
    """Reach one bucket in another way than all others: public data at AWS, say, while your own store is the default.

    profile: of the AWS configuration, for its keys. unsigned: read without a key, as the AWS command line does with
    --no-sign-request. requester_pays: you pay for the transfer. The environment keeps it, also for worker processes.
    """
    options = {"profile": profile, "endpoint_url": endpoint_url, "anon": unsigned, "requester_pays": requester_pays}
    options["client_kwargs"] = region and {"region_name": region}
    options = {name: value for name, value in options.items() if value}  # as s3fs takes them
    os.environ["S3_BUCKETS"] = json.dumps(json.loads(os.environ.get("S3_BUCKETS", "{}")) | {bucket: options})
    forget_connection()


def _bucket_of(url):
    return re.match("s3://([^/]+)|", str(url))[1]  # None in any other place


def _bucket_options(bucket):
    return json.loads(os.environ.get("S3_BUCKETS", "{}")).get(bucket, {})


@functools.cache
def client(bucket=None):
    """The boto3 client: for buckets, and for objects that are put, copied or deleted."""
    options = _bucket_options(bucket)
    if bucket and not options:
        return client()  # one for all buckets that are in the same place: making one takes 0.2 s
    limits = {"max_pool_connections": THREADS, "connect_timeout": SILENCE, "read_timeout": SILENCE}
    place = {"endpoint_url": options.get("endpoint_url"), **options.get("client_kwargs", {})}
    config = Config(signature_version=botocore.UNSIGNED if "anon" in options else None, **limits)
    made = boto3.Session(profile_name=options.get("profile")).client("s3", config=config, **place)
    if "requester_pays" in options:
        add_header = lambda request, **_: request.headers.add_header("x-amz-request-payer", "requester")
        made.meta.events.register("before-sign.s3", add_header)
    return made


def store(bucket):
    """The obstore store of a bucket, to list and read objects. Raises StorageError in a forked process.

    obstore's threads do not survive a fork and would wait for ever, which is why `images.loader` uses "forkserver".
    """
    if _obstore_user.setdefault("pid", os.getpid()) != os.getpid():
        raise StorageError(
            "S3 was used before this process was forked and would hang here: "
            'use images.loader, or multiprocessing_context="forkserver" in your DataLoader.'
        )
    return _make_store(bucket)


@functools.cache
def _make_store(bucket):
    options, meta = _bucket_options(bucket), client(bucket).meta
    session = boto3.Session(profile_name=options.get("profile"))
    how = {"skip_signature": True}
    if "anon" not in options and session.get_credentials():  # botocore knows when keys expire: ask it each time
        how = {"credential_provider": Boto3CredentialProvider(session, ttl=timedelta(0))}
    how |= {"endpoint": meta.endpoint_url, "region": meta.region_name, "request_payer": "requester_pays" in options}
    limits = {"allow_http": True, "timeout": "365d", "connect_timeout": f"{SILENCE}s", "read_timeout": f"{SILENCE}s"}
    if bundle := botocore.session.get_session().get_config_variable("ca_bundle"):
        limits["root_certificate"] = Path(bundle).read_bytes()
    return obstore.store.S3Store(bucket, client_options=limits, retry_config={"max_retries": 0}, **how)


# -------------------------------------------------------------------------------------------------------- errors
@contextmanager
def translate_errors(url):
    """Turn what boto3, obstore and fsspec raise within into a StorageError of one sentence about `url`."""
    try:
        yield
    except StorageError:
        raise
    except ERRORS as error:
        raise _translate(url, error) from None


def _translate(url, error):
    text, said = f"{error} {getattr(error, 'response', '')} {error.__cause__ or ''}", str(error).partition("\n")[0]
    bucket = _bucket_of(url)
    endpoint, region = client(bucket).meta.endpoint_url, client(bucket).meta.region_name
    match = re.search(r"<Code>(\w+)</Code>|'Code': '(\w+)'|\((\w+)\) when calling", text)
    code = match[match.lastindex] if match else type(error).__name__
    if bucket and "bucket does not exist" in text:
        code = "NoSuchBucket"
    place, kind = f" at {endpoint}" if bucket else "", "name" if "://" in str(url) else "path"
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    sentences = {  # by the codes of servers and libraries
        "NoSuchBucket": f"There is no bucket {bucket!r} at {endpoint}: check the name, or create it with notebook 01 "
        "(make run NOTEBOOKS=01).",
        "NoSuchKey 404 NotFound NotFoundError FileNotFoundError": f"There is no {url}{place}: check the {kind}.",
        "BucketAlreadyExists": f"The bucket {bucket!r} at {endpoint} is somebody else's: choose another name.",
        "BucketNotEmpty": f"The bucket {bucket!r} is not empty: "
        f"delete_bucket({bucket!r}, contents=True) deletes it all.",
        "InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken UnauthenticatedError": f"{endpoint} "
        f"refuses the key ({code}): check {keys}.",
        "AccessDenied AllAccessDisabled 403 PermissionDeniedError PermissionError": f"No permission for {url} at "
        f"{endpoint}: ask its owner to allow it, or use another key.",
        "PermanentRedirect 301 AuthorizationHeaderMalformed IllegalLocationConstraintException": f"{url} is not in "
        f"{region}: set AWS_REGION to the bucket's region.",
        "NoCredentialsError PartialCredentialsError": f"No key for {endpoint}: set {keys}, or AWS_PROFILE.",
        "BadZipFile": f"{url}: {said}: the zip is damaged or cut off, download or make it again.",
    }
    sentence = next((sentence for codes, sentence in sentences.items() if code in codes.split()), None)
    silent = re.search("could not connect|time.{0,2}out|connection refused|sending request|ConnectError", text, re.I)
    if not sentence and silent:
        sentence = f"Nothing answers at {endpoint} ({url}): does the server run, is AWS_ENDPOINT_URL right?"
    sentence = sentence or f"{url}: {code}: {said}"
    return (NotFound if sentence.startswith("There is no ") else StorageError)(sentence)


def retry(call):
    """Call, and again for 13 seconds while the connection breaks or the server is busy, until the program has ended.

    For obstore's requests and the bodies of boto3, which repeats by itself what goes wrong before those.
    """
    for pause in (0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 1.6, 1.6, 1.6, 1.6, 3.2):  # seconds, 12.6 together
        try:
            return call()
        except (GenericError, HTTPClientError, IncompleteReadError) as error:
            if isinstance(error, GenericError) and not re.search("HTTP error|status code: (5|429)", str(error)):
                raise  # such as an answer that obstore cannot read
            if ended.wait(pause * random.uniform(0.5, 1.5)):  # not all at the same time
                raise
    return call()


def redact(text):
    """The text with the secrets of the environment replaced by ***, and the names of the variables that were in it."""
    leaked = set()
    for name, value in os.environ.items():
        match = re.match(r"[\w+.-]+://[^/?#]*:([^/?#]+)@", value)  # the address of a proxy or a database
        secret = re.search(SECRET, name) and not re.search(PATH, name)
        hidden = ([value] if secret else []) + ([match[1], unquote(match[1])] if match else [])
        # A short one may be a well-known default such as "minioadmin", which any text may mention.
        for secret in [secret for secret in hidden if len(secret) >= 12] + ([f":{match[1]}@"] if match else []):
            forms = {secret, repr(secret)[1:-1], quote(secret, safe="")}  # as it is, as Python shows it, in an address
            for written in forms | {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms}:  # and in a JSON file
                if written in text:
                    text = text.replace(written, "***")
                    leaked.add(name)
    return text, leaked


def parse(url):
    """Bucket and key of an s3:// URL; the key without a slash at its end. Raises StorageError for any other."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*?)/?", str(url), re.DOTALL)
    if not match:
        raise StorageError(f"{url!r} is not an s3://bucket/key URL.")
    return match.groups()


def progress(total, description, unit="B", **options):
    """The progress bar used everywhere: a line of text, which in a notebook is one output that is updated in place."""
    kernel = type(sys.stdout).__module__ == "ipykernel.iostream"  # not where a cell redirects or captures its output
    file, ascii = (io.StringIO(), False) if kernel else (sys.stdout, None)
    options |= {"unit": unit, "unit_scale": unit == "B", "unit_divisor": 1024, "ncols": 100, "mininterval": 0.25}
    bar = tqdm(total=total, desc=description, file=file, ascii=ascii, **options)
    if kernel and not bar.disable:
        from IPython.display import display

        shown = functools.cache(lambda: display({"text/plain": ""}, raw=True, display_id=True))  # not before the delay
        bar.sp = lambda line: shown().update({"text/plain": line}, raw=True)
        if not bar.delay:
            bar.refresh()
    return bar


# ---------------------------------------------------------------------------------------- several processes (torchrun)
def is_first_process():
    return os.environ.get("RANK", "0") == "0"


def broadcast(value):
    """The first process's value, in all processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch  # here: it takes a second, and one process needs neither
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState(cpu=not torch.accelerator.is_available())  # joins the other processes, if nothing has yet
        [value] = broadcast_object_list([value])
    return value


def run_in_first_process(function):
    """Decorator: only the first process calls the function; the others wait, and get its result or StorageError."""

    @functools.wraps(function)
    def call(*args, **options):
        outcome = None
        if is_first_process():
            try:
                outcome = function(*args, **options)
            except StorageError as error:
                outcome = error
        if isinstance(outcome := broadcast(outcome), StorageError):
            raise outcome
        return outcome

    return call


# ------------------------------------------------------------------------------------------ buckets and objects
def buckets():
    """Names of the buckets of this key."""
    with translate_errors(client().meta.endpoint_url):
        return [bucket["Name"] for bucket in client().list_buckets()["Buckets"]]


@run_in_first_process
def create_bucket(name):
    """Create a bucket; one that you own already is fine. Raises StorageError when it is somebody else's."""
    region, host = client(name).meta.region_name, urlsplit(client(name).meta.endpoint_url).hostname
    elsewhere = re.search(r"\.amazonaws\.com(\.cn)?$", host) and region != "us-east-1"
    location = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
    with translate_errors(f"s3://{name}"):
        try:
            client(name).create_bucket(Bucket=name, **location)
        except ClientError as error:
            code = error.response["Error"]["Code"]  # some servers say the second of one's own, too
            if code != "BucketAlreadyOwnedByYou" and (code != "BucketAlreadyExists" or name not in buckets()):
                raise


@run_in_first_process
def delete_bucket(name, contents=False):
    """Delete a bucket; one that holds objects only with `contents=True`, which deletes them too."""
    with translate_errors(f"s3://{name}"):
        if contents:
            delete(f"s3://{name}")
        client(name).delete_bucket(Bucket=name)


def objects(url):
    """The objects under a prefix: {name relative to it: {"path", "size", "e_tag", "last_modified"}}, by name."""
    prefix, items = parse(url)[1], itertools.chain.from_iterable(list_pages(url))
    return {item["path"].removeprefix(f"{prefix}/"): item for item in sorted(items, key=lambda item: item["path"])}


def list_pages(url, convert=list):
    """The objects under a prefix, up to a thousand at a time, as lists or what `convert` makes of those in a thread.

    Where there are more, folders are listed 32 at once, each from page to page, unless they are so small that an answer
    covers 32 of them. The objects of one folder come in order.
    """
    bucket, prefix = parse(url)

    def list_page(folder, after):
        """One answer, and what to ask for next: [(function, folder, the key after which to go on)]."""
        try:
            items = next(obstore.list(store(bucket), folder or None, offset=after or None, chunk_size=PAGE), [])
            names = (item["path"].removeprefix(f"{folder}/") for item in items)
            if len(items) < PAGE:
                return items, []
            if not after and 0 < len({name.split("/")[0] for name in names if "/" in name}) < THREADS:
                level = obstore.list_with_delimiter(store(bucket), folder or None)
                return level["objects"], [(list_page, name, "") for name in level["common_prefixes"]]
        except BaseError as error:
            if "Error parsing" not in str(error):
                raise
            return list_exactly(folder, after)
        if not items[-1]["size"]:  # perhaps the marker of a folder: obstore drops the slash at its end
            return list_exactly(folder, after)
        return items, [(list_page, folder, items[-1]["path"])]

    def list_exactly(folder, after):
        """The same through boto3: slower than obstore, but every key: a//b, a/./b and a/, too."""
        page = client(bucket).list_objects_v2(Bucket=bucket, Prefix=folder and f"{folder}/", StartAfter=after)
        names = {"path": "Key", "size": "Size", "e_tag": "ETag", "last_modified": "LastModified"}
        items = [{name: item[key] for name, key in names.items()} for item in page.get("Contents", ())]
        following = [(list_exactly, folder, items[-1]["path"])] if page["IsTruncated"] else []
        return [item for item in items if not item["path"].endswith("/")], following

    def convert_page(task):
        function, *place = task
        items, following = retry(lambda: function(*place))
        return convert(items), len(items), following

    tasks, bar = [(list_page, prefix, "")], progress(None, f"listing {url}", "object", delay=2)
    with translate_errors(url), bar, ThreadPoolExecutor(THREADS) as pool:
        while tasks:
            pages, tasks = pool.map(convert_page, tasks), []
            for page, count, following in pages:
                bar.update(count)
                tasks += following
                yield page


# --------------------------------------------------------------------------------------------- files at any URL
@contextmanager
def open_filesystem(url):
    """The file system and path of any fsspec URL; errors within become StorageErrors that name the URL."""
    with translate_errors(url):
        yield fsspec.url_to_fs(str(url), use_listings_cache=False, **_bucket_options(_bucket_of(url)))


def write(url, data):
    """Write bytes to any fsspec URL, whole or not at all. Of several processes (torchrun), only the first one does."""
    if not is_first_process():
        return
    with open_filesystem(url) as (filesystem, path):
        if "file" not in filesystem.protocol:  # an object appears when it is complete
            filesystem.pipe_file(path, data)
            return
        partial = Path(f"{path}.{secrets.token_hex(4)}.part")  # in the same folder, where renaming is atomic
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read(url):
    """The bytes at any fsspec URL. Raises storage.NotFound when there are none."""
    with open_filesystem(url) as (filesystem, path):
        return filesystem.cat_file(path)


def list_files(url):
    """The names of all files under any fsspec URL, relative to it, sorted; none when it does not exist."""
    with open_filesystem(url) as (filesystem, path):
        path = path.rstrip("/")  # gcsfs leaves it
        return sorted(name[len(path) + 1 :] for name in filesystem.find(path))


def find_files(url, endings):
    """The URLs of the files with one of these endings at an fsspec URL or glob, sorted. Raises NotFound without any."""
    with open_filesystem(url) as (filesystem, path):
        paths = filesystem.find(path) or {name for match in filesystem.glob(path) for name in filesystem.find(match)}
        found = sorted(map(filesystem.unstrip_protocol, paths))
    if not (urls := [name for name in found if name.endswith(endings)]):
        raise NotFound(f"There is no {' or '.join(endings)} file at {url}: check the name.")
    return urls


def read_lines(url):
    """The lines of a text file (UTF-8, also .gz) at any fsspec URL, one after the other as they arrive."""
    with open_filesystem(url) as (filesystem, path):
        with filesystem.open(path, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
            yield from file


def delete(url):
    """Delete the file at any fsspec URL and all that is under it; of several processes, only the first one does."""
    if not is_first_process():
        return
    if not str(url).startswith("s3://"):
        with open_filesystem(url) as (filesystem, path):
            filesystem.rm(path, recursive=True)
        return
    bucket, key = parse(url)
    with translate_errors(url), progress(None, f"deleting {url}", "object", delay=2) as bar:
        under = client(bucket).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key and f"{key}/")
        pages = ([item["Key"] for item in page.get("Contents", ())] for page in under)  # a//b and a/, too
        for keys in filter(None, itertools.chain(pages, [[key]] if key else [])):
            named = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            for error in client(bucket).delete_objects(Bucket=bucket, Delete=named).get("Errors", ()):
                raise ClientError({"Error": error}, "DeleteObjects")
            bar.update(len(keys))
