"""A rented machine's whole life: what is checked, asked for and told, and what its script does.

The machines are moto's, which only keeps what it is told; their script runs here, as a child of the tests.
"""

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import psutil
import pytest
from servers import embedded

from helpers import storage
from helpers.chapters import rent
from test_run import outputs_of, write

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"  # in two pieces: no tracked file may show a secret that is set
TOKEN = "a-token-of-12-or-more"
SHOW = (
    "#parameters\nbucket = 'another'\ntext = ''\nnote = ''",
    """
import os, time
from pathlib import Path
print("the kernel has begun with", bucket, text)
Path(note).write_text(str(os.getpid()))
time.sleep(600)""",
)
bundle_source = rent.bundle_source  # packed once for all machines of the tests


@pytest.fixture(scope="module")
def rented(moto_env, tmp_path_factory):
    """This process as a user of EC2, with all that a machine takes: clients, names and the words of `submit`."""
    source, mine = bundle_source(), moto_env | {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    with embedded.connected(mine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rent, "bundle_source", lambda: source)
        ec2, name = boto3.client("ec2"), f"rented-{time.time_ns()}"
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        ec2.create_key_pair(KeyName=name)
        group = ec2.create_security_group(GroupName=name, Description="for the tests")["GroupId"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]
        words = dict(image_id=image["ImageId"], instance_type="g4dn.xlarge", instance_profile=name)
        words |= dict(key_name=name, security_group=group, bucket=name)
        notebook = write(tmp_path_factory.mktemp("account"), "show.ipynb", *SHOW)
        yield SimpleNamespace(ec2=ec2, image=image, words=words, notebook=notebook, bucket=name)


def submit(rented, capsys, *words, **changed):
    """Exit code of the command line, and the instance or the error."""
    options = {name: value for name, value in (rented.words | changed).items() if value is not None}
    words = [*words, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))]
    code = 0
    try:
        code = rent.main(["submit", *map(str, [rented.notebook, *words])])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, (said.out if code == 0 else said.err).splitlines()[-1]


def describe(rented, instance):
    return rented.ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]


def script_of(rented, instance):
    value = rented.ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    return base64.b64decode(value).decode()


def test_ec2_is_asked_for_a_machine_as_told_tagged_without_a_key_and_ending_when_it_shuts_down(
    rented, capsys, monkeypatch
):
    make, asked = rent.make_request, []
    monkeypatch.setattr(rent, "make_request", lambda *given: asked.append(make(*given)) or asked[-1])
    code, instance = submit(rented, capsys, "--spot", "--disk", "77", "-p", "bucket", "mine")
    assert code == 0 and describe(rented, instance)["InstanceLifecycle"] == "spot"
    [given], script, job = asked, script_of(rented, instance), rent.status(instance)[0]["job"]
    assert job.startswith(f"s3://{rented.bucket}/jobs/show/20")
    assert r"bucket = \"mine\"" in storage.read(f"{job}/show.ipynb").decode()  # else the one of the job
    tags = [{"Key": key, "Value": value} for key, value in dict(Name="show", Project=rent.PROJECT, Job=job).items()]
    disk = {"VolumeSize": 77, "DeleteOnTermination": True}
    expected = dict(
        ImageId=rented.words["image_id"], InstanceType="g4dn.xlarge", MinCount=1, MaxCount=1, UserData=script
    )
    expected |= dict(InstanceInitiatedShutdownBehavior="terminate", MetadataOptions={"HttpTokens": "required"})
    expected |= dict(KeyName=rented.words["key_name"], SecurityGroupIds=[rented.words["security_group"]])
    expected["IamInstanceProfile"] = {"Name": rented.words["instance_profile"]}
    expected["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
    expected["BlockDeviceMappings"] = [{"DeviceName": rented.image["RootDeviceName"], "Ebs": disk}]
    expected["TagSpecifications"] = [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")]
    assert given == expected
    assert script.startswith("#!/bin/bash\n") and len(script.encode()) < 16_000
    for name in "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID":
        assert os.environ[name] not in script and name not in script
    assert f"export AWS_ENDPOINT_URL_S3={os.environ['AWS_ENDPOINT_URL']}\n" in script
    assert f"set -- run {job}/show.ipynb --output {job}/output --processes 0\n" in script  # one for each GPU


def test_machine_knows_amazons_s3_and_ends_after_its_time_and_when_it_boots_again_whatever_the_script_does(
    tmp_path, monkeypatch
):
    """Only the script's first part runs here, in which no work is done yet: systemd knows already."""
    with embedded.cleaned():  # where no address is set, a machine without one would begin a server of its own
        os.environ["AWS_REGION"] = "eu-west-1"
        monkeypatch.setattr(storage, "client", lambda: boto3.Session(region_name="eu-west-1").client("s3"))
        script = rent.make_user_data("s3://bucket/jobs/x", "show", max_hours=2)
    assert "export AWS_REGION=eu-west-1\nexport AWS_ENDPOINT_URL_S3=https://s3.eu-west-1.amazonaws.com\n" in script
    for name in "shutdown", "systemctl", "systemd-run":
        (tmp_path / name).write_text(f'#!/bin/bash\necho "$(basename "$0") $*" >> {tmp_path}/said\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "UNITS": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-c", script.split("\n\n")[0]], env=environment, check=True, timeout=20)
    said = ["systemctl enable end-this-machine", "systemd-run --on-active=7800 shutdown -h now", "shutdown -h now"]
    assert (tmp_path / "said").read_text().splitlines() == said
    subprocess.run(["systemd-analyze", "verify", tmp_path / "end-this-machine.service"], check=True, timeout=20)


def test_what_cannot_work_is_told_and_nothing_is_started_or_stored(rented, capsys, monkeypatch, tmp_path):
    ami, group = "ami-00000000000000000", "sg-00000000000000000"
    nobody = dict(image_id=ami, instance_profile="nobody", key_name="nobody", security_group=group)
    names = f"no image {ami}, no instance profile nobody, no key pair nobody, no security group {group} in "
    before = rent.status()
    monkeypatch.setitem(rented.words, "bucket", "not-there-yet")
    for words, changed, sentence in (
        ([], nobody, f"error: there is {names}"),
        (["-p", "nobody", "1"], {}, "error: no parameter nobody in these notebooks; there are: bucket, note, text"),
        (["-p", "text", f"key={SECRET}"], {}, "show AWS_SECRET_ACCESS_KEY: remove it"),
    ):
        code, said = submit(rented, capsys, *words, **changed)
        assert code == 2 and sentence in said and SECRET not in said
    monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", "https://ec2.us-east-1.amazonaws.com")
    code, said = submit(rented, capsys)
    assert code == 1 and said.startswith(f"A rented machine cannot reach S3 at {os.environ['AWS_ENDPOINT_URL']}: set ")
    monkeypatch.delenv("AWS_ENDPOINT_URL_EC2")
    monkeypatch.setattr(rent, "store_job", lambda *_: "s3://bucket/job")
    monkeypatch.setattr(rent, "make_request", lambda *_: dict(SecurityGroupIds=["nobody"], MinCount=1, MaxCount=1))
    code, said = submit(rented, capsys)
    assert code == 1 and said.startswith("EC2: ") and "RunInstances" in said and "InvalidGroup" in said
    assert rent.status() == before and "not-there-yet" not in storage.buckets()
    with embedded.connected(storage.serve(tmp_path)):  # an S3, which rents no machines
        code, said = submit(rented, capsys)
    assert code == 1 and said.startswith("EC2: ") and "AWS_ENDPOINT_URL_S3" in said


def test_source_is_tracked_files_only_as_they_are_now_with_their_times_and_without_a_secret(tmp_path, monkeypatch):
    """That it is enough to work with is tried by the machines below."""
    monkeypatch.setattr(storage, "REPOSITORY", tmp_path)
    for name in "tracked.py", ".env":
        (tmp_path / name).write_text("x = 1\n")
    for command in ["init", "-q"], ["add", "tracked.py"]:
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "tracked.py").write_text("x = 2\n")
    os.utime(tmp_path / "tracked.py", (1e9, 1e9))  # make looks at it
    with tarfile.open(fileobj=io.BytesIO(bundle_source())) as archive:
        [packed] = archive.getmembers()
        assert (packed.name, packed.mtime) == ("tracked.py", 1e9) and archive.extractfile(packed).read() == b"x = 2\n"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "tracked.py").write_text(f"key = {SECRET!r}\n")
    with pytest.raises(ValueError, match="tracked.py shows AWS_SECRET_ACCESS_KEY: remove it$"):
        bundle_source()


def test_status_and_logs_of_our_machines_and_only_they_are_terminated(rented, capsys, monkeypatch):
    def command(*words):
        assert rent.main([*words]) == 0
        return capsys.readouterr().out.split("\n", 1)[1]  # without the line of storage.connect

    first, second = (submit(rented, capsys, key_name=None, security_group=None)[1] for _ in range(2))
    [other] = rented.ec2.run_instances(ImageId=rented.words["image_id"], MinCount=1, MaxCount=1)["Instances"]
    job = {row["instance"]: row["job"] for row in rent.status()}
    assert rent.logs(first) == rented.ec2.get_console_output(InstanceId=first)["Output"] != ""
    storage.write(f"{job[first]}/log.txt", "grüße\nfrom it".encode())
    storage.write(f"{job[first]}/status.json", b'{"state": "timed out", "exit_code": 124}')
    assert command("logs", first) == "grüße\nfrom it\n"
    rows = {row["instance"]: row for row in json.loads(command("status"))}
    assert {first, second} <= rows.keys() and other["InstanceId"] not in rows
    assert rows[first]["outcome"] == {"state": "timed out", "exit_code": 124} and rows[second]["outcome"] is None
    [row] = json.loads(command("status", second))
    assert row == rows[second] and (row["state"], row["type"]) == ("running", "g4dn.xlarge")
    assert row["address"] == describe(rented, second)["PublicDnsName"] != ""
    assert command("terminate", second) == "shutting-down\n"
    for name, stranger in ("status", "i-00000000000000000"), ("terminate", other["InstanceId"]):
        with pytest.raises(SystemExit) as stopped:
            rent.main([name, stranger])
        assert stopped.value.code == 2
        assert f"error: {stranger} is not a machine of this project\n" in capsys.readouterr().err
    assert describe(rented, other["InstanceId"])["State"]["Name"] == "running"
    monkeypatch.setattr(rent, "find_instances", lambda *_: pytest.fail("asks EC2"))  # which a job's URL does without
    assert command("logs", job[first]) == "grüße\nfrom it\n"


TEXT = """a  b 'c' "d" $(touch x) `touch y`; touch z & \\ %s *"""


def of_job(job):
    """The processes that have this job in their environment: all that its script has started."""
    return [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("JOB") == job]


def boot(rented, capsys, folder, project, **changed):
    """Submit the notebook, and start what EC2 was given as the machine would: as root, in an environment of nothing.

    `shutdown` and `pip` only note their words; boto3 is that of this Python. The project's environment, which `make
    setup` takes as it is, has the command `project` for a Python.
    """
    folder.mkdir()
    words = "-p", "text", TEXT, "-p", "note", folder / "pid", "--processes", 1
    code, instance = submit(rented, capsys, *words, **changed)
    fakes, venv = folder / "fakes", folder / "venv"
    commands = {
        fakes / "systemctl": "",
        fakes / "systemd-run": "",
        fakes / "shutdown": f'echo "$*" >> {folder}/shutdown',
        fakes / "made/bin/pip": f'echo "$*" >> {folder}/pip',
        fakes / "made/bin/python": f'exec {sys.executable} "$@"',
        fakes / "python3": f'[ "$*" = "-m venv bootstrap" ] && exec cp -r {fakes}/made bootstrap\n'
        f'exec {Path(sys.executable).resolve()} "$@"',
        venv / "bin/python": project,
    }
    for path, text in commands.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (folder / "script").write_text(script_of(rented, instance))
    (venv / "installed").touch()
    env = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    env |= {"PATH": f"{fakes}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "UPLOAD_EVERY": "8"}
    env |= {"VENV": str(venv), "UNITS": str(folder), "TMPDIR": str(folder)}
    env |= {} if os.geteuid() == 0 else {"HOME": str(folder)}
    with open(folder / "console", "wb") as console:
        process = subprocess.Popen(["bash", folder / "script"], env=env, stdout=console, stderr=console, cwd="/")
    return SimpleNamespace(process=process, folder=folder, instance=instance, job=rent.status(instance)[0]["job"])


def check_end(machine, state, code):
    """The machine has ended itself once, left nothing running, and said in S3 how it went."""
    machine.process.wait(240)
    assert not psutil.wait_procs(of_job(machine.job), timeout=5)[1]
    assert (machine.folder / "shutdown").read_text() == "-h now\n"
    machine.log = rent.logs(machine.instance)
    assert machine.log.startswith("20") and machine.job in machine.log.splitlines()[0]
    assert machine.log.splitlines()[-1].endswith(f"Z {state}, exit code {code}")
    assert (machine.folder / "console").read_text().replace("\r", "").endswith(machine.log[-100:])
    assert (machine.folder / "pip").read_text() == "install -q boto3\n"
    assert rent.status(machine.instance)[0]["outcome"] == {"state": state, "exit_code": code}


def test_machines_keep_what_they_said_and_end_when_done_when_failed_and_when_their_time_is_over(
    rented, capsys, tmp_path
):
    began, machines = time.monotonic(), []

    def start(name, *given, **changed):
        machines.append(boot(rented, capsys, tmp_path / name, *given, **changed))
        return machines[-1]

    try:
        works = start("works", 'printf "%s\\n" "$@"')
        check_end(works, "succeeded", 0)
        assert f"-m\nhelpers\nrun\n{works.job}/show.ipynb\n--output\n{works.job}/output\n" in works.log

        enough = 4 * (time.monotonic() - began) + 10  # for a kernel to begin
        hangs = start("hangs", f'exec {sys.executable} "$@"', max_hours=enough / 3600)
        fails = start("fails", "echo no luck; exit 3")
        check_end(fails, "failed", 3)
        assert "no luck\n" in fails.log
        while "S3 at " not in (log := rent.logs(hangs.instance)):
            assert hangs.process.poll() is None
            time.sleep(0.5)
        assert "exit code" not in log  # it is kept from time to time, not only at the end
        check_end(hangs, "timed out", 124)
        assert f"Results: {hangs.job}/output/index.html\n" in hangs.log and "Traceback" not in hangs.log
        (tmp_path / "show.ipynb").write_bytes(storage.read(f"{hangs.job}/output/show.ipynb"))
        assert f"the kernel has begun with {rented.bucket} {TEXT}\n" in outputs_of(tmp_path / "show.ipynb")
        assert not psutil.pid_exists(int((hangs.folder / "pid").read_text()))
        assert not [name for name in tmp_path.rglob("[xyz]")]
    finally:
        for machine in machines:
            for process in [*of_job(machine.job), machine.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            machine.process.wait()
