"""helpers.storage on real servers: the embedded one (rclone), moto and, where it is installed, Ceph.

Requests go over HTTP, faults come from a proxy in between, and processes are killed for real; nothing is mocked.
"""

import contextlib
import json
import os
import random
import re
import resource
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import traceback
import zipfile
from types import SimpleNamespace

import boto3
import fsspec
import nbformat
import obstore
import psutil
import pytest
import trustme
from papermill.iorw import load_notebook_node, papermill_io
from servers import free_port, listening, wait_until
from servers.embedded import cleaned, connected
from servers.fault_proxy import fault_proxy

from helpers import storage
from helpers.chapters import zips

MB = 2**20
pytestmark = pytest.mark.usefixtures("clean_environment")
PETS = {"cats/1.png": b"cat one", "cats/2.png": b"cat two", "dogs/1.png": b"dog one"}

# Its argument is the folder that has the .s3; it tells its environment, outlives Ctrl-C and ends with its input.
OWNER = """
import json, os, signal, sys
from pathlib import Path
from helpers import storage
storage.REPOSITORY = Path(sys.argv[1])
storage.connect()
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"interrupted\\n"))  # print may be at work
print(json.dumps({name: value for name, value in os.environ.items() if "AWS" in name}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["embedded"])
def s3(request):
    """A new bucket, as URL; this process is connected to the server in question."""
    connect(request.getfixturevalue(f"{request.param}_env"))
    return new_bucket()


every = pytest.mark.parametrize("s3", ["embedded", "ceph"], indirect=True)  # where servers may well differ
buckets = pytest.mark.parametrize("s3", ["moto", "ceph"], indirect=True)  # whose keys are no paths on a disk


def connect(env, **more):
    """Connect this process with these settings."""
    os.environ.update(env, **more)
    storage.connect()


@contextlib.contextmanager
def proxied(**settings):
    """This process connected through a proxy."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], **settings) as proxy:
        with connected(os.environ | {"AWS_ENDPOINT_URL": proxy.url}):
            yield proxy


def new_bucket():
    name = f"test-{secrets.token_hex(6)}"
    storage.create_bucket(name)
    return f"s3://{name}"


def put(url, members):
    """Put {name: content} under a prefix, with boto3."""
    bucket, prefix = storage.parse(url)
    for name, data in members.items():
        storage.client().put_object(Bucket=bucket, Key=f"{prefix}/{name}".lstrip("/"), Body=data)


def listed(url):
    """What is under a prefix, listed with boto3: {name: (size, ETag, time)}."""
    bucket, prefix = storage.parse(url)
    pages = storage.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    items = {item["Key"][len(prefix) :].lstrip("/"): item for page in pages for item in page.get("Contents", ())}
    return {name: (item["Size"], item["ETag"], item["LastModified"]) for name, item in items.items()}


def content(url):
    """What is under a prefix, read with boto3: {name: bytes}."""
    bucket, prefix = storage.parse(url)
    read = lambda name: storage.client().get_object(Bucket=bucket, Key=f"{prefix}/{name}".lstrip("/"))["Body"].read()
    return {name: read(name) for name in listed(url)}


def folder(path, members):
    """Write {name: bytes} into a folder."""
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    """A zip of {name: bytes}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@contextlib.contextmanager
def refused(*words, kind=storage.StorageError):
    """A StorageError of one sentence with these words, with neither a secret nor botocore's own traceback in it."""
    with pytest.raises(kind) as caught:
        yield
    said, shown = str(caught.value), "".join(traceback.format_exception(caught.value))
    assert "\n" not in said and len(said) <= 300
    assert not [word for word in words if word not in said], said
    assert "botocore.exceptions" not in shown and "site-packages" not in shown
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret") not in shown


def start(code, *arguments, **options):
    """A Python process, leader of its own process group."""
    options |= {"text": True, "start_new_session": True, "stdout": subprocess.PIPE, "cwd": storage.REPOSITORY}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **options)


@contextlib.contextmanager
def owner(directory, **env):
    """A process with its embedded server over directory/.s3: process, the line it has printed, and its settings."""
    with start(OWNER, directory, env=os.environ | env, stdin=subprocess.PIPE) as process:
        yield process, process.stdout.readline(), json.loads(process.stdout.readline())
        process.kill()


def get_with_obstore(url):
    bucket, key = storage.parse(url)
    with storage.translate_errors(url):
        obstore.get(storage.store(bucket), key).bytes()


def test_connect_uses_the_standard_environment_starts_nothing_and_takes_new_settings(embedded_env, moto_env, capfd):
    servers = len(storage._servers)
    for env in embedded_env, moto_env:
        connect(env)
        assert storage.client().meta.endpoint_url == env["AWS_ENDPOINT_URL"] and len(storage._servers) == servers
        assert capfd.readouterr().out == f"S3 at {env['AWS_ENDPOINT_URL']}\n"
        papermill_io.write("{}", f"{new_bucket()}/page.ipynb")  # papermill has a session of its own
    del os.environ["AWS_DEFAULT_REGION"]
    connect({"AWS_REGION": "eu-9"})
    assert storage.client().meta.region_name == boto3.Session().region_name == "eu-9"


def test_libraries_work_without_arguments_after_connect(s3):
    boto3.client("s3").put_object(Bucket=s3[5:], Key="a", Body=b"boto3")
    obstore.put(obstore.store.S3Store(s3[5:]), "b", b"obstore")
    papermill_io.write(nbformat.writes(nbformat.v4.new_notebook()), f"{s3}/c.ipynb")
    assert load_notebook_node(f"{s3}/c.ipynb").nbformat == 4
    with fsspec.open(f"{s3}/a") as file:
        assert file.read() == b"boto3"
    assert content(s3).items() >= {"a": b"boto3", "b": b"obstore"}.items()


def test_an_embedded_server_keeps_its_secret_and_its_data_survives_an_interrupt_and_ends_with_its_process(tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"  # a proxy behind which it is not looked for
    soon = lambda ready, seconds: wait_until(ready, "it", os.devnull, seconds=seconds)
    with owner(tmp_path, HTTP_PROXY=nowhere, http_proxy=nowhere) as (process, line, env), owner(tmp_path) as other:
        assert env["AWS_ENDPOINT_URL"] in line and "embedded server over .s3/" in line
        assert env["AWS_SECRET_ACCESS_KEY"] not in line
        words = [word for one in psutil.process_iter(["cmdline"]) for word in one.info["cmdline"] or ()]
        assert str(tmp_path / ".s3") in words and env["AWS_SECRET_ACCESS_KEY"] not in "".join(words)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        connect(env)
        put(url := new_bucket(), PETS)
        connect(other[2])  # another notebook over the same folder sees what is new there, now that its cache holds it
        soon(lambda: url[5:] in storage.buckets() and listed(url), 2)
        connect(env)
        put(url, {"cats/3.png": b"three"})
        connect(other[2])
        soon(lambda: "cats/3.png" in listed(url), 2)
        process.kill(), other[0].stdin.close()
        for settings in env, other[2]:
            soon(lambda: not listening(int(settings["AWS_ENDPOINT_URL"].rpartition(":")[2])), 5)
        assert (process.wait(), other[0].wait()) == (-signal.SIGKILL, 0)
    connect(storage.serve(tmp_path / ".s3"))
    assert content(url) == PETS | {"cats/3.png": b"three"}


def test_a_forked_process_says_why_it_cannot_go_on_and_does_not_hang(s3):
    storage.objects(s3)
    if not (pid := os.fork()):
        signal.alarm(20)
        try:
            with refused("forkserver"):
                storage.objects(s3)
            os._exit(42)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_the_default_profile_is_used_and_its_temporary_keys_are_renewed_when_they_expire(moto_env, tmp_path):
    """A command gives keys that are valid for a minute, and another one each time that it is asked."""
    connect(moto_env)
    put(s3 := new_bucket(), PETS)
    (script := tmp_path / "keys.sh").write_text("""
echo >> "$0.count"
echo '{"Version": 1, "AccessKeyId": "key'$(wc -l < "$0.count")'", "SecretAccessKey": "secret", "SessionToken": "token",
       "Expiration": "'$(date -u -d "1 minute" +%FT%TZ)'"}'
""")
    with fault_proxy(moto_env["AWS_ENDPOINT_URL"]) as proxy, cleaned():
        settings = f"credential_process = sh {script}\nendpoint_url = {proxy.url}\nregion = eu-central-1\n"
        (tmp_path / "config").write_text(f"[default]\n{settings}")
        connect({"AWS_CONFIG_FILE": str(tmp_path / "config")})
        assert storage.client().meta.region_name == os.environ["AWS_REGION"] == "eu-central-1"
        used = set()
        for _ in range(2):
            get_with_obstore(f"{s3}/cats/1.png")
            used.add(re.search(r"Credential=(\w+)", proxy.headers["authorization"])[1])
        assert len(used) == 2


def test_a_slow_link_is_not_taken_for_a_silent_one(s3, monkeypatch):
    put(s3, {"slow": bytes(4 * MB)})
    monkeypatch.setattr(storage, "SILENCE", 0.5)
    with proxied(speed=4 * MB) as proxy:
        begin, requests = time.monotonic(), proxy.requests
        get_with_obstore(f"{s3}/slow")
        assert time.monotonic() - begin > 0.9 and proxy.requests == requests + 1, "nothing is repeated"


def test_buckets_are_reached_in_other_ways(moto_env, ceph_env, tmp_path):
    """Public data, and a bucket whose readers pay, in one store, one's own in another."""
    connect(ceph_env)
    put(public := new_bucket(), PETS), put(paid := new_bucket(), PETS)
    name = public[5:]
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:ListBucket", "s3:GetObject"]}
    allowed["Resource"] = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    storage.client().put_bucket_policy(Bucket=name, Policy=policy)
    keys = {key.lower(): value for key, value in ceph_env.items() if "AWS" in key and "KEY" in key}
    (tmp_path / "credentials").write_text("\n".join(["[mine]", *map("=".join, keys.items())]))
    connect(moto_env, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"))
    put(own := new_bucket(), {"own.txt": b"own"})
    with fault_proxy(ceph_env["AWS_ENDPOINT_URL"]) as proxy:
        storage.use_bucket(name, endpoint_url=proxy.url, unsigned=True)
        storage.use_bucket(paid[5:], endpoint_url=proxy.url, profile="mine", requester_pays=True)
        head = lambda url: storage.client(url[5:]).head_bucket(Bucket=url[5:])
        for act in head, storage.objects, storage.list_files, lambda url: storage.read(f"{url}/cats/1.png"):
            for url in public, paid:
                before = proxy.requests
                act(url)
                assert proxy.requests > before
                assert ("authorization" in proxy.headers) == ("x-amz-request-payer" in proxy.headers) == (url == paid)
        storage.write(f"{paid}/new", storage.read(f"{own}/own.txt"))
        storage.delete(f"{paid}/cats")
    assert {name, paid[5:]} == json.loads(os.environ["S3_BUCKETS"]).keys(), "in worker processes, too"
    connect(ceph_env)
    assert sorted(listed(public)) == sorted(PETS) and sorted(listed(paid)) == ["dogs/1.png", "new"]


def test_a_bucket_is_created_in_its_region():
    """The requests are caught before they are sent."""
    sent = []

    def catch(params, **_):
        sent.append(re.findall("<LocationConstraint>(.*?)<", str(params["body"])))
        return SimpleNamespace(status_code=200), {}

    for endpoint in "https://s3.eu-central-1.amazonaws.com/", "https://s3.amazonaws.com.example.org":
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "eu-central-1"}
        storage.forget_connection()
        storage.client().meta.events.register("before-call.s3.CreateBucket", catch)
        storage.create_bucket("new-bucket")
    assert sent == [["eu-central-1"], []]


@every
def test_a_bucket_may_be_created_twice_and_is_deleted_when_it_is_empty_and_objects_only_under_the_prefix(s3):
    name, others = s3[5:], {"cats-and-dogs/1.png": b"3", "cat": b"4", "cats.txt": b"5"}
    put(s3, {"cats/1.png": b"1", "cats/2.png": b"2", **others})
    storage.create_bucket(name)
    with refused(name, "not empty", "contents=True"):
        storage.delete_bucket(name)
    assert name in storage.buckets() and len(storage.objects(s3)) == 5
    storage.delete(f"{s3}/cats")
    assert sorted(listed(s3)) == sorted(others)
    storage.delete(f"{s3}/cats.txt")
    assert sorted(listed(s3)) == ["cat", "cats-and-dogs/1.png"]
    storage.delete(s3)
    storage.delete_bucket(name)
    assert name not in storage.buckets()


def test_objects_are_deleted_a_thousand_at_a_time(tmp_path):
    folder(tmp_path / "many", {f"{i % 7}/{i}": b"x" for i in range(1100)})
    connect(storage.serve(tmp_path))
    with proxied() as proxy:
        proxy.requests = 0
        storage.delete_bucket("many", contents=True)
        assert proxy.requests < 8 and storage.buckets() == []


@every
def test_files_are_uploaded_whatever_they_are_called(s3, tmp_path):
    names = "plain|with space|größe/日本語 ☃.txt|a#b|%41|a+b|a&b=c;d|100%|quo'te|tilde~|deep/deep/deep".split("|")
    names += ".hidden|question?|star*|colon:|[brackets]{}|empty".split("|") + ["l" * 200]
    members = {f"sub/{name}": name.encode() if name != "empty" else b"" for name in names}
    assert zips.upload(folder(tmp_path, members), s3) == {"uploaded": len(names), "skipped": 0}
    assert sorted(storage.objects(s3)) == sorted(members)
    assert zips.upload(tmp_path / "sub/plain", f"{s3}/files/") == {"uploaded": 1, "skipped": 0}
    assert content(s3) == members | {"files/plain": b"plain"}
    before = listed(s3)
    folder(tmp_path, changed := {"sub/plain": b"PLAIN", "sub/new": b"new"})
    assert zips.upload(tmp_path, s3) == {"uploaded": 2, "skipped": len(names) - 1}
    assert content(s3) == members | {"files/plain": b"plain"} | changed
    assert listed(s3)["sub/empty"] == before["sub/empty"]


@buckets
def test_keys_that_are_no_paths_are_listed_uploaded_and_deleted(s3, tmp_path):
    put(s3, {"cats//1.png": b"1", "cats/./2.png": b"2", "cats/../3.png": b"3", "cats": b"4", "dogs/1.png": b"5"})
    storage.client().put_object(Bucket=s3[5:], Key="cats/", Body=b"")  # a folder's marker
    zips.upload(folder(tmp_path, {"a\tb": b"5"}), f"{s3}/cats")
    assert sorted(storage.objects(f"{s3}/cats")) == ["../3.png", "./2.png", "/1.png", "a\tb"]
    storage.delete(f"{s3}/cats")
    assert list(listed(s3)) == ["dogs/1.png"]
    put(s3, {"cats//1.png": b"1", "raw/": b"", "raw/cats/1.png": b"x"})
    storage.delete_bucket(s3[5:], contents=True)
    assert s3[5:] not in storage.buckets()


@buckets
def test_a_large_file_goes_in_parts_and_is_skipped_the_second_time(s3, tmp_path):
    (tmp_path / "large").write_bytes(random.randbytes(9 * MB))
    with proxied() as proxy:
        assert zips.upload(tmp_path, s3) == {"uploaded": 1, "skipped": 0}
        assert proxy.requests >= 6  # connecting, a list, the upload's begin and end, two parts
        proxy.requests, proxy.slow_down_every = 0, 2
        assert zips.upload(tmp_path, s3) == {"uploaded": 0, "skipped": 1}
        # a list and, as the ETag is no MD5, a HEAD for the metadata: asked again when the server is busy
        assert (proxy.requests, proxy.slow_downs, proxy.latest.split()[0]) == (3, 1, "HEAD")
    assert content(s3) == {"large": (tmp_path / "large").read_bytes()}


def test_a_store_with_a_certificate_authority_of_its_own(s3, tmp_path):
    put(s3, PETS)
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        os.environ.update(AWS_ENDPOINT_URL=proxy.url.replace("http", "https"), AWS_MAX_ATTEMPTS="1")
        storage.forget_connection()
        with refused("CERTIFICATE_VERIFY_FAILED"):
            storage.buckets()
        connect({"AWS_CA_BUNDLE": str(tmp_path / "authority.pem")})
        assert list(storage.objects(s3)) == storage.list_files(s3) == sorted(PETS)


@pytest.mark.slow
def test_a_zip_larger_than_memory_is_uploaded_and_unzipped(s3, tmp_path):
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        for i in range(12):
            archive.writestr(f"class{i % 3}/{i}", bytes([i]) * (50 * MB))
    code = """
import re, sys
from helpers.chapters import zips
zips.upload(*sys.argv[1:])
zips.unzip(sys.argv[2] + '/large.zip', sys.argv[2])
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])"""  # the most memory it has used, in KB
    with start(code, tmp_path / "large.zip", s3) as process:
        assert int(process.communicate()[0].splitlines()[-1]) < 350 * 1024
    assert {size for size, *_ in listed(f"{s3}/raw").values()} == {50 * MB} and len(listed(f"{s3}/raw")) == 12
    assert content(f"{s3}/raw/class1")["4"] == bytes([4]) * (50 * MB)
    storage.delete(s3)


READY = {f"{part}/{name}": data + part.encode() for part in storage.SPLITS for name, data in PETS.items()}


def test_unzip_knows_the_layouts_says_what_it_ignores_and_again_skips_what_is_there(s3, tmp_path, capsys):
    """Class folders or a split, at the root or in a folder, and what others call val."""
    layouts = [("classes", top, "", PETS) for top in ("", "train/", "./", "pets\\")]
    layouts += [("split", top, val, READY) for top, val in (("", "valid"), ("pets/", "validation"), ("", "val"))]
    for number, (kind, top, val, members) in enumerate(layouts):
        archive = {f"{top}{name.replace('val/', f'{val}/')}": data for name, data in members.items()}
        if "\\" in top:
            archive = {name.replace("/", "\\"): data for name, data in archive.items()}
        out = zips.unzip(zipped(tmp_path / "pets.zip", archive), f"{s3}/{number}")
        assert out == {"layout": kind, "uploaded": len(members), "skipped": 0, "ignored": 0}
        assert content(f"{s3}/{number}" + "/raw" * (kind == "classes")) == members
    rest = ["cats/", "dogs/", "__MACOSX/cats/._1.png", "cats/.DS_Store", ".git/config", "cats/Icon\r", "README.txt"]
    out = zips.unzip(zipped(tmp_path / "pets.zip", PETS | dict.fromkeys(rest, b"")), f"{s3}/0")
    assert out == {"layout": "classes", "uploaded": 0, "skipped": 3, "ignored": 7}
    assert "3 files, ignored: 2 folders, 4 hidden files, 1 files outside class folders" in capsys.readouterr().out
    assert sorted(listed(f"{s3}/0")) == sorted(f"raw/{name}" for name in PETS)


def test_unzip_reads_from_s3_and_writes_nothing_to_the_disk(s3, tmp_path, capsys):
    """A file limit of 0 bytes makes every write to a file fail."""
    members = {f"cats/{i}.bin": random.randbytes(size) for i, size in enumerate([10, MB, 9 * MB])}
    zips.upload(zipped(tmp_path / "cats.zip", members, zipfile.ZIP_STORED), f"{s3}/zips")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert zips.unzip(f"{s3}/zips/cats.zip", s3)["uploaded"] == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(f"{s3}/raw") == members


def encrypted(data):
    """The zip with its last member marked as encrypted, in both headers."""
    data = bytearray(data)
    data[data.rindex(b"PK\x03\x04") + 6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def test_unzip_refuses_before_anything_is_put(s3, tmp_path):
    for more, word in [
        ({"../evil.png": b"x"}, "../evil.png"),
        ({"/evil.png": b"x"}, "/evil.png"),
        ({"C:\\evil.png": b"x"}, "C:/evil.png"),
        ({"cats\\..\\..\\evil.png": b"x"}, "cats/../../evil.png"),
        ({"cats/a\tb.png": b"x"}, "a\\tb.png"),
        ({"cats/bomb.png": bytes(3 * MB)}, "cats/bomb.png"),
        ({"cats/huge.png": random.randbytes(5000)}, "5,021 bytes"),
        ({"cats\\1.png": b"x"}, "cats/1.png' is in it twice"),
        (dict.fromkeys(["train/a/1", "test/a/1"], b"x"), "no val"),
    ]:
        with refused("pets.zip", word):
            zips.unzip(zipped(tmp_path / "pets.zip", PETS | more), s3, max_bytes=5000)
    with refused("pets.zip", "no class folders"):
        zips.unzip(zipped(tmp_path / "pets.zip", {"1.png": b"x", "2.png": b"x"}), s3)
    whole = zipped(tmp_path / "pets.zip", PETS).read_bytes()
    for data, word in (whole[:-30], "cut off"), (b"<html>no zip</html>", "not a zip"), (encrypted(whole), "dogs/1.png"):
        (tmp_path / "pets.zip").write_bytes(data)
        with refused("pets.zip", word):
            zips.unzip(tmp_path / "pets.zip", s3)
    assert listed(s3) == {}


def test_a_damaged_member_is_named_and_not_stored(s3, tmp_path):
    for size in 100, 9 * MB:
        bad = {"cats/bad.png": b"a" * size, "cats/good.png": b"b"}
        with open(archive := zipped(tmp_path / "pets.zip", bad, zipfile.ZIP_STORED), "r+b") as file:
            file.seek(size - 10)
            file.write(b"damaged")
        with refused("cats/bad.png", "CRC"):
            zips.unzip(archive, s3)
    assert "raw/cats/bad.png" not in listed(s3)


def images(**counts):
    """{class/name: content}, as many for each class."""
    return {f"{label}/{i:03}.png": f"{label} {i}".encode() for label, count in counts.items() for i in range(count)}


def copies(url):
    """What the three splits hold together: {name: bytes}."""
    return {name: data for part in storage.SPLITS for name, data in content(f"{url}/{part}/").items()}


@every
def test_split_copies_each_class_in_the_ratios_by_the_seed_only_and_again_changes_nothing(s3):
    for prefix, seed in ("a", 0), ("b", 1):
        put(f"{s3}/{prefix}/raw", {**(pets := images(cats=20, dogs=13)), "loose.png": b"x"})
        assert zips.split_classes(f"{s3}/{prefix}", seed=seed) == {"train": 23, "val": 5, "test": 5}
    found, other = ([list(listed(f"{s3}/{prefix}/{part}/")) for part in storage.SPLITS] for prefix in "ab")
    assert found != other
    counts = [[sum(label in name for name in part) for label in ("cats", "dogs")] for part in found]
    assert counts == [[14, 9], [3, 2], [3, 2]]
    assert sorted(sum(found, [])) == sorted(pets) and copies(f"{s3}/a") == pets  # each in one split only
    before = listed(f"{s3}/a")
    zips.split_classes(f"{s3}/a")
    assert listed(f"{s3}/a") == before


def test_split_otherwise_is_refused_and_a_class_too_small_for_it_is_named(s3):
    put(f"{s3}/raw", images(cats=10))
    zips.split_classes(s3)
    before = listed(s3)
    for options in {"ratios": (0.6, 0.2, 0.2)}, {"seed": 1}:
        with refused(s3, f"other {next(iter(options))}:", "delete", "split.json"):
            zips.split_classes(s3, **options)
    put(f"{s3}/raw", {"cats/003.png": b"CAT 3"})
    with refused(s3, "other images:"):
        zips.split_classes(s3)
    storage.delete(f"{s3}/split.json")  # what lies in train, val and test now is strange to the plan
    with refused(s3, "images", "/train"):
        zips.split_classes(s3, seed=1)
    assert listed(s3).keys() == before.keys() - {"split.json"}
    for ratios in (0.5, 0.5, 0), (0.5, 0.3, 0.3), (0.5, 0.5):
        with refused("ratios", str(ratios)):
            zips.split_classes(s3, ratios)
    with refused(f"{s3}/none/raw", "nothing to split"):
        zips.split_classes(f"{s3}/none")
    put(f"{s3}/tiny/raw", images(cats=2, dogs=6))
    with pytest.warns(UserWarning, match="cats has no val image.*it takes 6"):
        assert zips.split_classes(f"{s3}/tiny") == {"train": 5, "val": 1, "test": 2}


def test_connect_names_the_setting_that_is_wrong(embedded_env, moto_env, ceph_env):
    nowhere, wrong = f"http://127.0.0.1:{free_port()}", secrets.token_hex(20)
    for env, name, value, said in [
        (moto_env, "AWS_ENDPOINT_URL", nowhere, ["Nothing answers", nowhere]),
        (moto_env, "AWS_ENDPOINT_URL", "localhost:9000", ["localhost:9000"]),
        (moto_env, "AWS_PROFILE", "nobody", ["nobody"]),
        (embedded_env, "AWS_ACCESS_KEY_ID", wrong, ["refuses the key", embedded_env["AWS_ENDPOINT_URL"]]),
        (ceph_env, "AWS_SECRET_ACCESS_KEY", wrong, ["refuses the key", ceph_env["AWS_ENDPOINT_URL"]]),
    ]:
        with cleaned(), refused(name, *said):
            connect({key: setting for key, setting in env.items() if "REGION" not in key} | {name: value})


def test_silence_and_a_wrong_key_later_on_are_named(s3, monkeypatch):
    os.environ["AWS_ACCESS_KEY_ID"] = secrets.token_hex(20)
    storage.forget_connection()
    for act in storage.buckets, lambda: storage.objects(s3), lambda: zips.upload(__file__, s3):
        with refused(os.environ["AWS_ENDPOINT_URL"], "refuses the key"):
            act()
    monkeypatch.setattr(storage, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        os.environ.update(AWS_MAX_ATTEMPTS="1", AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        storage.forget_connection()
        with refused("Nothing answers"):
            storage.buckets()


ACTS = [  # on the URL of a bucket
    storage.objects,
    storage.delete,
    zips.split_classes,
    lambda url: zips.upload(__file__, url),
    lambda url: zips.unzip(f"{url}/cats/1.png", url),
    lambda url: storage.write(f"{url}/a", b"x"),
    lambda url: storage.read(f"{url}/cats/1.png"),
    lambda url: get_with_obstore(f"{url}/cats/1.png"),
]


@every
def test_what_is_missing_is_named(s3, tmp_path):
    url = f"s3://missing-{secrets.token_hex(4)}"
    for act in *ACTS, lambda url: storage.delete_bucket(url[5:]):
        with refused(url[5:], os.environ["AWS_ENDPOINT_URL"], "check the name", kind=storage.NotFound):
            act(url)
    for act in zips.upload, zips.unzip:
        with refused(str(tmp_path / "missing.zip"), "check the path"):
            act(tmp_path / "missing.zip", s3)
    for act in lambda url: zips.unzip(url, url), storage.read, get_with_obstore:
        with refused(f"{s3}/pets.zip", os.environ["AWS_ENDPOINT_URL"], "check the name", kind=storage.NotFound):
            act(f"{s3}/pets.zip")
    for url in "bucket/key", "https://bucket/key", "s3://":
        with refused(repr(url), "s3://bucket/key"):
            storage.parse(url)


def test_what_belongs_to_somebody_else_is_refused(ceph_env):
    connect(ceph_env)
    put(s3 := new_bucket(), PETS)
    connect(ceph_env, **{f"AWS_{name[6:]}": value for name, value in ceph_env.items() if "OTHER" in name})
    for act in ACTS:
        with refused(s3, "No permission", os.environ["AWS_ENDPOINT_URL"], "owner"):
            act(s3)
    with refused(s3[5:], "somebody else's", "another name"):
        storage.create_bucket(s3[5:])
    connect(ceph_env)
    assert content(s3) == PETS


@pytest.mark.parametrize(
    "name, value, text, shown",
    [
        ("AWS_SECRET_ACCESS_KEY", "/AsecretThatBeginsWithASlash", "key /AsecretThatBeginsWithASlash.", "key ***."),
        ("AZURE_STORAGE_KEY", "bm90IGEgcmVhbCBrZXkK==", "AccountKey=bm90IGEgcmVhbCBrZXkK%3D%3D;", "AccountKey=***;"),
        ("HTTPS_PROXY", "http://me:pw%401@proxy:3128", "via http://me:pw%401@proxy:3128", "via http://me***proxy:3128"),
        ("DB", "postgresql+psycopg://me:a%40long%40password@db/x", "password 'a@long@password'", "password '***'"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token", "/var/run/secrets/token", "/var/run/secrets/token"),
        ("AWS_SECRET_ACCESS_KEY", "minioadmin", "minioadmin is the default", "minioadmin is the default"),
    ],
)
def test_secrets_are_redacted(name, value, text, shown, monkeypatch):
    monkeypatch.setenv(name, value)
    assert storage.redact(text) == (shown, {name} if "***" in shown else set())


def test_everything_gets_through_all_faults_at_once(s3, tmp_path, capsys):
    members = images(cats=6) | {"dogs/large.bin": random.randbytes(9 * MB)}
    archive = zipped(tmp_path / "pets.zip", members).read_bytes()
    with proxied(slow_down_every=5, reset_every=7, truncate_every=5, no_copy=True) as proxy:
        zips.upload(tmp_path / "pets.zip", s3)
        with pytest.warns(UserWarning, match="too few"):
            zips.unzip(f"{s3}/pets.zip", f"{s3}/pets")
            zips.split_classes(f"{s3}/pets")
        assert capsys.readouterr().out.count("no CopyObject") == 1
        assert proxy.slow_downs and proxy.resets and proxy.truncations and proxy.copies_refused
    assert content(f"{s3}/pets/raw") == copies(f"{s3}/pets") == members
    assert content(s3)["pets.zip"] == archive
    with proxied(slow_down_every=3, reset_every=3):
        storage.delete_bucket(s3[5:], contents=True)
    assert s3[5:] not in storage.buckets()


def killed(code, *arguments, at):
    """Run a process, and kill it at a request to S3: at(its number, "method path"); at most 32 are under way."""
    code = f"import sys\nfrom helpers.chapters import zips\nzips.{code}"
    # Threads that are no daemons are waited for: what is under way is done when it ends.
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], delay=0.002, daemon_threads=False) as proxy:
        env = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
        process = start(code, *arguments, env=env, stderr=subprocess.DEVNULL)
        proxy.on_request = lambda number: at(number, proxy.latest) and process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_an_unzip_that_was_killed_twice_and_a_split_are_completed(s3, tmp_path):
    """In the midst of the small files, then of the parts of the large one, and of the copies."""
    members = {f"cats/{i}.bin": random.randbytes(2000) for i in range(60)} | {"cats/large": random.randbytes(9 * MB)}
    archive = zipped(tmp_path / "cats.zip", members)
    killed("unzip(*sys.argv[1:])", archive, s3, at=lambda number, _: number == 45)
    assert 0 < len(listed(s3)) < 60
    killed("unzip(*sys.argv[1:])", archive, s3, at=lambda _, request: "partNumber=2" in request)
    assert len(listed(s3)) == 60
    zips.unzip(archive, s3)
    assert content(f"{s3}/raw") == members
    killed("split_classes(sys.argv[1])", s3, at=lambda number, _: number == 45)
    assert 62 < len(before := listed(s3)) < 123
    assert zips.split_classes(s3) == {"train": 43, "val": 9, "test": 9}
    assert copies(s3) == members and len(listed(s3)) == 123 and before.items() <= listed(s3).items()


def test_a_program_whose_store_has_died_ends_without_trying_again():
    """A request is tried again for 13 seconds while the program runs, and not after its end."""
    program = """
import atexit, obstore, os, threading, time
from concurrent.futures import ThreadPoolExecutor
from helpers import storage
begun = threading.Event()
def ask():
    begun.set()
    obstore.head(storage.store("pictures"), "cats/1.png")
ThreadPoolExecutor().submit(storage.retry, ask)
begun.wait()
end = time.monotonic()
atexit.register(lambda: os._exit(time.monotonic() - end > 5))  # which comes when the threads are done
"""
    nowhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert start(program, env=os.environ | nowhere | keys).wait(60) == 0
